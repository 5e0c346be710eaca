"""PNG, JPEG, BMP and WebP <-> stored pixels, by Pillow; 16-bit colour PNG by imagecodecs.

Palettes, CMYK and the turn that EXIF asks for are resolved. Pixels are taken as they are stored: no
gamma, no conversion between colour profiles; the profile stays in the file.
"""

import contextlib
import functools
import io
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import imagecodecs
import numpy as np
from PIL import ExifTags, Image, ImageFile

from snr_ray.errors import InputError
from snr_ray.images.formats.pixels import Contents, Made, Stored, Values, turn, without_alpha

# Pillow warns of large images and refuses larger ones; how large is too large, memory decides.
Image.MAX_IMAGE_PIXELS = None
FORMATS = ("PNG", "JPEG", "MPO", "BMP", "WEBP")
JPEG_QUALITY = 95
"""Without chroma subsampling, too."""
_ORIENTATION = ExifTags.Base.Orientation
_ACROSS, _DOWN = ExifTags.Base.XResolution, ExifTags.Base.YResolution
_COLOUR_CHUNKS = (b"gAMA", b"cHRM", b"sRGB", b"cICP", b"mDCV", b"cLLI")
_TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")
_HEADER_END = 33
_XMP, _RAW_PROFILE = b"XML:com.adobe.xmp", b"Raw profile type "


def read(data: bytes, name: str) -> Contents:
    """The picture of a file; of a phone's file of several (MPO), the first.

    Raises:
        InputError: for an animation, transparent pixels, or a format or mode that is not known.
    """
    data = _without_damaged_words(data)
    with Image.open(io.BytesIO(data)) as file:
        kind = str(file.format)
        if kind not in FORMATS:
            raise InputError(
                f"{name} is a {kind} file, a format that is not read; convert it to PNG or TIFF."
            )
        frames = getattr(file, "n_frames", 1)
        if frames > 1 and kind != "MPO":
            raise InputError(f"A file must hold one image, but {name} holds {frames}; split it.")
        orientation, exif = _exif(file)
        kept: dict[str, Any] = {
            key: file.info[key] for key in ("dpi", "icc_profile") if key in file.info
        }
        turned = orientation != 1
        if kind in ("JPEG", "WEBP"):  # that of MPO tells of its other pictures
            said = ("comment",) if turned else ("comment", "xmp")  # which may say how to turn
            kept |= {key: file.info[key] for key in said if key in file.info}
        if kind == "PNG":
            _check_whole(data, name)
            kept["chunks"] = _said(data, turned)
            _widen_key(file, data)
        if kind == "PNG" and data[24] == 16 and data[25] != 0:
            values = _deep_png(data, name)
        else:
            values = _values(file, name)
            if file.mode == "CMYK":
                kept.pop("icc_profile", None)  # of inks
    values = turn(values, orientation)
    if orientation in (5, 6, 7, 8) and "dpi" in kept:  # what was across is down
        kept["dpi"] = kept["dpi"][::-1]
    if exif:
        kept["exif"] = exif
    kind = "JPEG" if kind == "MPO" else kind

    return Contents([Stored(values)], functools.partial(_rewrite, kind, kept))


def _exif(file: ImageFile.ImageFile) -> tuple[int, bytes]:
    """How EXIF or XMP say to turn a picture, and EXIF as it is to be kept, of a picture upright.

    A block that cannot be understood turns nothing, and is kept as it stands.
    """
    file.load()  # pixels that are damaged are no matter of EXIF
    orientation = 1
    with contextlib.suppress(Exception):  # Pillow raises anything on damaged tags
        exif = file.getexif()
        understood = len(exif) > 0
        orientation = int(exif.pop(_ORIENTATION, 1))
        if orientation in (5, 6, 7, 8) and _ACROSS in exif and _DOWN in exif:
            exif[_ACROSS], exif[_DOWN] = exif[_DOWN], exif[_ACROSS]
        if understood:
            return orientation, exif.tobytes() if len(exif) else b""
    return orientation, file.info.get("exif", b"") if orientation == 1 else b""


