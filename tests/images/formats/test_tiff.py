"""What every tag of a TIFF means for its pixels, by files that tifffile and Pillow write."""

import io
import struct
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from snr_ray.errors import InputError
from snr_ray.images.formats.codec import OpenFile, decode, open_file

RNG = np.random.default_rng(0)
Y, X = np.mgrid[:48, :34]
GREY = (120 + 100 * np.sin(Y / 9) * np.cos(X / 5 + 1)).astype(np.uint8)
RGB = np.dstack([GREY, 255 - GREY, np.flip(GREY, 1)])
BITS = GREY > 128
OME = (
    '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
    'UUID="urn:uuid:a1"><Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYZCT" '
    'Type="uint8" SizeX="34" SizeY="48" SizeC="1" SizeT="1" SizeZ="2">'
    '<Channel ID="Channel:0:0" SamplesPerPixel="1"/>'
    '<TiffData FirstZ="0" IFD="0" PlaneCount="1"><UUID FileName="a.ome.tif">urn:uuid:a1</UUID>'
    '</TiffData><TiffData FirstZ="1" IFD="0" PlaneCount="1"><UUID FileName="b.ome.tif">'
    "urn:uuid:b2</UUID></TiffData></Pixels></Image></OME>"
)


def tiff(pixels: np.ndarray, **options: Any) -> bytes:
    out = io.BytesIO()
    tifffile.imwrite(out, pixels, **options)
    return out.getvalue()


def pillow(image: Image.Image, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format="tiff", **options)
    return out.getvalue()


