"""PNG, JPEG, BMP and WebP <-> stored pixels, by Pillow; 16-bit colour PNG by imagecodecs.

Palettes, CMYK and the turn that EXIF asks for are resolved. Pixels are taken as they are stored: no
gamma, no conversion between colour profiles; the profile stays in the file.
"""

import functools
import io
from collections.abc import Sequence
from typing import Any

import imagecodecs
import numpy as np
from PIL import ExifTags, Image, ImageOps

from snr_ray.errors import InputError
from snr_ray.images.pixels import Contents, Made, Stored, Values, turn, without_alpha

# Pillow warns of large images and refuses larger ones; how large is too large, memory decides.
Image.MAX_IMAGE_PIXELS = None
FORMATS = ("PNG", "JPEG", "MPO", "BMP", "WEBP")
JPEG_QUALITY = 95
"""Without chroma subsampling, too."""
_ORIENTATION = ExifTags.Base.Orientation


def read(data: bytes, name: str) -> Contents:
    """The picture of a file; of a phone's file of several (MPO), the first.

    Raises:
        InputError: for an animation, transparent pixels, or a format or mode that is not known.
    """
    with Image.open(io.BytesIO(data)) as file:
        kind = str(file.format)
        if kind not in FORMATS:
            raise InputError(
                f"{name} is a {kind} file, a format that is not read; convert it to PNG or TIFF."
            )
        frames = getattr(file, "n_frames", 1)
        if frames > 1 and kind != "MPO":
            raise InputError(f"A file must hold one image, but {name} holds {frames}; split it.")
        exif = file.getexif()
        kept: dict[str, Any] = {
            key: file.info[key] for key in ("dpi", "icc_profile") if key in file.info
        }
        turned = exif.get(_ORIENTATION, 1) != 1
        if kind == "PNG" and data[24] == 16 and data[25] != 0:
            values = _deep_png(data, name)
            if turned:
                values = turn(values, exif[_ORIENTATION])
        else:
            image: Image.Image = ImageOps.exif_transpose(file) if turned else file
            values = _values(image, name)
            if file.mode == "CMYK":
                kept.pop("icc_profile", None)  # of inks
    exif.pop(_ORIENTATION, None)
    if len(exif):
        kept["exif"] = exif.tobytes()
    kind = "JPEG" if kind == "MPO" else kind

    return Contents([Stored(values)], functools.partial(_rewrite, kind, kept))


def write(values: Values, kind: str, **kept: Any) -> bytes:
    """A file of pixels [H, W] or [H, W, 3].

    Args:
        values: uint8; PNG also takes uint16.
        kind: PNG, JPEG, BMP or WEBP.
        kept: dpi, icc_profile and exif.

    Raises:
        InputError: if the format cannot hold such pixels.
    """
    deep = kind == "PNG" and values.dtype == np.uint16
    if values.dtype != np.uint8 and not deep:
        raise InputError(
            f"{kind} cannot hold {values.dtype.name} pixels; give the image a name that ends in "
            ".tif or .npy."
        )
    if deep and values.ndim == 3:
        return _deep_png_bytes(values, kept)
    options: dict[str, dict[str, Any]] = {
        "JPEG": {"quality": JPEG_QUALITY, "subsampling": 0},
        "WEBP": {"lossless": True, "exact": True},
    }
    if kind == "BMP":
        kept.pop("exif", None)
    out = io.BytesIO()
    Image.fromarray(values).save(out, format=kind, **options.get(kind, {}), **kept)
    return out.getvalue()


def _deep_png_bytes(values: Values, kept: dict[str, Any]) -> bytes:
    """16-bit colour, which Pillow cannot write, with what Pillow writes of `kept` into a small PNG:
    its chunks come after the header of 25 bytes, behind the signature of 8.

    Source: PNG specification, section 5: each is a length, a type, so many bytes and a checksum.
    """
    pixels = bytes(imagecodecs.png_encode(np.ascontiguousarray(values)))
    out = io.BytesIO()
    Image.new("RGB", (1, 1)).save(out, format="PNG", **kept)
    other, at, chunks = out.getvalue(), 33, b""
    while at < len(other):
        end = at + 12 + int.from_bytes(other[at : at + 4])
        if other[at + 4 : at + 8] in (b"iCCP", b"pHYs", b"eXIf"):
            chunks += other[at:end]
        at = end
    return pixels[:33] + chunks + pixels[33:]


def _rewrite(kind: str, kept: dict[str, Any], frames: Sequence[Values], made: Made) -> bytes:
    return write(frames[0], kind, **kept)


def _values(image: Image.Image, name: str) -> Values:
    clear = "transparency" in image.info
    if image.mode == "P" or (image.mode in ("L", "RGB") and clear):
        alpha = "LA" if image.mode == "L" else "RGBA"
        image = image.convert(alpha if clear else "RGB")
    if image.mode in ("LA", "RGBA", "PA"):
        full = image.convert("RGBA") if image.mode == "PA" else image
        return without_alpha(np.asarray(full), name)
    if image.mode == "CMYK":
        image = image.convert("RGB")
    if image.mode not in ("1", "L", "RGB") and not image.mode.startswith("I"):
        raise InputError(
            f"{name} holds pixels of the kind {image.mode}, which are not read; convert them to "
            "grey or RGB."
        )
    values = np.asarray(image)
    if clear and np.any(values == image.info["transparency"]):  # a grey value that means clear
        without_alpha(np.dstack([values, np.where(values == image.info["transparency"], 0, 1)]),
                      name, opaque=1)  # fmt: skip
    return values


def _deep_png(data: bytes, name: str) -> Values:
    """16-bit colour, or grey with alpha, which Pillow cuts to 8 bits."""
    values: Values = imagecodecs.png_decode(data)
    return without_alpha(values, name) if values.shape[2] in (2, 4) else values
