"""Sinograms of a parallel-beam scan: HDF5 as synchrotrons write it, or NPY arrays.

    HDF5 (Data Exchange)  exchange/data [views, slices, bins], data_white, data_dark, theta in
                          degrees
    NPY                   [views, bins] or [views, slices, bins]; flats and darks in other files

`FILE#NAME` names another data set of an HDF5 file, unless a file is called that.
"""

import posixpath
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from snr_ray.errors import InputError
from snr_ray.hashing import fingerprint

Array = npt.NDArray[np.float32]

HDF5_SUFFIXES = (".h5", ".hdf5", ".hdf", ".nxs")
DATA, FLATS, DARKS, THETA = (f"exchange/{k}" for k in ("data", "data_white", "data_dark", "theta"))


@dataclass(frozen=True)
class Scan:
    """Where a scan lies; slices are read as they are asked for, also on other machines."""

    data: str
    """File, or FILE#NAME of a data set in it."""
    flats: str = ""
    darks: str = ""
    """The same of fields without a sample and without a beam; nothing where there are none."""

    def shape(self) -> tuple[int, int, int]:
        """Views, slices and bins. Raises InputError if it cannot be read or is no sinogram."""
        shape, kind, numbers = _held(self.data, DATA)
        if len(shape) not in (2, 3) or min(shape) < 1 or not numbers:
            raise InputError(
                f"A sinogram must hold numbers [views, bins] or [views, slices, bins], but "
                f"{self.data} holds {kind} {shape}."
            )
        return shape[0], (1, *shape[1:-1])[-1], shape[-1]

    @property
    def path(self) -> Path:
        """The file of the views."""
        return Path(_split(self.data)[0])

    def stamp(self) -> str:
        """What changes when a file of the scan does: their sizes and times."""
        names = [_split(text)[0] for text in (self.data, self.flats, self.darks) if text]
        states = [Path(name).stat() for name in names]
        return fingerprint(f"{state.st_size}-{state.st_mtime_ns}" for state in states)

    def check_fields(self) -> None:
        """Raise InputError for flats or darks that are not of these slices and bins."""
        _, n_slices, n_bins = self.shape()
        for option, name, own in (("flats", self.flats, FLATS), ("darks", self.darks, DARKS)):
            if not name:
                continue
            shape, kind, numbers = _held(name, own)
            fits = shape[1:] in ([n_bins], [n_slices, n_bins]) and shape[0] > 0
            if not (fits and numbers):
                raise InputError(
                    f"--{option} must hold numbers [fields, {n_bins} bins] or [fields, {n_slices} "
                    f"slices, {n_bins} bins], as the sinogram has, but {name} holds {kind} {shape}."
                )
            if n_slices > 1 and shape == [n_slices, n_bins]:
                raise InputError(
                    f"--{option} must say what they are of, but {name} holds {shape}, which may be "
                    f"one field or {n_slices}; store one as [1, {n_slices}, {n_bins}], several "
                    f"that serve all slices as [{n_slices}, {n_slices}, {n_bins}]."
                )

    def theta(self) -> npt.NDArray[np.float64] | None:
        """Angles of the views in degrees, where the file tells them: beside the data set of the
        views. None where it does not, so that whoever takes others can say so. Raises InputError
        if they are no numbers."""
        path, name = _split(self.data)
        if not path.lower().endswith(HDF5_SUFFIXES):
            return None
        found = _beside(path, name, THETA)
        if not found:
            return None
        shape, kind, numbers = _held(found, THETA)
        if not numbers:
            raise InputError(f"Angles must be numbers, but {found} holds {kind} {shape}.")
        with _opened(found, THETA) as theta:
            return np.asarray(theta[...], np.float64).ravel()

    def fields(self, views: slice, row: int) -> tuple[Array, Array | None, Array | None]:
        """Views [A, N] of a slice, and its flats [F, N] and darks [D, N].

        Raises:
            InputError: if they cannot be read, or hold NaN or infinity.
        """
        found: list[Array | None] = []
        for name, own, rows in ((self.data, DATA, views), (self.flats, FLATS, slice(None)),
                                (self.darks, DARKS, slice(None))):  # fmt: skip
            if not name:
                found.append(None)
                continue
            with _opened(name, own) as data:
                try:
                    part = data[rows] if data.ndim == 2 else data[rows, row]
                except OSError as error:  # of HDF5, whose parts are packed each by itself
                    raise InputError(
                        f"Slice {row} of {name} cannot be read ({error}); replace the file."
                    ) from None
            with np.errstate(over="ignore"):  # beyond 32 bits is infinity
                field = np.asarray(part, np.float32)
            if not np.isfinite(field).all():
                raise InputError(f"A scan must be finite, but slice {row} of {name} is not.")
            found.append(field)
        data, flats, darks = found
        assert data is not None
        return data, flats, darks


