"""Reading and writing image files: what is kept, what is refused, and in which words."""

import io

import numpy as np
import pytest
import tifffile
from PIL import Image

from snr_ray.config import ImagesConfig
from snr_ray.errors import InputError
from snr_ray.images.formats.codec import decode, encode, open_file, stored_frames
from snr_ray.images.formats.pixels import prepare, stored_values, with_channels

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (9, 7), dtype=np.uint8)
RGB = RNG.integers(0, 256, (9, 7, 3), dtype=np.uint8)


def file(pixels: np.ndarray, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format=kind, **options)
    return out.getvalue()


def tiff(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    tifffile.imwrite(out, pixels)
    return out.getvalue()


@pytest.mark.parametrize(
    ("pixels", "name"),
    [(x, f"a.{kind}") for x in (GREY, RGB) for kind in ("png", "tif", "bmp", "npy")]
    + [(RGB, "a.webp")],  # WebP has no grey
)
def test_eight_bits_survive_a_round_trip(pixels: np.ndarray, name: str) -> None:
    data = encode(decode(file(pixels, "png"), "x.png").pixels, name, depth=np.dtype(np.uint8))
    back = decode(data, name)
    assert back.depth == np.uint8
    np.testing.assert_array_equal((back.pixels * 255).round().astype(np.uint8).squeeze(),
                                  np.moveaxis(np.atleast_3d(pixels), 2, 0).squeeze())  # fmt: skip


@pytest.mark.parametrize("name", ["a.tif", "a.npy"])
@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_deep_pixels_survive_with_their_white(name: str, dtype: type) -> None:
    stored = (RNG.random((6, 5)) * 4095).astype(dtype)
    data = tiff(stored) if name == "a.tif" else encode_npy(stored)
    decoded = decode(data, name, white=4095)
    again = encode(decoded.pixels, name, depth=decoded.depth, span=decoded.span)
    back = tifffile.imread(io.BytesIO(again)) if name == "a.tif" else np.load(io.BytesIO(again))
    assert back.dtype == dtype
    np.testing.assert_allclose(back, stored, rtol=1e-5)


def encode_npy(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, pixels)
    return out.getvalue()


def test_sixteen_bit_png_is_scaled_by_white() -> None:
    stored = (RNG.random((6, 5)) * 65535).astype(np.uint16)
    pixels = decode(file(stored, "png"), "a.png", white=65535).pixels
    np.testing.assert_allclose(pixels[0], stored / 65535, atol=1e-6)


def test_palette_and_one_bit_images_are_read_as_seen() -> None:
    palette = Image.fromarray(RGB).quantize(8)
    out = io.BytesIO()
    palette.save(out, format="png")
    expected = np.asarray(palette.convert("RGB"))
    got = decode(out.getvalue(), "a.png").pixels
    np.testing.assert_allclose(got, np.moveaxis(expected, 2, 0) / 255, atol=1e-6)
    assert set(np.unique(decode(file(GREY > 128, "png"), "b.png").pixels)) == {0.0, 1.0}


def test_opaque_alpha_is_dropped() -> None:
    opaque = np.dstack([RGB, np.full(RGB.shape[:2], 255, np.uint8)])
    assert decode(file(opaque, "png"), "a.png").pixels.shape == (3, 9, 7)


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("a.png", b"", r"a\.png is empty \(0 bytes\)"),
        ("a.png", b"not an image", r"a\.png cannot be read as an image"),
        ("a.png", file(RGB, "png")[:90], r"a\.png cannot be read as an image"),
        ("a.jpg", file(RGB, "jpeg")[:200], r"a\.jpg cannot be read as an image"),
        ("a.npy", b"\x93NUMPY", r"a\.npy cannot be read as an image"),
        ("a.png", file(np.dstack([RGB, GREY]), "png"), r"must be opaque, but a\.png"),
        ("a.png", file(GREY.astype(np.uint16) * 200, "png"), r"uint16 .*images\.white=65535"),
        ("a.tif", tiff(GREY.astype(np.float32)), r"float32 pixels have no agreed white"),
        ("a.npy", encode_npy(np.zeros((4, 4, 7), np.uint8)), r"but a\.npy is \[4, 4, 7\]"),
        ("a.npy", encode_npy(np.zeros(4, np.uint8)), r"but a\.npy is"),
    ],
    ids=["empty", "garbage", "cut png", "cut jpeg", "cut npy", "alpha", "16 bit", "float",
         "7 channels", "1d"],
)  # fmt: skip
def test_bad_file_gets_a_sentence(name: str, data: bytes, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        decode(data, name)


def test_npy_with_pickle_is_refused() -> None:
    out = io.BytesIO()
    np.save(out, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="cannot be read"):
        decode(out.getvalue(), "a.npy")


@pytest.mark.parametrize("suffix", ["npy", "tif"])
def test_a_white_that_is_that_of_other_files_is_refused(suffix: str) -> None:
    def stored(brightest: float, kind: type) -> bytes:
        values = np.full((1, 9, 9), brightest / 10, np.float32)
        return encode(values, f"a.{suffix}", depth=np.dtype(kind), span=(0, 10))

    data = stored(0.8, np.float32)
    with pytest.raises(
        InputError, match=rf"white=4095 .* a\.{suffix} holds float pixels up to 0\.8"
    ):
        decode(data, f"a.{suffix}", white=4095)
    assert decode(data, f"a.{suffix}", white=2).pixels.max() == pytest.approx(0.4)
    for nearly_empty in (stored(0, np.float32), stored(1, np.uint16), stored(5, np.float32)):
        decode(nearly_empty, f"a.{suffix}", white=4095)
    decode(stored(0.0002, np.float32), f"a.{suffix}", white=0.04)


def test_nan_is_refused() -> None:
    with pytest.raises(InputError, match=r"must be finite, but a\.tif holds NaN"):
        decode(tiff(np.full((4, 4), np.nan, np.float32)), "a.tif", white=1)


def test_float_reconstruction_may_leave_the_range_but_a_clean_image_may_not() -> None:
    decoded = decode(tiff(np.linspace(-0.5, 1.5, 64, dtype=np.float32).reshape(8, 8)), "a.tif",
                     white=1)  # fmt: skip
    assert decoded.pixels.min() < 0
    with pytest.raises(InputError, match=r"Clean pixels must lie between 0 and white, but a\.tif"):
        prepare(decoded.pixels, ImagesConfig(size=8), "a.tif")


def test_grey_is_bt601_luma() -> None:
    pixels = np.moveaxis(RGB, 2, 0).astype(np.float32) / 255
    expected = np.asarray(Image.fromarray(RGB).convert("L")) / 255
    np.testing.assert_allclose(with_channels(pixels, 1)[0], expected, atol=1 / 255)


@pytest.mark.parametrize("shape", [(3, 40, 60), (1, 60, 40), (3, 9, 9), (1, 28, 28)])
def test_prepare_gives_the_size_asked_for(shape: tuple[int, ...]) -> None:
    pixels = RNG.random(shape, dtype=np.float32)
    out = prepare(pixels, ImagesConfig(size=28, channels=3), "x")
    assert out.shape == (3, 28, 28)
    assert out.dtype == np.float32
    assert 0 <= out.min() <= out.max() <= 1


def test_crop_keeps_pixels_and_refuses_small_images() -> None:
    pixels = RNG.random((1, 20, 30), dtype=np.float32)
    config = ImagesConfig(size=16, fit="crop")
    np.testing.assert_array_equal(prepare(pixels, config, "x")[0], pixels[0, 2:18, 7:23])
    with pytest.raises(InputError, match=r"but small is 10x30; use images\.fit=resize"):
        prepare(pixels[:, :10], config, "small")


def several(kind: str) -> bytes:
    """A file with two images."""
    out = io.BytesIO()
    frames = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]
    frames[0].save(out, format=kind, save_all=True, append_images=frames[1:])
    return out.getvalue()