def write(values: Values, kind: str, **kept: Any) -> bytes:
    """A file of pixels [H, W] or [H, W, 3].

    Args:
        values: uint8; PNG also takes uint16.
        kind: PNG, JPEG, BMP or WEBP.
        kept: dpi, icc_profile and exif; of JPEG and WebP also comment and xmp, of PNG chunks, as
            they stood in a file.

    Raises:
        InputError: if the format cannot hold such pixels.
    """
    chunks: bytes = kept.pop("chunks", b"")
    deep = kind == "PNG" and values.dtype == np.uint16
    if values.dtype != np.uint8 and not deep:
        raise InputError(
            f"{kind} cannot hold {values.dtype.name} pixels; give the image a name that ends in "
            ".tif or .npy."
        )
    if deep and values.ndim == 3:
        return _with_chunks(_deep_png_bytes(values, kept), chunks)
    options: dict[str, dict[str, Any]] = {
        "JPEG": {"quality": JPEG_QUALITY, "subsampling": 0},
        "WEBP": {"lossless": True, "exact": True},
    }
    if kind == "BMP":
        kept.pop("exif", None)
    out = io.BytesIO()
    Image.fromarray(values).save(out, format=kind, **options.get(kind, {}), **kept)
    return _with_chunks(out.getvalue(), chunks)


def _deep_png_bytes(values: Values, kept: dict[str, Any]) -> bytes:
    """16-bit colour, which Pillow cannot write, with what Pillow writes of `kept` into a small
    PNG."""
    pixels = bytes(imagecodecs.png_encode(np.ascontiguousarray(values)))
    out = io.BytesIO()
    Image.new("RGB", (1, 1)).save(out, format="PNG", **kept)
    other = _chunks(out.getvalue())
    return _with_chunks(pixels, b"".join(c for c in other if c[4:8] in (b"iCCP", b"pHYs", b"eXIf")))


def _said(data: bytes, turned: bool) -> bytes:
    """The chunks of a PNG that say what its numbers and its picture are and that Pillow does not
    write again; EXIF in texts is written as EXIF, and XMP may say how to turn what is turned."""
    left_out = (_RAW_PROFILE, _XMP) if turned else (_RAW_PROFILE,)
    return b"".join(
        chunk
        for chunk in _chunks(data)
        if chunk[4:8] in _COLOUR_CHUNKS
        or (chunk[4:8] in _TEXT_CHUNKS and not chunk[8:].startswith(left_out))
    )


def _chunks(data: bytes) -> Iterator[bytes]:
    """The chunks of a PNG after its header of 25 bytes, behind the signature of 8.

    Source: PNG specification, section 5: each is a length, a type, so many bytes and a checksum.
    """
    at = _HEADER_END
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4])
        yield data[at:end]
        at = end


def _check_whole(data: bytes, name: str) -> None:
    """Refuse a PNG whose pixels are not those that were written: Pillow does not look at checksums,
    and zeros where a copy ended are pixels to it."""
    for chunk in _chunks(data):
        if chunk[4:8] == b"IDAT" and not _is_intact(chunk):
            raise InputError(
                f"{name} is damaged: a checksum of its pixels fails; replace the file."
            )


def _without_damaged_words(data: bytes) -> bytes:
    """A file without what a PNG says beside its pixels where the checksum of that fails: Pillow
    takes the whole for no image. Names of such chunks begin with a small letter; what is clear is
    of the pixels."""
    if not data.startswith(b"\x89PNG"):
        return data
    for chunk in _chunks(data):
        if chunk[4:5].islower() and chunk[4:8] != b"tRNS" and not _is_intact(chunk):
            data = data.replace(chunk, b"")
    return data


def _is_intact(chunk: bytes) -> bool:
    return zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])


def _with_chunks(png: bytes, chunks: bytes) -> bytes:
    return png[:_HEADER_END] + chunks + png[_HEADER_END:]


def _widen_key(file: Image.Image, data: bytes) -> None:
    """Make the grey that means clear one of 8 bits, as Pillow makes pixels of 2 and 4 bits."""
    bits, colour = data[24], data[25]
    if colour == 0 and bits in (2, 4) and "transparency" in file.info:
        top = 2**bits - 1
        file.info["transparency"] = (file.info["transparency"] & top) * 255 // top


def _rewrite(kind: str, kept: dict[str, Any], frames: Sequence[Values], made: Made) -> bytes:
    return write(frames[0], kind, **kept)


def _values(image: Image.Image, name: str) -> Values:
    clear = "transparency" in image.info
    if image.mode == "P" or (image.mode in ("1", "L", "RGB") and clear):
        alpha = "LA" if image.mode in ("1", "L") else "RGBA"
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