def seen(data: bytes) -> np.ndarray:
    """What a viewer shows, [C, H, W] in [0, 1]."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if image.mode in ("CMYK", "P", "YCbCr"):
        image = image.convert("RGB")
    pixels = np.asarray(image) / (1 if image.mode == "1" else 255)
    return np.moveaxis(np.atleast_3d(pixels), 2, 0)


def again(data: bytes, **options: Any) -> tuple[list[np.ndarray], tifffile.TiffFile]:
    """The pictures of a file, after checking that writing them back changes none of them."""
    file = open_file(data, "a.tif", **options)
    pixels = [frame.pixels for frame in file.frames]
    written = file.encode(pixels, "out.tif")
    for before, after in zip(pixels, open_file(written, "out.tif", **options).frames, strict=True):
        np.testing.assert_allclose(after.pixels, before, atol=1e-5)
    return pixels, tifffile.TiffFile(io.BytesIO(written))


@pytest.mark.parametrize("compression", ["lzw", "zstd", "zlib", "packbits", "lzma"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_compressed_pixels_come_back_compressed(compression: str, dtype: type) -> None:
    stored = RGB.astype(np.float64) * (np.iinfo(dtype).max // 255 if dtype != np.float32 else 1)
    stored = stored.astype(dtype)
    predictor = compression in ("lzw", "zlib", "zstd")
    data = tiff(stored, photometric="rgb", compression=compression, predictor=predictor)
    (pixels,), file = again(data, white=float(stored.max()))
    top = 255 if dtype == np.uint8 else stored.max()
    np.testing.assert_allclose(pixels, np.moveaxis(stored, 2, 0) / top, atol=1e-6)
    wanted = "ADOBE_DEFLATE" if compression in ("zlib", "lzma") else compression.upper()
    assert file.pages[0].compression.name == wanted
    assert (file.pages[0].predictor > 1) == predictor
    assert file.pages[0].dtype == dtype


@pytest.mark.parametrize("compression", ["group3", "group4", "tiff_ccitt", "jpeg", "tiff_lzw"])
def test_what_scanners_write_is_read_as_viewers_show_it(compression: str) -> None:
    image = Image.fromarray(RGB if compression == "jpeg" else BITS)
    data = pillow(image, compression=compression)
    (pixels,), _ = again(data)
    np.testing.assert_allclose(pixels, seen(data), atol=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 10, 12, 14, 16])
@pytest.mark.parametrize("zero", ["minisblack", "miniswhite"])
def test_white_is_the_largest_number_of_the_bits_and_zero_may_be_white(
    bits: int, zero: str
) -> None:
    top = 2**bits - 1
    values = np.round(GREY / 255 * top).astype(np.uint16 if bits > 8 else np.uint8)
    stored = top - values if zero == "miniswhite" else values
    stored = stored.astype(bool) if bits == 1 else stored
    packed = {} if bits in (1, 8, 16) else {"bitspersample": bits}
    data = tiff(stored, photometric=zero, **packed)
    (pixels,), file = again(data, white=65535)
    np.testing.assert_allclose(pixels[0], values / top, atol=1e-6)
    assert file.pages[0].bitspersample == max(bits, 8)


def test_a_float_whose_zero_is_white_is_refused() -> None:
    with pytest.raises(InputError, match=r"a\.tif calls 0 white .* invert it"):
        decode(tiff(GREY.astype(np.float32), photometric="miniswhite"), "a.tif", white=255)


@pytest.mark.parametrize("compression", [None, "lzw", "jpeg"])
def test_inks_become_what_screens_show(compression: str | None) -> None:
    inks = np.dstack([RGB, GREY // 3])
    data = tiff(inks, photometric="separated", compression=compression)
    (pixels,), file = again(data)
    np.testing.assert_allclose(pixels, seen(data), atol=1e-6)
    assert file.pages[0].photometric.name == "RGB"
    inks[:, :, 3] = 255  # a black page, whatever the colours
    assert not decode(tiff(inks, photometric="separated"), "a.tif").pixels.any()


def test_sixteen_bits_of_ink_are_their_eight() -> None:
    inks = np.dstack([RGB, GREY // 3])
    deep = decode(tiff(inks.astype(np.uint16) * 257, photometric="separated"), "a.tif").pixels
    few = decode(tiff(inks, photometric="separated"), "a.tif").pixels
    np.testing.assert_allclose(deep, few, atol=1 / 255)


@pytest.mark.parametrize("kind", ["cielab", "icclab", "itulab", "logluv"])
def test_kinds_that_are_not_known_are_refused(kind: str) -> None:
    with pytest.raises(InputError, match=rf"a\.tif holds pixels of the kind {kind.upper()}"):
        decode(tiff(RGB, photometric=kind), "a.tif")


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "jpeg"])
def test_luma_and_chroma_become_rgb(compression: str | None) -> None:
    data = pillow(Image.fromarray(RGB).convert("YCbCr"), compression=compression)
    (pixels,), _ = again(data)
    np.testing.assert_allclose(pixels, seen(data), atol=1e-6)


def test_palettes_of_eight_and_sixteen_bits() -> None:
    table = RNG.integers(0, 65536, (3, 256)).astype(np.uint16)
    for colormap in (table, table >> 8):
        data = tiff(GREY, photometric="palette", colormap=colormap)
        (pixels,), _ = again(data)
        np.testing.assert_allclose(pixels * 255, np.moveaxis((table >> 8).T[GREY], 2, 0), atol=1e-4)


def test_separate_planes_and_channels_without_a_name() -> None:
    wanted = np.moveaxis(RGB, 2, 0) / 255
    planes = tiff(np.moveaxis(RGB, 2, 0), photometric="rgb", planarconfig="separate")
    np.testing.assert_allclose(again(planes)[0][0], wanted, atol=1e-6)
    plain = tiff(RGB.astype(np.float32), photometric="minisblack", planarconfig="contig")
    (pixels,), file = again(plain, white=255)
    np.testing.assert_allclose(pixels, wanted, atol=1e-6)
    assert file.pages[0].photometric.name == "MINISBLACK"


@pytest.mark.parametrize("extra", ["unassalpha", "assocalpha", "unspecified"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("colours", [1, 3])
def test_an_extra_channel_may_be_dropped_only_if_it_hides_nothing(
    extra: str, dtype: type, colours: int
) -> None:
    top = 1.0 if dtype == np.float32 else np.iinfo(dtype).max
    kind = "rgb" if colours == 3 else "minisblack"
    stored = np.dstack([RGB[:, :, :colours], np.full_like(GREY, 255)]) / 255 * top
    opaque = tiff(stored.astype(dtype), photometric=kind, extrasamples=[extra])
    (pixels,), _ = again(opaque, white=float(top))
    np.testing.assert_allclose(pixels, np.moveaxis(RGB[:, :, :colours], 2, 0) / 255, atol=1e-6)
    stored[5, 5, -1] = 0
    clear = tiff(stored.astype(dtype), photometric=kind, extrasamples=[extra])
    sentence = "does not say what it is" if extra == "unspecified" else "transparent pixels"
    with pytest.raises(InputError, match=sentence):
        decode(clear, "a.tif", white=float(top))


def test_many_channels_are_refused() -> None:
    with pytest.raises(InputError, match=r"a\.tif has 7 samples in a pixel"):
        decode(tiff(np.dstack([RGB, RGB, GREY]), photometric="minisblack",
                    planarconfig="contig"), "a.tif")  # fmt: skip


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_gives_what_is_seen_and_is_gone_afterwards(orientation: int) -> None:
    data = pillow(Image.fromarray(RGB), tiffinfo={274: orientation, 282: 300.0, 283: 150.0})
    (pixels,), file = again(data)
    np.testing.assert_allclose(pixels, seen(data), atol=1e-6)
    page = file.pages[0]
    assert 274 not in page.tags or page.tags[274].value == 1
    across = page.tags[282].value[0] / page.tags[282].value[1]
    assert across == (150 if orientation > 4 else 300)  # turned with the picture


@pytest.mark.parametrize(
    "options",
    [{}, {"imagej": True}, {"truncate": True}, {"ome": True}, {"volumetric": True},
     {"bigtiff": True, "tile": (16, 16), "compression": "lzw"}],
    ids=lambda options: " ".join(options) or "pages",
)  # fmt: skip
def test_a_stack_is_read_page_by_page_and_written_as_a_stack(options: dict[str, Any]) -> None:
    stack = np.stack([GREY, 255 - GREY, GREY // 2])
    kind = {} if "imagej" in options else {"photometric": "minisblack"}
    data = tiff(stack, **kind, **options)
    pixels, file = again(data)
    np.testing.assert_allclose([p[0] * 255 for p in pixels], stack, atol=1e-4)
    assert len(file.pages) == 3
    assert file.is_bigtiff == options.get("bigtiff", False)
    assert file.pages[0].is_tiled == ("tile" in options)
    with pytest.raises(InputError, match=r"must hold one image, but a\.tif holds 3"):
        decode(data, "a.tif")


def test_pages_may_have_sizes_of_their_own_and_thumbnails_are_no_pages() -> None:
    out = io.BytesIO()
    with tifffile.TiffWriter(out) as writer:
        writer.write(RGB, photometric="rgb")
        writer.write(RGB[::2, ::2], photometric="rgb", subfiletype=1)  # reduced
        writer.write(GREY[:20], photometric="minisblack")
    pixels, file = again(out.getvalue())
    assert [p.shape for p in pixels] == [(3, 48, 34), (1, 20, 34)]
    assert len(file.pages) == 2


def test_resolution_profile_text_and_place_on_the_map_are_kept() -> None:
    geo = [(33550, "d", 3, (2.0, 2.0, 0.0), True), (42112, "s", 0, "<GDALMetadata/>", True)]
    data = tiff(RGB, photometric="rgb", resolution=(300, 200), resolutionunit="CENTIMETER",
                iccprofile=b"profile" * 9, description="a slice of 2 \u00b5m".encode(),
                extratags=geo, datetime="2020:01:02 03:04:05", software="scanner 1")  # fmt: skip
    page = again(data)[1].pages[0]
    assert page.get_resolution() == (300, 200)
    assert page.tags[296].value == 3
    assert page.iccprofile == b"profile" * 9
    assert page.description == "a slice of 2 \u00b5m"
    assert page.tags[33550].value == (2.0, 2.0, 0.0)
    assert page.tags[42112].value == "<GDALMetadata/>"
    assert (page.software, page.tags[306].value) == ("scanner 1", "2020:01:02 03:04:05")


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32, np.float64, ">f4"])
def test_hounsfield_units_are_read_by_the_window_and_written_whole(dtype: Any) -> None:
    units = np.round(GREY / 255 * 1400 - 1000).astype(dtype)
    byteorder = ">" if dtype == ">f4" else "<"
    data = tiff(units, byteorder=byteorder)
    (pixels,), file = again(data, window=(-900.0, 200.0))
    cut = np.clip(units.astype(float), -900, 200)
    np.testing.assert_allclose(pixels[0], (cut + 900) / 1100, atol=1e-5)
    # What lies beyond the window is still there, in air's direction where the window ends above it.
    np.testing.assert_allclose(file.asarray(), units.astype(float), atol=1e-3)
    assert file.asarray().dtype == np.dtype(dtype).newbyteorder("=")
    with pytest.raises(InputError, match=r"the mean of a\.tif is negative .*images\.window="):
        decode(data, "a.tif", white=1000)
    with pytest.raises(InputError, match=r"no agreed white, .*images\.white.*images\.window"):
        decode(data, "a.tif")


def test_a_header_that_asks_for_more_than_the_file_holds_is_refused() -> None:
    data = bytearray(tiff(GREY, compression="lzw"))
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        places = [file.pages[0].tags[code].valueoffset for code in (256, 257)]
    for place in places:
        data[place : place + 4] = (2**17).to_bytes(4, "little")
    with pytest.raises(InputError, match=r"a\.tif claims 131072x131072 pixels, which its"):
        decode(bytes(data), "a.tif")


@pytest.mark.parametrize("compression", ["jpeg", "lzw", "zlib"])
def test_a_file_whose_end_is_missing_is_refused(compression: str) -> None:
    data = tiff(np.tile(GREY, (3, 3)), compression=compression, rowsperstrip=144)
    decode(data, "a.tif")
    with pytest.raises(InputError, match=r"a\.tif is cut short: its pixels go on to byte"):
        decode(data[:-9], "a.tif")


@pytest.mark.parametrize("options", [{"rowsperstrip": 16}, {"tile": (16, 16)}])
def test_a_file_that_lacks_some_of_its_pixels_is_refused(options: dict[str, Any]) -> None:
    data = bytearray(tiff(GREY, **options))
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        counts = file.pages[0].tags[279 if "rowsperstrip" in options else 325]
    size = counts.valuebytecount // counts.count
    data[counts.valueoffset + size : counts.valueoffset + 2 * size] = bytes(size)
    with pytest.raises(InputError, match=r"hold all of its pixels, but a\.tif lacks 1 of"):
        decode(bytes(data), "a.tif")


def test_complex_numbers_are_refused() -> None:
    with pytest.raises(InputError, match=r"must be numbers, but a\.tif holds complex64"):
        decode(tiff(GREY.astype(np.complex64)), "a.tif", white=1)


@pytest.mark.parametrize("data", [b"II*\0\x08\0\0\0", b"II*\0\0\0\0\0"])
def test_a_file_without_a_picture_is_refused(data: bytes) -> None:
    with pytest.raises(InputError, match=r"must hold pixels, but a\.tif holds no picture"):
        open_file(data, "a.tif")


def test_a_damaged_file_is_told_from_a_decoder_that_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = tiff(GREY, compression="lzw")
    with pytest.raises(InputError, match=r"cannot be read as an image .*; replace the file"):
        decode(data[:400] + bytes(len(data) - 400), "a.tif")

    def gone(*_: object, **__: object) -> None:
        raise ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")

    monkeypatch.setattr(tifffile.TiffPage, "asarray", gone)
    with pytest.raises(InputError, match=r"a decoder that is not installed .*imagecodecs") as error:
        decode(data, "a.tif")
    assert "replace" not in str(error.value)


def by_hand(order: str, tags: dict[int, tuple[int, Any]], pixels: bytes) -> bytes:
    """A TIFF of one strip with these tags: kind (3 SHORT, 4 LONG, 11 FLOAT) and value."""
    every = tags | {273: (4, 8), 278: (4, 48), 279: (4, len(pixels))}
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(pixels))
    entries = b"".join(
        struct.pack(f"{order}HHI", code, kind, 1)
        + struct.pack(order + {3: "Hxx", 4: "I", 11: "f"}[kind], value)
        for code, (kind, value) in sorted(every.items())
    )
    return head + pixels + struct.pack(f"{order}H", len(every)) + entries + bytes(4)


def grey(bits: int, **more: tuple[int, Any]) -> dict[int, tuple[int, Any]]:
    """Tags of grey pixels of so many bits, without what the zero means."""
    tags = {256: (4, 34), 257: (4, 48), 258: (3, bits), 259: (3, 1), 277: (3, 1)}
    return tags | {int(code[1:]): value for code, value in more.items()}


def rewritten(file: OpenFile) -> OpenFile:
    written = file.encode([frame.pixels for frame in file.frames], "out.tif")
    return open_file(written, "out.tif", white=65535)


@pytest.mark.parametrize(
    "options",
    [
        {"description": OME},
        {"description": "ImageJ=1.53\nimages=10\nslices=10\n", "compression": "lzw"},
        {"description": "ImageJ=1.53\nimages=10\nslices=10\n"},
        {"description": '{"shape": [3, 48, 34]}'},
        {"description": '{"shape": [3, 48, 34]}', "compression": "zlib"},
    ],
    ids=["part of OME", "packed ImageJ", "ImageJ", "shaped", "packed shaped"],
)
def test_only_pages_that_the_file_holds_are_pictures(options: dict[str, Any]) -> None:
    data = tiff(GREY, metadata=None, photometric="minisblack", **options)
    file = open_file(data, "a.ome.tif")
    assert len(file.frames) == 1
    np.testing.assert_allclose(file.frames[0].pixels[0], GREY / 255, atol=1e-6)
    assert len(rewritten(file).frames) == 1


@pytest.mark.parametrize("bits", range(9, 16))
@pytest.mark.parametrize("order", "<>")
def test_packed_numbers_come_back_whatever_the_order_of_bytes(bits: int, order: str) -> None:
    values = np.round(GREY / 255 * (2**bits - 1)).astype(np.uint16)
    packed = bytes(imagecodecs.packints_encode(values, bits, runlen=34))
    file = open_file(by_hand(order, grey(bits, _262=(3, 1)), packed), "a.tif")
    np.testing.assert_allclose(file.frames[0].pixels[0], values / (2**bits - 1), atol=1e-6)
    np.testing.assert_allclose(rewritten(file).frames[0].pixels, file.frames[0].pixels, atol=1e-6)


def test_what_does_not_fit_in_packed_numbers_is_cut_to_the_largest() -> None:
    data = tiff(GREY.astype(np.uint16), bitspersample=12, photometric="minisblack")
    file = open_file(data, "a.tif")
    bright = np.full_like(file.frames[0].pixels, 1.3)
    written = tifffile.imread(io.BytesIO(file.encode([bright], "a.tif", clip=False)))
    assert np.all(written == 4095)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("compression", [None, "tiff_lzw", "jpeg"])
def test_luma_and_chroma_are_turned_once(orientation: int, compression: str | None) -> None:
    out = io.BytesIO()
    image = Image.fromarray(RGB).convert("YCbCr")
    image.save(out, format="tiff", compression=compression, tiffinfo={274: orientation})
    file = open_file(out.getvalue(), "a.tif")
    with Image.open(out) as stored:
        seen = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))
    np.testing.assert_allclose(
        file.frames[0].pixels, np.moveaxis(seen, 2, 0) / 255, atol=1 / 255 + 1e-6
    )
    np.testing.assert_allclose(rewritten(file).frames[0].pixels, file.frames[0].pixels, atol=1e-6)


def test_a_resolution_of_float_is_kept() -> None:
    data = by_hand("<", grey(8, _262=(3, 1), _282=(11, 300.5), _283=(11, 150.0)), GREY.tobytes())
    file = open_file(data, "a.tif")
    written = file.encode([file.frames[0].pixels], "a.tif")
    with tifffile.TiffFile(io.BytesIO(written)) as after:
        assert after.pages[0].get_resolution() == pytest.approx((300.5, 150))


def test_zero_is_black_where_no_tag_says() -> None:
    (frame,) = open_file(by_hand("<", grey(8), GREY.tobytes()), "a.tif").frames
    np.testing.assert_allclose(frame.pixels[0], GREY / 255, atol=1e-6)
    three = by_hand("<", grey(8) | {277: (3, 3)}, RGB.tobytes())
    (frame,) = open_file(three, "a.tif").frames
    np.testing.assert_allclose(frame.pixels, np.moveaxis(RGB, 2, 0) / 255, atol=1e-6)


def test_fax_without_the_tag_is_ink_on_paper() -> None:
    out = io.BytesIO()
    Image.fromarray(GREY > 128).save(out, format="tiff", compression="group4")
    data = bytearray(out.getvalue())
    wanted = open_file(bytes(data), "a.tif").frames[0].pixels
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as file:
        tag = file.pages[0].tags[262]
        white_is_zero = tag.value == 0
        data[tag.offset : tag.offset + 2] = struct.pack("<H", 261)  # a number without a meaning
    (frame,) = open_file(bytes(data), "a.tif").frames
    np.testing.assert_array_equal(frame.pixels, wanted if white_is_zero else 1 - wanted)


def test_xmp_and_the_value_that_means_nothing_are_kept() -> None:
    xmp = b"<x:xmpmeta>\xc2\xb5</x:xmpmeta>"
    tags = [(700, "B", len(xmp), xmp, True), (42113, "s", 0, "-9999", True)]
    file = open_file(tiff(GREY, photometric="minisblack", extratags=tags), "a.tif")
    written = file.encode([file.frames[0].pixels], "a.tif")
    with tifffile.TiffFile(io.BytesIO(written)) as after:
        assert after.pages[0].tags[700].value == xmp
        assert after.pages[0].tags[42113].value == "-9999"


@pytest.mark.parametrize("said", ["-9999", "-9999.0\0", " -9.999e3"])
def test_pixels_that_mean_nothing_are_refused(said: str) -> None:
    pixels = (GREY / 255).astype(np.float32)
    tags = [(42113, "s", 0, said, True)]
    decode(tiff(pixels, extratags=tags), "a.tif", white=1)
    pixels[3, 3] = -9999
    with pytest.raises(InputError, match=r"some of a\.tif are -9999, which means that they have n"):
        decode(tiff(pixels, extratags=tags), "a.tif", white=1)


def test_xmp_that_may_say_how_to_turn_is_left_out_of_what_was_turned() -> None:
    xmp = b'<x:xmpmeta xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    tags = [(700, "B", len(xmp), xmp, True), (274, "H", 1, 6, True)]
    file = open_file(tiff(GREY, photometric="minisblack", extratags=tags), "a.tif")
    with Image.open(io.BytesIO(file.encode([file.frames[0].pixels], "a.tif"))) as after:
        assert np.asarray(ImageOps.exif_transpose(after)).shape == (34, 48)
