"""Image files <-> float32 arrays [C, H, W] in [0, 1], and the sizes and channels a run asks for.

8-bit pixels are divided by 255. 16-bit and float pixels have no agreed white, so they need the
setting images.white; CT slices (DICOM) are in Hounsfield units and need images.window. Anything
that would be read silently wrong (transparency, NaN, clean pixels beyond white) raises an
InputError that says so.
"""

import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from posixpath import splitext

import numpy as np
import numpy.typing as npt
import tifffile
from PIL import ExifTags, Image, ImageOps

from snr_ray.config import ImagesConfig, InputError

Array = npt.NDArray[np.float32]

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".npy", ".dcm", ".dicom",
            ".ima")  # fmt: skip
HEAD_BYTES = 132
"""Bytes that say what a file is."""
_HEADS = (
    ("png", rb"\x89PNG\r\n\x1a\n"),
    ("jpeg", rb"\xff\xd8\xff"),
    ("tiff", rb"II[*+]\0|MM\0[*+]"),
    ("bmp", rb"BM.{4}\0{4}"),
    ("webp", rb"RIFF.{4}WEBP"),
    ("npy", rb"\x93NUMPY"),
    ("dicom", rb".{128}DICM"),
)
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as Pillow and scikit-image


Span = tuple[float, float]
"""Stored values that mean 0 and 1."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """Pixels [C, H, W] float32 of one image, white at 1; the depth and span they were stored in."""

    pixels: Array
    depth: np.dtype
    span: Span


def recognise(head: bytes) -> str | None:
    """The format of a file by its first bytes: png, jpeg, tiff, bmp, webp, npy or dicom."""
    return next((kind for kind, start in _HEADS if re.match(start, head, re.DOTALL)), None)


def decode(
    data: bytes, name: str, *, white: float | None = None, window: Span | None = None
) -> Decoded:
    """Read one image file.

    Args:
        data: the file's bytes; PNG, JPEG, TIFF, BMP, WebP, NPY ([H, W] or [H, W, C]) or DICOM.
        name: used for the format (suffix) and in errors.
        white: the stored value that means 1.0, for 16-bit and float pixels.
        window: Hounsfield units that mean 0.0 and 1.0, for DICOM; those outside are clipped.

    Raises:
        InputError: if the file is empty, unreadable, transparent, or its pixels have no known
            range.
    """
    if not data:
        raise InputError(f"An image file must hold pixels, but {name} is empty (0 bytes).")
    try:
        stored = _read(data, splitext(name)[1].lower(), name)
    except InputError:
        raise
    except Exception as error:  # decoders raise anything on damaged bytes
        reason = " ".join(re.sub(r"<[^>]*>", name, str(error)).split()) or type(error).__name__
        raise InputError(
            f"{name} cannot be read as an image ({reason}); replace the file."
        ) from None
    if not name.lower().endswith(".dcm"):
        return scale(stored, name, white=white)
    if window is None:
        raise InputError(
            f"A DICOM slice is in Hounsfield units, and {name} is one; say which of them mean "
            "black and white, for example --set images.window=[-1000,1000]."
        )
    return scale(
        np.clip(stored, *window) - window[0], name, white=window[1] - window[0], span=window
    )


@dataclass(frozen=True)
class OpenFile:
    """A file with one or several pictures, slices or pages, that can be written back as it was."""

    name: str
    frames: list[Decoded]

    def encode(
        self, frames: Sequence[Array], name: str, *, clip: bool = True, job: str = ""
    ) -> bytes:
        """The bytes of a file like this one, with other pixels.

        Args:
            frames: [C, H, W] each, in the order of `self.frames` and of their shapes.
            name: of the result; its suffix says the format.
            clip: cut pixels to [0, 1] first; formats of integers need that.
            job: what made the pixels; identifiers of the result follow from it and the old ones,
                so that the same job writes the same bytes.
        """
        (pixels,), (old,) = frames, self.frames
        return encode(pixels, name, depth=old.depth, span=old.span, clip=clip)


def open_file(
    data: bytes, name: str, *, white: float | None = None, window: Span | None = None
) -> OpenFile:
    """Read all pictures of a file; arguments and errors as of `decode`."""
    return OpenFile(name, [decode(data, name, white=white, window=window)])


def scale(
    stored: npt.NDArray[np.generic],
    name: str,
    *,
    white: float | None = None,
    span: Span | None = None,
) -> Decoded:
    """Stored pixels [H, W] or [H, W, C] to float32 [C, H, W], white at 1. Raises InputError.

    Reconstructions may leave [0, 1]; only clean images must not (see `prepare`). `span` is what
    the result says of where they were stored; by default 0 to white.
    """
    depth = stored.dtype
    if stored.dtype.kind not in "buif":
        raise InputError(f"Pixels must be numbers, but {name} holds {stored.dtype.name}.")
    if stored.dtype == bool:
        stored = stored.astype(np.uint8) * 255
    if stored.ndim == 2:
        stored = stored[:, :, None]
    if stored.ndim != 3 or stored.shape[2] not in (1, 3) or 0 in stored.shape:
        raise InputError(
            f"An image must be [H, W], [H, W, 1] or [H, W, 3], but {name} is {list(stored.shape)}."
        )
    if stored.dtype == np.uint8:
        top = 255.0
    elif white is None:
        raise InputError(
            f"{stored.dtype.name} pixels have no agreed white, and {name} has them; "
            "say which stored value means 1.0, for example --set images.white=65535."
        )
    else:
        top = white
    pixels = np.ascontiguousarray(stored.transpose(2, 0, 1), np.float32) / np.float32(top)
    if depth.kind == "f" and not np.isfinite(pixels).all():
        raise InputError(f"Pixels must be finite, but {name} holds NaN or infinity.")
    return Decoded(pixels, depth, span or (0.0, top))


def encode(
    pixels: Array, name: str, *, depth: np.dtype, span: Span | None = None, clip: bool = True
) -> bytes:
    """File bytes of pixels [C, H, W] in the format of `name` and given depth.

    `clip` cuts them to [0, 1] first; formats of integers need that.
    `span` says which stored values mean 0 and 1; by default those are 0 and 1, or 255 of integers.
    JPEG, BMP and WebP hold 8 bits; JPEG is written at quality 95 without chroma subsampling.
    """
    suffix = splitext(name)[1].lower()
    image = np.moveaxis(np.clip(pixels, 0, 1) if clip else pixels, 0, 2)
    low, high = span or (0.0, 1.0 if depth.kind == "f" else 255.0)
    stored = image * np.float32(high - low) + np.float32(low)
    if depth.kind == "f":
        stored = stored.astype(depth)
    else:
        stored = np.round(stored).astype(np.uint8 if depth.kind == "b" else depth)
    if stored.shape[2] == 1:
        stored = stored[:, :, 0]
    out = io.BytesIO()
    if suffix == ".npy":
        np.save(out, stored, allow_pickle=False)
    elif suffix in (".tif", ".tiff"):
        tifffile.imwrite(out, stored, photometric="rgb" if stored.ndim == 3 else "minisblack")
    else:
        options = {"quality": 95, "subsampling": 0} if suffix in (".jpg", ".jpeg") else {}
        if suffix == ".webp":
            options = {"lossless": True}
        kind = {"jpg": "jpeg", "": "png"}.get(suffix[1:], suffix[1:])
        Image.fromarray(stored).save(out, format=kind, **options)
    return out.getvalue()


def with_channels(pixels: Array, channels: int) -> Array:
    """[..., C, H, W] as grey (BT.601 luma) or as RGB (grey repeated)."""
    if channels == pixels.shape[-3]:
        return pixels
    if channels == 1:
        return np.einsum("c,...chw->...hw", LUMA, pixels)[..., None, :, :]
    return np.repeat(pixels, channels, axis=-3)


def prepare(pixels: Array, config: ImagesConfig, name: str) -> Array:
    """A clean image [C, H, W] as the run wants it: [channels, size, size] float32 in [0, 1].

    Raises:
        InputError: if pixels leave [0, 1]; with images.fit=crop, if the image is smaller than
            images.size.
    """
    low, high = float(pixels.min()), float(pixels.max())
    if low < 0 or high > 1:
        raise InputError(
            f"Clean pixels must lie between 0 and white, but {name} spans {low:g} to {high:g} "
            "times white; set images.white to the largest stored value."
        )
    pixels = with_channels(pixels, config.channels)
    size, (height, width) = config.size, pixels.shape[1:]
    if config.fit == "crop" and min(height, width) < size:
        raise InputError(
            f"images.fit=crop needs images of at least {size}x{size} pixels, but {name} is "
            f"{height}x{width}; use images.fit=resize."
        )
    if config.fit == "resize" and min(height, width) != size:
        factor = size / min(height, width)
        shape = (max(size, round(width * factor)), max(size, round(height * factor)))
        resized = [
            np.asarray(Image.fromarray(channel).resize(shape, Image.Resampling.BICUBIC))
            for channel in pixels
        ]
        pixels = np.clip(np.stack(resized), 0, 1)  # bicubic overshoots at edges
    top, left = (pixels.shape[1] - size) // 2, (pixels.shape[2] - size) // 2
    return np.ascontiguousarray(pixels[:, top : top + size, left : left + size], np.float32)


def _read(data: bytes, suffix: str, name: str) -> npt.NDArray[np.generic]:
    if suffix == ".npy":
        return np.load(io.BytesIO(data), allow_pickle=False)
    if suffix == ".dcm":
        return _read_dicom(data, name)
    if suffix in (".tif", ".tiff"):
        # Pillow clips 16-bit and float TIFF on conversion; tifffile keeps them.
        stored = _read_tiff(data, name)
        if stored is not None:
            return stored
    with Image.open(io.BytesIO(data)) as file:
        frames = getattr(file, "n_frames", 1)
        if frames > 1:
            raise InputError(f"A file must hold one image, but {name} holds {frames}; split it.")
        turned = file.getexif().get(ExifTags.Base.Orientation, 1) != 1
        image: Image.Image = ImageOps.exif_transpose(file) if turned else file
        if image.mode == "P" or (image.mode in ("L", "RGB") and "transparency" in image.info):
            image = image.convert("RGBA" if "transparency" in image.info else "RGB")
        if image.mode in ("LA", "RGBA", "PA", "La", "RGBa"):
            full = np.asarray(image.convert("LA" if image.mode in ("LA", "La") else "RGBA"))
            return _without_alpha(full, name)
        if image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
            image = image.convert("RGB")
        return np.asarray(image)


def _read_dicom(data: bytes, name: str) -> npt.NDArray[np.generic]:
    """Hounsfield units of a CT slice: stored values by its rescale slope and intercept."""
    try:
        import pydicom
        from pydicom.pixels import apply_rescale
    except ImportError:
        raise InputError(
            f"Reading DICOM needs pydicom, and {name} is one; pip install 'snr-ray[dicom]'."
        ) from None
    with warnings.catch_warnings():  # files of older scanners break rules that do not matter here
        warnings.simplefilter("ignore")
        slice_ = pydicom.dcmread(io.BytesIO(data))
        if slice_.get("Modality") != "CT" or "RescaleSlope" not in slice_:
            raise InputError(
                f"A DICOM file must be a CT slice in Hounsfield units, but {name} is of modality "
                f"{slice_.get('Modality', 'unknown')}; convert it to TIFF."
            )
        return np.asarray(apply_rescale(slice_.pixel_array, slice_), np.float32)


def _read_tiff(data: bytes, name: str) -> npt.NDArray[np.generic] | None:
    """Stored pixels of a TIFF; None for palettes, which Pillow resolves."""
    with tifffile.TiffFile(io.BytesIO(data), name=name) as file:
        if len(file.pages) > 1:
            raise InputError(
                f"A file must hold one image, but {name} holds {len(file.pages)}; split it."
            )
        page = file.pages[0]
        if page.photometric == tifffile.PHOTOMETRIC.PALETTE:
            return None
        stored = page.asarray()
        if stored.ndim == 3 and page.planarconfig == tifffile.PLANARCONFIG.SEPARATE:
            stored = np.moveaxis(stored, 0, 2)
        if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE and stored.dtype.kind == "u":
            stored = np.iinfo(stored.dtype).max - stored
    return (
        _without_alpha(stored, name) if stored.ndim == 3 and stored.shape[2] in (2, 4) else stored
    )


def _without_alpha(stored: npt.NDArray[np.generic], name: str) -> npt.NDArray[np.generic]:
    alpha = stored[:, :, -1]
    opaque = 1.0 if alpha.dtype.kind == "f" else np.iinfo(alpha.dtype.name).max
    if np.any(alpha != opaque):
        raise InputError(
            f"An image must be opaque, but {name} has transparent pixels; "
            "flatten it on a background first."
        )
    return stored[:, :, :-1]
