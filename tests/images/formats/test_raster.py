"""PNG, JPEG, BMP and WebP: depth, colour and turn as stored, metadata kept, the rest refused."""

import io
import struct
import zlib
from typing import Any

import imagecodecs
import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, ImageOps

from snr_ray.errors import InputError
from snr_ray.images.formats.codec import decode, encode, open_file
from snr_ray.images.formats.headers import n_values
from snr_ray.images.formats.raster import write

Y, X = np.mgrid[:32, :24]
GREY = (120 + 100 * np.sin(Y / 9) * np.cos(X / 5 + 1)).astype(np.uint8)
RGB = np.dstack([GREY, 255 - GREY, np.flip(GREY, 1)])
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def saved(pixels: np.ndarray | Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(out, format=kind, **options)
    return out.getvalue()


def again(data: bytes, name: str, **options: Any) -> tuple[np.ndarray, bytes]:
    """The pixels of a file, and the file with the same pixels written anew."""
    file = open_file(data, name, **options)
    (pixels,) = (frame.pixels for frame in file.frames)
    return pixels, file.encode([pixels], name)


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_sixteen_bits_of_colour_stay_sixteen(channels: int) -> None:
    deep = np.dstack([RGB, np.full_like(GREY, 255)]).astype(np.uint16) * 257 - 100
    stored = np.ascontiguousarray(deep[:, :, [0, 3]] if channels == 2 else deep[:, :, :channels])
    if channels != 3:
        stored[:, :, -1] = 65535
    data = bytes(imagecodecs.png_encode(stored))
    pixels, written = again(data, "a.png", white=65535)
    wanted = stored if channels == 3 else stored[:, :, :-1]
    np.testing.assert_allclose(pixels, np.moveaxis(wanted, 2, 0) / 65535, atol=1e-6)
    np.testing.assert_array_equal(imagecodecs.png_decode(written).reshape(wanted.shape), wanted)
    if channels != 3:
        stored[3, 3, -1] = 0
        with pytest.raises(InputError, match="transparent"):
            decode(bytes(imagecodecs.png_encode(stored)), "a.png", white=65535)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_resolution_profile_and_exif_are_kept(kind: str) -> None:
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "maker", 6
    options = {} if kind == "webp" else {"dpi": (300, 300)}
    data = saved(RGB, kind, icc_profile=PROFILE, exif=exif, **options)
    pixels, written = again(data, f"a.{kind}")
    assert pixels.shape == (3, 24, 32)  # as it is to be seen
    after = Image.open(io.BytesIO(written))
    assert after.size == (32, 24)
    assert after.info["icc_profile"] == PROFILE
    assert after.getexif()[0x010F] == "maker"
    assert after.getexif().get(0x0112, 1) == 1
    if kind != "webp":
        assert round(after.info["dpi"][0]) == 300


def test_sixteen_bits_of_colour_keep_resolution_profile_and_exif() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "scanner"
    pixels = np.arange(5 * 4 * 3, dtype=np.uint16).reshape(5, 4, 3) * 1000
    data = write(pixels, "PNG", dpi=(300, 300), icc_profile=profile, exif=exif.tobytes())
    _, written = again(data, "a.png", white=65535)
    with Image.open(io.BytesIO(written)) as image:
        assert image.info["icc_profile"] == profile
        assert image.info["dpi"] == pytest.approx((300, 300), abs=0.1)
        assert image.getexif()[ExifTags.Base.Make] == "scanner"
    np.testing.assert_array_equal(imagecodecs.png_decode(written), pixels)


def test_profile_and_gamma_do_not_change_pixels() -> None:
    plain, profiled = (decode(saved(RGB, "png", **options), "a.png").pixels
                       for options in ({}, {"icc_profile": PROFILE}))  # fmt: skip
    np.testing.assert_array_equal(plain, profiled)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("deep", [False, True])
def test_exif_turns_every_depth_alike(orientation: int, deep: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(RGB, "png", exif=exif)
    wanted = decode(data, "a.png").pixels
    if deep:  # the same pixels in 16 bits, with the chunk of the other file
        at = data.index(b"eXIf") - 4
        length = int.from_bytes(data[at : at + 4], "big") + 12
        plain = bytes(imagecodecs.png_encode(RGB.astype(np.uint16) * 257))
        data = plain[:33] + data[at : at + length] + plain[33:]
    seen = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_allclose(wanted, np.moveaxis(np.asarray(seen), 2, 0) / 255, atol=1e-6)
    np.testing.assert_allclose(decode(data, "a.png", white=65535).pixels, wanted, atol=1e-6)


def test_inks_of_a_jpeg_become_rgb_without_the_profile_of_the_inks() -> None:
    image = Image.fromarray(np.dstack([RGB, GREY // 3]), "CMYK")
    data = saved(image, "jpeg", quality=98, icc_profile=PROFILE)
    pixels, written = again(data, "a.jpg")
    seen = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_allclose(pixels, np.moveaxis(seen, 2, 0) / 255, atol=1e-6)
    after = Image.open(io.BytesIO(written))
    assert after.mode == "RGB"
    assert "icc_profile" not in after.info


def test_how_large_an_image_may_be_is_not_for_pillow_to_say() -> None:
    data = saved(
        Image.new("1", (15_000, 12_000), 1), "PNG"
    )  # Pillow itself reads up to 179 million
    assert n_values(data, "a.png") == 180_000_000
    pixels = open_file(data, "a.png").frames[0].pixels
    assert pixels.shape == (1, 12_000, 15_000)
    assert pixels.min() == 1


def test_the_first_picture_of_a_phone_is_the_image() -> None:
    data = saved(RGB, "mpo", save_all=True, append_images=[Image.fromarray(GREY)], quality=98)
    assert open_file(data, "phone.jpg").kind == "jpeg"
    pixels, written = again(data, "phone.jpg")
    assert pixels.shape == (3, 32, 24)
    assert Image.open(io.BytesIO(written)).format == "JPEG"


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (saved(RGB, "gif"), "is a GIF file, a format that is not read; convert it"),
        (saved(RGB, "jpeg2000"), "is a JPEG2000 file, a format"),
        (saved(RGB, "png", save_all=True, append_images=[Image.fromarray(255 - RGB)]),
         "must hold one image, but a.png holds 2"),
        (saved(GREY, "png", transparency=int(GREY[4, 4])), "must be opaque"),
        (saved(GREY.astype(np.uint16), "png", transparency=int(GREY[4, 4])), "must be opaque"),
        (saved(RGB, "png")[:300], "cannot be read as an image .*; replace the file"),
        (b"GIF89a", "cannot be read as an image"),
    ],
    ids=["gif", "jpeg 2000", "animation", "key", "16-bit key", "cut", "cut gif"],
)  # fmt: skip
def test_what_is_not_known_is_refused_by_its_cause(data: bytes, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        decode(data, "a.png", white=255)


def test_a_transparent_colour_that_no_pixel_has_hides_nothing() -> None:
    unused = min(set(range(256)) - set(GREY.ravel().tolist()))
    for pixels in (GREY, GREY.astype(np.uint16)):
        data = saved(pixels, "png", transparency=unused)
        assert decode(data, "a.png", white=255).pixels.shape == (1, 32, 24)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp", "a.webp"])
def test_float_pixels_are_not_forced_into_a_format_that_cannot_hold_them(name: str) -> None:
    with pytest.raises(InputError, match=r"cannot hold float32 pixels; .*\.tif or \.npy"):
        encode(np.zeros((1, 4, 4), np.float32), name, depth=np.dtype(np.float32))


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + zlib.crc32(kind + content).to_bytes(4)


def few_bits(bits: int, *chunks: bytes) -> bytes:
    """A grey PNG [8, 8] of all numbers of so many bits but the largest, and of no other chunks."""
    values = (np.arange(64, dtype=np.uint8) % max(1, 2**bits - 1)).reshape(8, 8)
    rows = np.unpackbits(values[:, :, None], axis=2)[:, :, -bits:].reshape(8, -1)
    lines = b"".join(b"\0" + np.packbits(row).tobytes() for row in rows)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, bits, 0, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + body


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_grey_that_means_clear_is_refused_at_every_depth(bits: int) -> None:
    plain = decode(few_bits(bits), "a.png").pixels
    unused = few_bits(bits, chunk(b"tRNS", struct.pack(">H", 2**bits - 1)))
    np.testing.assert_array_equal(decode(unused, "a.png").pixels, plain)
    for grey in range(2**bits - 1):
        clear = few_bits(bits, chunk(b"tRNS", struct.pack(">H", grey)))
        if bits < 8 or grey < 63:
            with pytest.raises(InputError, match="must be opaque"):
                decode(clear, "a.png")


def test_a_png_that_ends_in_zeros_is_refused() -> None:
    data = saved(GREY, "png")
    copied = len(data) * 3 // 4
    with pytest.raises(InputError, match=r"a\.png is damaged: a checksum of its pixels fails"):
        decode(data[:copied] + bytes(len(data) - copied), "a.png")


@pytest.mark.parametrize("deep", [False, True])
def test_what_a_png_says_of_its_colours_and_in_words_is_kept(deep: bool) -> None:
    said = [
        chunk(b"gAMA", struct.pack(">I", 45455)),
        chunk(b"cHRM", struct.pack(">8I", *range(30000, 30008))),
        chunk(b"sRGB", b"\1"),
        chunk(b"cICP", bytes([9, 16, 0, 1])),
        chunk(b"mDCV", bytes(24)),
        chunk(b"cLLI", bytes(8)),
        chunk(b"tEXt", b"Title\0a slice"),
        chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"thin")),
        chunk(b"iTXt", b"Author\0\0\0\0\0" + "Jos\u00e9".encode()),
    ]
    plain = bytes(imagecodecs.png_encode(RGB.astype(np.uint16) * 257 if deep else RGB))
    data = plain[:33] + b"".join(said) + plain[33:]
    pixels, written = again(data, "a.png", white=65535)
    for one in said:
        assert one in written
    np.testing.assert_array_equal(decode(written, "a.png", white=65535).pixels, pixels)
    with Image.open(io.BytesIO(written)) as after:
        assert (after.info["gamma"], after.info["Title"]) == (0.45455, "a slice")


@pytest.mark.parametrize("kind", ["jpeg", "webp", "mpo"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_what_others_say_of_a_picture_is_kept_but_not_how_to_turn_it(
    kind: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options: dict[str, Any] = {} if kind == "webp" else {"comment": b"of a finger"}
    if kind == "mpo":
        options |= {"save_all": True, "append_images": [Image.fromarray(GREY)]}
    data = saved(RGB, kind, exif=exif, xmp=b"<x:xmpmeta/>", **options)
    _, written = again(data, "a.webp" if kind == "webp" else "a.jpg")
    with Image.open(io.BytesIO(written)) as after:
        assert ("xmp" in after.info) == (orientation == 1 and kind != "mpo")
        assert after.info.get("comment") == (b"of a finger" if kind == "jpeg" else None)


def test_xmp_does_not_turn_what_was_turned() -> None:
    xmp = b'<x:xmpmeta xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    data = saved(RGB, "png")
    data = data[:33] + chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp) + data[33:]
    pixels, written = again(data, "a.png")
    assert pixels.shape == (3, 24, 32)
    np.testing.assert_array_equal(decode(written, "a.png").pixels, pixels)


BROKEN = {
    "no TIFF header": b"not a block of tags",
    "nothing": b"",
    "cut": b"MM\0*",
    "tags that are no numbers": b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x04six\0\0\0\0\0",
    "tags nowhere": b"MM\0*\xff\xff\xff\xf0",
}


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_exif_that_cannot_be_understood_spoils_no_pixels(kind: str, broken: str) -> None:
    exif = b"Exif\0\0" + BROKEN[broken]
    options = {"lossless": True} if kind == "webp" else {}
    data = saved(RGB, kind, exif=exif, **options)
    pixels, written = again(data, f"a.{kind}")
    np.testing.assert_array_equal(pixels, decode(saved(RGB, kind, **options), "a").pixels)
    assert decode(written, "a").pixels.shape == pixels.shape
    if broken == "no TIFF header":
        assert BROKEN[broken] in written


@pytest.mark.parametrize(
    "name", [b"eXIf", b"tEXt", b"iTXt", b"iCCP", b"pHYs", b"tIME", b"gAMA", b"prVt"]
)
def test_words_of_a_png_that_are_damaged_spoil_no_pixels(name: bytes) -> None:
    data, damaged = saved(RGB, "png"), chunk(name, b"Comment\0hello")[:-4] + b"\0\0\0\0"
    pixels, written = again(data[:33] + damaged + data[33:], "a.png")
    np.testing.assert_array_equal(pixels, np.moveaxis(RGB, 2, 0) / np.float32(255))
    assert b"hello" not in written


def test_a_png_whose_clear_colour_is_damaged_is_refused() -> None:
    damaged = chunk(b"tRNS", b"\0\1\0\2\0\3")[:-4] + b"\0\0\0\0"
    data = saved(RGB, "png")
    with pytest.raises(InputError, match=r"a\.png cannot be read"):
        decode(data[:33] + damaged + data[33:], "a.png")


@pytest.mark.parametrize("kind", ["jpeg", "png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_resolution_is_turned_with_the_picture(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    exif[ExifTags.Base.XResolution], exif[ExifTags.Base.YResolution] = 300.0, 150.0
    _, written = again(saved(RGB, kind, exif=exif, dpi=(300, 150)), f"a.{kind}")
    wanted = (150, 300) if orientation > 4 else (300, 150)
    with Image.open(io.BytesIO(written)) as after:
        assert after.info["dpi"] == pytest.approx(wanted, abs=0.1)
        seen = after.getexif()
        assert (seen[ExifTags.Base.XResolution], seen[ExifTags.Base.YResolution]) == wanted
