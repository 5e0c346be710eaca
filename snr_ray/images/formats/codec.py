"""Image files <-> float32 arrays [C, H, W]: the format of a file by its first bytes, and back.

One module for each format says what its numbers mean (`raster`, `tiff`, `dicom`, `nifti`,
`omezarr`), `pixels` makes images of them. What would be read silently wrong raises an InputError
that says so.
"""

import functools
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from posixpath import splitext
from types import MappingProxyType
from typing import Any

import numpy as np

from snr_ray.errors import InputError, check
from snr_ray.images.formats import dicom, nifti, omezarr, raster, tiff, zarrfolder
from snr_ray.images.formats.errors import unreadable
from snr_ray.images.formats.pixels import (
    Array,
    Contents,
    Decoded,
    Made,
    Span,
    Stored,
    Values,
    check_white,
    scale,
    stored_values,
)

KINDS = {
    ".png": "png",
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".tif": "tiff",
    ".tiff": "tiff",
    ".bmp": "bmp",
    ".webp": "webp",
    ".npy": "npy",
    ".dcm": "dicom",
    ".dicom": "dicom",
    ".ima": "dicom",
    ".nii": "nifti",
    ".nii.gz": "nifti",
    zarrfolder.SUFFIX: "zarr",
}
SUFFIXES = tuple(KINDS)
NOT_SAID = Made()
NONE_KEPT: Mapping[int, Values] = MappingProxyType({})
HEAD_BYTES = 132
"""Bytes that say what a file is."""
NOT_PNG = {"tiff": ".tif", "dicom": ".dcm", "npy": ".npy"}
"""Formats that are recognised, and whose pixels may be no PNG; with the suffix of a result."""
_HEADS = (
    ("dicom", rb".{128}DICM"),  # before it stands what one likes, a TIFF header too
    ("png", rb"\x89PNG\r\n\x1a\n"),
    ("jpeg", rb"\xff\xd8\xff"),
    ("tiff", rb"II[*+]\0|MM\0[*+]"),
    ("bmp", rb"BM.{4}\0{4}"),
    ("webp", rb"RIFF.{4}WEBP"),
    ("npy", rb"\x93NUMPY"),
    ("zarr", zarrfolder.HEAD),
)


@dataclass(frozen=True)
class OpenFile:
    """A file with one or several pictures, slices or pages, that can be written back as it was."""

    name: str
    kind: str
    """Its format, one of KINDS."""
    frames: list[Decoded]
    write: Callable[[Sequence[Values], Made], bytes]
    """Of `Contents`."""

    def encode(
        self,
        frames: Sequence[Array],
        name: str,
        *,
        clip: bool = True,
        made: Made = NOT_SAID,
        kept: Mapping[int, Values] = NONE_KEPT,
    ) -> bytes:
        """The bytes of a file like this one, with other pixels.

        Args:
            frames: [C, H, W] each, in the order of `self.frames` and of their shapes.
            name: of the result; its suffix says the format, which is the file's own if it has
                none. Metadata is kept where the format stays.
            clip: cut pixels to [0, 1], the window where there is one; what of the file lay beyond
                a window stays where the pixels are at its end.
            made: what is said of it in a DICOM result, whose identifiers follow from the job and
                the old ones, so that the same job writes the same bytes.
            kept: stored values of frames that stay as they are, by their number, of
                `stored_frames`.

        Raises:
            InputError: if the format of `name` cannot hold the pixels, or its metadata is such that
                it cannot be written again.
        """
        values = [
            kept[k]
            if k in kept
            else stored_values(pixels, old.depth, old.span, clip=clip, beyond=old.beyond)
            for k, (pixels, old) in enumerate(zip(frames, self.frames, strict=True))
        ]
        kind = KINDS.get(split(name)[1].lower(), self.kind)
        if kind != self.kind:
            return _write(values, kind, name)
        try:
            return self.write(values, made)
        except InputError:
            raise
        except Exception as error:  # tags that their own writers refuse
            raise InputError(
                f"{name} cannot be written with the metadata of its input "
                f"({' '.join(str(error).split())[:200]}); give it a name that ends in .npy, or "
                "mend the input."
            ) from None


def recognise(head: bytes) -> str | None:
    """The format of a file by its first bytes: one of KINDS, or None."""
    return next((kind for kind, start in _HEADS if re.match(start, head, re.DOTALL)), None)


def split(name: str) -> tuple[str, str]:
    """A name without its suffix, and the suffix; that of packed files is the longer one."""
    stem, suffix = splitext(name)
    if suffix.lower() == ".gz" and splitext(stem)[1].lower() + ".gz" in KINDS:
        stem, inner = splitext(stem)
        suffix = inner + suffix
    return stem, suffix


