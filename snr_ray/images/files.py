"""Folders, globs, single files and Parquet tables, on a file system or in a bucket, as a source."""

import functools
import os
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs as pafs

from snr_ray.address import ANSWER_S, within
from snr_ray.bucketfolder import BucketFolder
from snr_ray.errors import InputError, Lost
from snr_ray.folder import Folder
from snr_ray.images.collection import Source, Texts
from snr_ray.images.formats import zarrfolder
from snr_ray.images.listing import Glob, LeftOut, Listing, list_place
from snr_ray.images.places import Place, find, printable, shown
from snr_ray.images.tables import table_source
from snr_ray.localfolder import LocalFolder

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip", ".7z", ".rar")
"""Files that hold files, which are not looked into."""


def open_path(text: str, name: str, known: tuple[str, ...] = ()) -> Source:
    """A folder (searched with its subfolders), one file, or a glob; local or by URI.

    `#COLUMN` at the end names the image column of Parquet files; `known` are words that the user
    may have meant. `name` is what the source is called, and begins the identity where it is not
    `text`.

    Raises:
        InputError: if it is not there or holds no images.
        Lost: if its store does not answer within a minute.
    """
    place = find(text)
    kind_of_source = name.removesuffix(text)
    name = kind_of_source + shown(text)
    alone = Glob(place.pattern).one_folder
    home = place.home
    try:
        kind = _kind(place)
        if kind == pafs.FileType.NotFound and not place.local:
            raise InputError(
                f"A URI must name images that are there, but at {name} nothing is; look at the "
                "bucket, the name, the region and the credentials."
            )
        if kind == pafs.FileType.NotFound:
            raise InputError(
                f"SRC must be a path that exists, a URI, or one of {', '.join(known)}, "
                f"but {name!r} is none of these."
            )
        if kind == pafs.FileType.Unknown:
            raise InputError(
                f"SRC must be files or a folder, which workers can read again, but {name} is a "
                "pipe, a socket or a device; write what comes from it into a file."
            )
        if kind == pafs.FileType.File or _is_image(place):
            file = PurePosixPath(place.root)
            if file.name.lower().endswith(ARCHIVES):
                raise InputError(
                    f"SRC must be images or Parquet files of them, but {name} is an archive; "
                    "unpack it and give the folder (notMNIST's is read as it is: notmnist:ARCHIVE)."
                )
            root, alone = str(file.parent), True
            home = home.rpartition("/")[0] or "/"
            listing = _one_file(file.name)
        else:
            root, listing = place.root, list_place(place)
    except TimeoutError as error:
        raise Lost(f"{name} must be in a store that answers, but it gave {error}") from None
    except OSError as error:
        raise InputError(f"{name} cannot be listed ({error}).") from None
    prefix = root.rstrip("/") + "/"
    source = functools.partial(
        Source,
        name,
        identity=kind_of_source + place.identity,
        home=kind_of_source + home + (f"#{place.column}" if place.column else ""),
        folder=LocalFolder(Path(root)) if place.local else BucketFolder(home, place.fs, root),
        alone=alone,
        left_out=listing.left_out,
    )
    if place.column or (listing.tables and not len(listing.images)):
        return table_source(place, listing.tables, prefix, source)
    for table in listing.tables:
        listing.left_out.add("Parquet tables beside image files", table)
    ids = Texts(listing.images)
    where: _Local | _Remote
    if place.local:
        where = _Local(os.fsencode(prefix), ids, listing.odd)
    else:
        where = _Remote(place.fs, prefix, ids, listing.sizes, listing.times)
    return source(ids, where.read, stamps=where.stamp)


@dataclass(frozen=True)
class _Local:
    """Files of this machine, or of what is mounted on it."""

    prefix: bytes
    ids: Texts
    odd: dict[str, bytes]

    def read(self, index: int) -> bytes:
        path = self._path(index)
        try:
            with open(path, "rb") as file:
                return file.read()
        except IsADirectoryError:
            return zarrfolder.pack(LocalFolder(Path(os.fsdecode(path))), self.ids[index])

    def stamp(self, index: int) -> str:
        path = self._path(index)
        status = os.stat(path)
        size, time = status.st_size, status.st_mtime_ns
        if stat.S_ISDIR(status.st_mode):
            files = (os.stat(os.path.join(at, name)) for at, _, names in os.walk(path)
                     for name in names)  # fmt: skip
            size, time = zarrfolder.stamp((file.st_size, file.st_mtime_ns) for file in files)
        return f"{size}-{time}"

    def _path(self, index: int) -> bytes:
        name = self.ids[index]
        return self.prefix + self.odd.get(name, name.encode())


@dataclass(frozen=True)
class _Remote:
    """Objects of a bucket, with the sizes and times that their listing gave."""

    fs: pafs.FileSystem
    prefix: str
    ids: Texts
    sizes: npt.NDArray[np.int64] | None
    times: npt.NDArray[np.int64] | None

    def read(self, index: int) -> bytes:
        # Keys as they are: in a bucket a//b is another than a/b.
        path = self.prefix + self.ids[index]
        try:
            with self.fs.open_input_stream(path) as stream:
                return stream.read()
        except FileNotFoundError:
            folder, name = BucketFolder("", self.fs, path), self.ids[index]
            named = name.lower().endswith(zarrfolder.SUFFIX)
            if not named and folder.exists() and not zarrfolder.is_image(folder):
                raise InputError(
                    f"The key of an image must not end in a slash, by which it cannot be read, but "
                    f"{name}/ does; copy it to another."
                ) from None
            return zarrfolder.pack(folder, name)

    def stamp(self, index: int) -> str:
        if self.sizes is None or self.times is None:
            path = self.prefix + self.ids[index]
            info = self.fs.get_file_info(path)
            if info.type != pafs.FileType.Directory:
                return f"{info.size}-{info.mtime_ns}"
            infos = self.fs.get_file_info(pafs.FileSelector(path, recursive=True))
            files = ((file.size or 0, file.mtime_ns or 0) for file in infos if file.is_file)
            return "{}-{}".format(*zarrfolder.stamp(files))
        return f"{self.sizes[index]}-{self.times[index]}"


def _kind(place: Place) -> pafs.FileType:
    if not place.local:
        return within(ANSWER_S, lambda: place.fs.get_file_info(place.root).type)
    try:
        mode = os.stat(place.root).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return pafs.FileType.NotFound
    if stat.S_ISDIR(mode):
        return pafs.FileType.Directory
    return pafs.FileType.File if stat.S_ISREG(mode) else pafs.FileType.Unknown


def _is_image(place: Place) -> bool:
    """Whether a folder that was named itself is one image."""
    if place.pattern or place.column:
        return False
    folder: Folder = BucketFolder("", place.fs, place.root)
    if place.local:
        folder = LocalFolder(Path(place.root))
    return place.root.lower().endswith(zarrfolder.SUFFIX) or zarrfolder.is_image(folder)


def _one_file(name: str) -> Listing:
    """The listing of a file that was named itself: whatever its suffix, it is meant."""
    table = name.lower().endswith(".parquet")
    text = printable(name)
    odd = {text: os.fsencode(name)} if text != name else {}
    images = pa.array([] if table else [text], pa.string())
    return Listing(images, [name] if table else [], LeftOut(), odd, None, None)
