"""OME-Zarr images <-> slices, with axes, units, transformations, chunks and kind of numbers kept.

    archive --zarr--> [t, c, z, y, x], as its axes say --slices [y, x]--> ... --> the same array

A slice is what lies at one place of all axes but y and x: channels are pictures of their own. The
metadata of the array is written as it was read, so whatever it says of chunks, shards and codecs
holds for the result. zarr is an extra.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from snr_ray.errors import InputError
from snr_ray.images.formats import zarrfolder
from snr_ray.images.formats.pixels import Contents, Made, Stored, Values
from snr_ray.images.formats.tiff import MOST_PACKED, SMALL


def read(data: bytes, name: str) -> Contents:
    """The slices of an image, in the order of its array.

    Args:
        data: of `zarrfolder.pack`.
        name: used in errors.

    Raises:
        InputError: if it has no slices or its numbers are no grey values, or zarr is not there.
    """
    if not zarrfolder.is_archive(data):
        raise InputError(f"An OME-Zarr image must be a folder, but {name} is a file; unpack it.")
    files = zarrfolder.unpack(data)
    image = zarrfolder.image(files, name)
    array, _ = _open(files, image.path, name)
    if array.dtype.kind not in "iuf":
        raise InputError(f"An OME-Zarr image must hold numbers, but {name} holds {array.dtype}.")
    if len(image.axes) != array.ndim or 0 in array.shape:
        raise InputError(
            f"An OME-Zarr image must have pixels along each of its axes, but {name} has axes "
            f"{', '.join(image.axes)} and the shape {list(array.shape)}; write it again."
        )
    largest = max(math.prod(array.shape), math.prod(array.shards or array.chunks))
    if largest * array.dtype.itemsize > max(SMALL, MOST_PACKED * len(data)):
        raise InputError(
            f"{name} claims {list(array.shape)} pixels in chunks of {list(array.chunks)}, which "
            f"its {len(data):,} bytes cannot hold; copy the image again, with all its chunks."
        )
    try:
        stored = np.asarray(array[...])
    except Exception as error:  # codecs raise anything on damaged bytes
        raise _undecoded(name, error) from None
    stored = stored.astype(stored.dtype.newbyteorder("="), copy=False)
    places = _places(image.axes)
    moved = np.moveaxis(stored, places, (-2, -1))
    frames = [Stored(slice_) for slice_ in moved.reshape(-1, *moved.shape[-2:])]
    kept = {key: value for key, value in files.items() if _is_metadata(key)}
    return Contents(frames, functools.partial(_write, kept, image.path, places, moved.shape))


def _write(
    kept: dict[str, bytes],
    path: str,
    places: tuple[int, int],
    shape: tuple[int, ...],
    values: Sequence[Values],
    made: Made,
) -> bytes:
    """The image with other values, encoded as its metadata says."""
    array, held = _open(kept, path, path)
    array[...] = np.moveaxis(np.stack(values).reshape(shape), (-2, -1), places)
    chunks = {key: held[key].to_bytes() for key in sorted(held) if key not in kept}
    return zarrfolder.archive(chunks | kept)


def _open(files: dict[str, bytes], path: str, name: str) -> tuple[Any, dict[str, Any]]:
    """The array at a path of an image, and the files that it reads and writes, in memory."""
    try:
        import zarr
        from zarr.buffer.cpu import Buffer
        from zarr.storage import MemoryStore
    except ImportError:  # or one before 3.1
        raise InputError(
            f"Reading OME-Zarr needs zarr, and {name} is one; pip install 'snr-ray[zarr]'."
        ) from None
    held: dict[str, Any] = {key: Buffer.from_bytes(value) for key, value in files.items()}
    version: Any = 2 if f"{path}/.zarray" in files else 3
    try:
        return zarr.open_array(MemoryStore(held), path=path, mode="r+", zarr_format=version), held
    except Exception as error:  # what is damaged or of another kind raises anything
        raise _undecoded(name, error) from None


def _undecoded(name: str, error: Exception) -> Exception:
    """A sentence for a codec that is not there; other errors as they are."""
    if type(error).__name__ != "UnknownCodecError":
        return error
    said = " ".join(str(error).split()).strip("'\"")
    return InputError(
        f"{name} is compressed with a codec that zarr does not know ({said}); install the package "
        "that has it, or write the image again with Zstandard or Blosc."
    )


def _places(axes: Sequence[str]) -> tuple[int, int]:
    return axes.index("y"), axes.index("x")


def _is_metadata(key: str) -> bool:
    return key.rpartition("/")[2] in ("zarr.json", ".zarray", ".zattrs", ".zgroup")