def open_file(
    data: bytes,
    name: str,
    *,
    white: float | None = None,
    window: Span | None = None,
    tensors: bool = False,
) -> OpenFile:
    """Read all pictures of a file.

    Args:
        data: the file's bytes; PNG, JPEG, TIFF, BMP, WebP, NPY ([H, W] or [H, W, C]), DICOM or
            NIfTI, or an OME-Zarr folder as `zarrfolder.pack` gives it.
        name: used in errors, and for the format of what does not tell it by its first bytes.
        white: the stored value that means 1.0, for 16-bit and float pixels.
        window: stored values that mean 0.0 and 1.0, for Hounsfield units; those outside are cut.
        tensors: of `scale`.

    Raises:
        InputError: if the file is empty, unreadable, transparent, or its pixels have no known
            range.
    """
    kind, contents = _contents(data, name)
    options: dict[str, Any] = {"white": white, "window": window, "tensors": tensors}
    frames = [scale(stored, name, **options) for stored in contents.frames]
    check(
        bool(frames),
        f"An image file must hold pixels, but {name} holds no picture; replace the file.",
    )
    if white is not None and not tensors:
        check_white(frames, name, white)
    return OpenFile(name, kind, frames, contents.write)


def stored_frames(data: bytes, name: str) -> list[Values]:
    """The values of all pictures of a file, as `OpenFile.encode` keeps them: [H, W] or [H, W, 3].
    Raises as `open_file`."""
    values = [stored.values for stored in _contents(data, name)[1].frames]
    return [v[:, :, 0] if v.ndim == 3 and v.shape[2] == 1 else v for v in values]


def _contents(data: bytes, name: str) -> tuple[str, Contents]:
    """The format of a file and what is in it."""
    if not data:
        raise InputError(f"An image file must hold pixels, but {name} is empty (0 bytes).")
    kind = recognise(data[:HEAD_BYTES]) or KINDS.get(split(name)[1].lower(), "")
    try:
        contents = _READERS.get(kind, raster.read)(data, name)
    except InputError:
        raise
    except Exception as error:  # decoders raise anything on damaged bytes
        raise unreadable(name, error, "as an image") from None
    return kind, contents


def decode(
    data: bytes, name: str, *, white: float | None = None, window: Span | None = None
) -> Decoded:
    """The picture of a file that holds one; arguments and errors as of `open_file`."""
    return only(open_file(data, name, white=white, window=window).frames, name)


def only(frames: list[Decoded], name: str) -> Decoded:
    """The picture of a file that holds one. Raises InputError for a stack."""
    if len(frames) != 1:
        raise InputError(f"A file must hold one image, but {name} holds {len(frames)}; split it.")
    return frames[0]


def encode(
    pixels: Array, name: str, *, depth: np.dtype, span: Span | None = None, clip: bool = True
) -> bytes:
    """File bytes of pixels [C, H, W] in the format of `name` and given depth.

    `clip` cuts them to [0, 1] first; formats of integers need that.
    `span` says which stored values mean 0 and 1; by default those are 0 and 1, or 255 of integers.
    JPEG, BMP and WebP hold 8 bits; JPEG is written at quality 95 without chroma subsampling.
    """
    values = stored_values(pixels, depth, span, clip=clip)
    return _write([values], KINDS.get(split(name)[1].lower(), "png"), name)


def output_name(name: str, *, tensors: bool, file: bool, head: bytes = b"") -> str:
    """The name under which the result of an image is written: its own wherever possible.

    Args:
        name: id of the image.
        tensors: it is no file; its pixels become TIFF.
        file: the id is the name of a file, whose format is kept even if no suffix tells it.
        head: first bytes of what has neither such a name nor a suffix; it becomes PNG, or what it
            is if PNG cannot hold that.
    """
    stem, suffix = split(name)
    known = suffix.lower() in KINDS
    if tensors:
        return (stem if known else name) + ".tif"
    return name if known or file else name + NOT_PNG.get(recognise(head) or "", ".png")


def _write(values: Sequence[Values], kind: str, name: str) -> bytes:
    if kind == "tiff":
        return tiff.write(values)
    if len(values) > 1 or kind in ("dicom", "nifti", "zarr"):
        what = f"{len(values)} pictures" if len(values) > 1 else f"what was not {kind.upper()}"
        raise InputError(f"{name} cannot hold {what}; give the image a name that ends in .tif.")
    return _npy(values[0]) if kind == "npy" else raster.write(values[0], kind.upper())


def _read_npy(data: bytes, name: str) -> Contents:
    values = np.load(io.BytesIO(data), allow_pickle=False)
    rewrite = functools.partial(_rewrite_npy, values.shape, values.dtype)
    return Contents([Stored(values)], rewrite)


def _rewrite_npy(
    shape: tuple[int, ...], depth: np.dtype, frames: Sequence[Values], made: Made
) -> bytes:
    """An array like the one read: results are [H, W] where that is [H, W, 1], and of 8 bits where
    it is bool."""
    (values,) = frames
    if depth.kind == "b" and values.dtype.kind != "b":
        values = values > 127
    return _npy(values.astype(depth, copy=False).reshape(shape))


def _npy(values: Values) -> bytes:
    out = io.BytesIO()
    np.save(out, values, allow_pickle=False)
    return out.getvalue()


_READERS = {
    "nifti": nifti.read,
    "tiff": tiff.read,
    "dicom": dicom.read,
    "npy": _read_npy,
    "zarr": omezarr.read,
}
