"""NIfTI volumes <-> slices along the third axis, with header, affine and kind of numbers kept.

    [x, y, z, ...] --slope, intercept--> slices [y, x] --...--> the same numbers, slope and header

A slice is transposed, so that x runs along rows, as in the DICOM slices that volumes are made of.
nibabel is an extra.
"""

import functools
import gzip
import math
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from snr_ray.errors import InputError
from snr_ray.images.formats.pixels import Contents, Made, Stored, Values

PACKED = b"\x1f\x8b"
FIRST_HEADER, SECOND_HEADER = 348, 540
"""Bytes of the headers of NIfTI-1 and NIfTI-2."""


def read(data: bytes, name: str) -> Contents:
    """The slices of a volume, or of each volume of a series.

    Raises:
        InputError: if its numbers are no grey values, or nibabel is not there.
    """
    try:
        import nibabel
    except ImportError:
        raise InputError(
            f"Reading NIfTI needs nibabel, and {name} is one; pip install 'snr-ray[nifti]'."
        ) from None
    packed = data[:2] == PACKED
    plain = gzip.decompress(data) if packed else data
    kind_of_file = nibabel.Nifti2Image if _is_second(plain) else nibabel.Nifti1Image
    volume = kind_of_file.from_bytes(plain)
    kind = volume.get_data_dtype()
    if kind.kind not in "iuf":
        raise InputError(f"A NIfTI volume must hold numbers, but {name} holds {kind}.")
    if len(volume.shape) < 2:
        raise InputError(f"A NIfTI volume must have slices, but {name} is {list(volume.shape)}.")
    slope, intercept = (1.0 if math.isnan(x) else float(x) for x in _scaling(volume))
    stored = np.asarray(volume.dataobj.get_unscaled())
    slices = np.moveaxis(stored.reshape(*stored.shape[:2], -1), 2, 0).swapaxes(1, 2)
    scaled = (slope, intercept) != (1.0, 0.0)
    frames = [Stored((s * slope + intercept).astype(np.float32) if scaled else s) for s in slices]
    return Contents(frames, functools.partial(_write, volume, stored, slope, intercept, packed))


def shape(data: bytes) -> tuple[int, ...]:
    """Shape of a volume, by its header alone. Raises whatever nibabel does for damaged bytes."""
    import nibabel

    start = data[:SECOND_HEADER]
    if data[:2] == PACKED:
        start = zlib.decompressobj(zlib.MAX_WBITS + 16).decompress(data, SECOND_HEADER)
    if _is_second(start):
        return nibabel.Nifti2Header(start).get_data_shape()
    return nibabel.Nifti1Header(start[:FIRST_HEADER]).get_data_shape()


def _is_second(start: bytes) -> bool:
    """Whether bytes begin as NIfTI-2 does: with the size of its header, in either byte order."""
    return SECOND_HEADER in (int.from_bytes(start[:4], "little"), int.from_bytes(start[:4], "big"))


def _scaling(volume: Any) -> tuple[float, float]:
    slope, intercept = volume.dataobj.slope, volume.dataobj.inter
    return slope, intercept


def _write(
    volume: Any,
    stored: Values,
    slope: float,
    intercept: float,
    packed: bool,
    values: Sequence[Values],
    made: Made,
) -> bytes:
    """The volume with other values in the same kind of numbers."""
    slices = np.stack([v.swapaxes(0, 1) for v in values], axis=-1).reshape(stored.shape)
    if slices.dtype != stored.dtype or (slope, intercept) != (1.0, 0.0):
        numbers = (slices.astype(np.float64) - intercept) / slope
        if stored.dtype.kind != "f":
            limits = np.iinfo(stored.dtype)
            numbers = np.clip(np.round(numbers), limits.min, limits.max)
        slices = numbers.astype(stored.dtype)
    result = type(volume)(slices, volume.affine, volume.header)
    result.header.set_slope_inter(slope, intercept)  # numbers are stored ones: not to be scaled
    data = result.to_bytes()
    return gzip.compress(data, mtime=0) if packed else data
