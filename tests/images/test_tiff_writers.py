"""TIFF as other programs write it: parts of series, missing tags, bytes in the other order."""

import io
import struct
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from snr_ray.images.formats import OpenFile, open_file

Y, X = np.mgrid[:48, :34]
GREY = (120 + 100 * np.sin(Y / 9) * np.cos(X / 5 + 1)).astype(np.uint8)
RGB = np.dstack([GREY, 255 - GREY, np.flip(GREY, 1)])
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


def again(file: OpenFile) -> OpenFile:
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
    assert len(again(file).frames) == 1


@pytest.mark.parametrize("bits", range(9, 16))
@pytest.mark.parametrize("order", "<>")
def test_packed_numbers_come_back_whatever_the_order_of_bytes(bits: int, order: str) -> None:
    values = np.round(GREY / 255 * (2**bits - 1)).astype(np.uint16)
    packed = bytes(imagecodecs.packints_encode(values, bits, runlen=34))
    file = open_file(by_hand(order, grey(bits, _262=(3, 1)), packed), "a.tif")
    np.testing.assert_allclose(file.frames[0].pixels[0], values / (2**bits - 1), atol=1e-6)
    np.testing.assert_allclose(again(file).frames[0].pixels, file.frames[0].pixels, atol=1e-6)


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
    np.testing.assert_allclose(again(file).frames[0].pixels, file.frames[0].pixels, atol=1e-6)


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


def test_xmp_that_may_say_how_to_turn_is_left_out_of_what_was_turned() -> None:
    xmp = b'<x:xmpmeta xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    tags = [(700, "B", len(xmp), xmp, True), (274, "H", 1, 6, True)]
    file = open_file(tiff(GREY, photometric="minisblack", extratags=tags), "a.tif")
    with Image.open(io.BytesIO(file.encode([file.frames[0].pixels], "a.tif"))) as after:
        assert np.asarray(ImageOps.exif_transpose(after)).shape == (34, 48)