def open_scan(data: str, flats: str = "", darks: str = "") -> Scan:
    """A scan; flats and darks of an HDF5 file are found by themselves where none are named: beside
    the data set of the views."""
    path, name = _split(data)
    if path.lower().endswith(HDF5_SUFFIXES):
        flats, darks = (
            given or _beside(path, name, own) for given, own in ((flats, FLATS), (darks, DARKS))
        )
    return Scan(data, flats, darks)


def _split(text: str) -> tuple[str, str]:
    """File and data set, "" where none is named; names of both may hold a # too."""
    ends = [at for at, letter in enumerate(text) if letter == "#"]
    for end in (len(text), *reversed(ends)):
        if Path(text[:end]).is_file():
            return text[:end], text[end + 1 :]
    path, _, name = text.partition("#")
    return path, name


def _beside(path: str, name: str, own: str) -> str:
    """FILE#NAME of the data set called as `own` in the group of another; "" where there is none."""
    group = posixpath.dirname(name) if name else posixpath.dirname(own)
    found = posixpath.join(group, posixpath.basename(own))
    try:
        with _DataSet(path, found):
            return f"{path}#{found}"
    except InputError:
        return ""


def _held(text: str, own: str) -> tuple[list[int], np.dtype, bool]:
    """Shape and kind of the array of a file, and whether it holds real numbers; of an HDF5 data set
    that holds nothing, no numbers of no shape."""
    with _opened(text, own) as data:
        kind, shape = np.dtype(data.dtype), data.shape
    return list(shape or ()), kind, shape is not None and kind.kind in "fiu"


def _opened(text: str, own: str) -> AbstractContextManager[Any]:
    """The array of a file; `own` is the data set of HDF5 where none is named."""
    path, name = _split(text)
    if not Path(path).is_file():
        what = "is a folder" if Path(path).is_dir() else "is not there"
        raise InputError(f"A sinogram must be a file .npy or .h5, but {path} {what}.")
    if path.lower().endswith(".npy"):
        try:
            return nullcontext(np.load(path, mmap_mode="r", allow_pickle=False))
        except (ValueError, OSError, EOFError) as error:
            raise InputError(f"{path} is not a readable NPY file ({error}).") from None
    if not path.lower().endswith(HDF5_SUFFIXES):
        raise InputError(
            f"A sinogram must be NPY or HDF5 ({' '.join(HDF5_SUFFIXES)}), but got {path}."
        )
    return _DataSet(path, name or own)


class _DataSet:
    """A data set of an HDF5 file, open while it is read."""

    def __init__(self, path: str, name: str) -> None:
        try:
            import h5py  # an extra
        except ImportError:
            raise InputError(
                "HDF5 files need h5py; install snr-ray[hdf5], or give the sinogram as NPY."
            ) from None
        try:
            self.file = h5py.File(path)
        except OSError as error:
            raise InputError(f"{path} is not a readable HDF5 file ({error}).") from None
        found = self.file.get(name)
        if not isinstance(found, h5py.Dataset):
            names: list[str] = []
            self.file.visititems(
                lambda key, item: names.append(key) if isinstance(item, h5py.Dataset) else None
            )
            self.file.close()
            raise InputError(
                f"{path} must hold the data set {name}, but holds {', '.join(names) or 'none'}; "
                "name one as FILE#NAME."
            )
        self.data = found

    def __enter__(self) -> Any:
        return self.data

    def __exit__(self, *_: object) -> None:
        self.file.close()