@pytest.mark.parametrize("kind", ["tiff", "webp"])
def test_file_with_several_images_is_refused(kind: str) -> None:
    with pytest.raises(InputError, match=r"must hold one image, but a\.\w+ holds 2; split it"):
        decode(several(kind), "a.tif" if kind == "tiff" else "a.png")


def test_orientation_tag_is_applied() -> None:
    image = Image.fromarray(RGB)
    exif = image.getexif()
    exif[0x0112] = 6  # turn by 90 degrees to be seen upright
    out = io.BytesIO()
    image.save(out, format="png", exif=exif)
    expected = np.moveaxis(np.rot90(RGB, -1), 2, 0) / 255
    np.testing.assert_allclose(decode(out.getvalue(), "a.png").pixels, expected, atol=1e-6)


def test_noise_that_left_the_window_does_not_come_back_but_bone_does() -> None:
    data = io.BytesIO()
    np.save(data, np.array([[-1400, 700, 900, 3000]], np.float32))  # noisy air, tissue, bone, tooth
    file = open_file(data.getvalue(), "a.npy", window=(-1000.0, 400.0))
    cleaned = (np.array([[-1000, 60, 390, 400]], np.float32) + 1000) / 1400
    written = np.load(io.BytesIO(file.encode([cleaned[None]], "a.npy")))
    assert written[0, :2].tolist() == pytest.approx([-1000, 60], abs=1e-3)
    assert 390 < written[0, 2] < 900
    assert written[0, 3] == pytest.approx(3000, abs=1e-3)


@pytest.mark.parametrize("depth", [np.uint8, np.uint16, np.int64, np.uint64])
def test_white_is_the_largest_number_not_the_smallest(depth: type) -> None:
    largest = np.iinfo(depth).max
    pixels = np.array([[[0.5, 1.0, 1.5]]], np.float32)
    values = stored_values(pixels, np.dtype(depth), (0.0, float(largest)), clip=False)
    assert values[0, 1:].tolist() == [largest] * 2
    assert values[0, 0] == pytest.approx(largest / 2, rel=0.01)


@pytest.mark.parametrize("shape", [(9, 7), (9, 7, 1), (9, 7, 3), (1, 7, 1)])
@pytest.mark.parametrize("dtype", [bool, np.uint8, ">u2", "<u2", np.int32, np.float16, ">f4"])
def test_an_array_comes_back_as_it_was(shape: tuple[int, ...], dtype: object) -> None:
    stored = (RNG.integers(0, 256, shape) > 127 if dtype is bool else
              RNG.integers(0, 200, shape)).astype(dtype)  # fmt: skip
    data = encode_npy(stored)
    opened = open_file(data, "a.npy", white=255)
    pixels = opened.frames[0].pixels
    kept = dict(enumerate(stored_frames(data, "a.npy")))
    for written in (opened.encode([pixels], "a.npy"), opened.encode([pixels], "a.npy", kept=kept)):
        back = np.load(io.BytesIO(written))
        assert back.dtype == stored.dtype
        np.testing.assert_allclose(back.astype(float), stored.astype(float), atol=0.1)
        assert back.shape == shape
