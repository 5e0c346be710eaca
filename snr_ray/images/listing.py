"""A place -> the names of its image files and tables, and a count of what is left out and why.

    folder --each real folder once--> names --by suffix, else by first bytes--> images, tables

Links that go in circles end, a million names take a few seconds and some thirty megabytes, and a
name that is not UTF-8 gets an id with its odd bytes escaped. An OME-Zarr folder is one image.
"""

import fnmatch
import os
import re
import stat
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from snr_ray.address import within
from snr_ray.bucketfolder import BucketFolder
from snr_ray.folder import Folder
from snr_ray.images.formats import zarrfolder
from snr_ray.images.formats.codec import HEAD_BYTES, SUFFIXES, recognise
from snr_ray.images.places import Place
from snr_ray.localfolder import LocalFolder

CHUNK = 2**16
"""Names that wait as Python objects before they go into an array."""
SHORT_OFFSETS = 2**31 - 2**20
"""Bytes of text that an Arrow array with offsets of 32 bits can hold."""
OWN_TABLES = ("failures.parquet", "manifest.parquet", "scores.parquet")
"""Parquet files that stages write beside images and rows."""
_IMAGES = frozenset(suffix.encode() for suffix in SUFFIXES)
_NAMED = re.compile(rb"(\.[0-9]?[a-z][a-z0-9]{0,5}){1,2}")
"""Suffixes that name a format. Others say nothing: none, numbers, parts of a UID."""


@dataclass
class LeftOut:
    """What a listing leaves out: how many by reason, and the first few of each."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        """Count one item; `reason` follows its number, as in `3 links to nothing`."""
        self.counts[reason] += 1
        known = self.examples.setdefault(reason, [])
        if len(known) < 2:
            known.append(name)

    def __str__(self) -> str:
        """One line, or "" where nothing is left out."""
        parts = []
        for reason, count in self.counts.most_common():
            first = self.examples[reason]
            more = ", ..." if count > len(first) else ""
            parts.append(f"{count:,} {reason} ({', '.join(first)}{more})")
        return "; ".join(parts)


@dataclass
class Listing:
    """What there is below a root."""

    images: pa.Array
    """Names of image files relative to the root, in the order of their bytes."""
    tables: list[str]
    """Names of Parquet files, likewise."""
    left_out: LeftOut
    odd: dict[str, bytes]
    """Escaped name -> the real one, of those that are not UTF-8."""
    sizes: npt.NDArray[np.int64] | None
    """Bytes of each image, and its time in nanoseconds; none where files can be asked later."""
    times: npt.NDArray[np.int64] | None


def list_place(place: Place) -> Listing:
    """Image files and tables of a folder and its subfolders; of a glob, what matches.

    Raises:
        OSError: if the root cannot be listed.
    """
    names = _Names()
    wanted = Glob(place.pattern)
    if place.local:
        root = os.fsencode(place.root)
        for name in _Walk(root, wanted, names.left_out):
            if name[-1:] == b"/":
                names.add_folder(name[:-1])
            else:
                names.add(name, partial(_head, root + b"/" + name))
        return names.listing()
    prefix = place.root.rstrip("/") + "/"
    everything = pafs.FileSelector(place.root, recursive=True)
    # In a thread, as Python hears no signal while pyarrow lists, which may take minutes.
    infos = within(threading.TIMEOUT_MAX, lambda: place.fs.get_file_info(everything))
    whole = _whole_folders((info.path.removeprefix(prefix) for info in infos), wanted, place)
    for info in infos:
        name = info.path.removeprefix(prefix)
        if info.type != pafs.FileType.File:
            continue
        folder = next(filter(whole.__contains__, _folders_of(name)), None) if whole else None
        if folder is not None:
            whole[folder].append((info.size or 0, info.mtime_ns or 0))
        elif not wanted.has(name):
            continue
        elif name[:1] == "." or "/." in name:
            climbs = not {".", ".."}.isdisjoint(name.split("/"))
            names.left_out.add("keys that are no paths" if climbs else "hidden", name)
        else:
            head = partial(_remote_head, place.fs, info.path)
            names.add(name.encode(), head, (info.size or 0, info.mtime_ns or 0))
    for folder, stamps in whole.items():
        if wanted.has(folder):
            names.add_folder(folder.encode(), zarrfolder.stamp(stamps))
    return names.listing()


def _whole_folders(
    names: Iterable[str], wanted: "Glob", place: Place
) -> dict[str, list[tuple[int, int]]]:
    """The folders among names in a bucket that are images, with nothing in them yet."""
    asked: set[str] = set()
    for name in names:
        if name.rpartition("/")[2] in zarrfolder.ROOTS:
            asked.add(name.rpartition("/")[0])
        if zarrfolder.SUFFIX in name.lower():
            asked.update(f for f in _folders_of(name) if f.lower().endswith(zarrfolder.SUFFIX))
    found: dict[str, list[tuple[int, int]]] = {}
    for folder in sorted(asked - {""}, key=lambda folder: folder.count("/")):
        hidden = folder[:1] == "." or "/." in folder
        if hidden or any(above in found for above in _folders_of(folder)):
            continue
        there = BucketFolder("", place.fs, f"{place.root.rstrip('/')}/{folder}")
        if _is_whole(there, folder, wanted):
            found[folder] = []
    return found


def _folders_of(name: str) -> Iterator[str]:
    """The folders that a file or folder lies in, the outermost first."""
    end = name.find("/")
    while end >= 0:
        yield name[:end]
        end = name.find("/", end + 1)


def _is_whole(folder: Folder, name: str, wanted: "Glob") -> bool:
    """Whether a folder is an image, or should be one by its name; not where a pattern means what
    lies in a collection of images."""
    named = name.lower().endswith(zarrfolder.SUFFIX) and wanted.has(name)
    return named or zarrfolder.is_image(folder)


def _head(path: bytes) -> bytes:
    with open(path, "rb") as file:
        return file.read(HEAD_BYTES)


def _remote_head(fs: pafs.FileSystem, path: str) -> bytes:
    with fs.open_input_stream(path) as stream:
        return stream.read(HEAD_BYTES)


class Glob:
    """A pattern as shells read it: `*` and `?` stay within a name, `**` is any number of folders.

    A folder that matches stands for all that is in it; the pattern "" for everything.
    """

    def __init__(self, pattern: str) -> None:
        self.parts = tuple(pattern.split("/")) if pattern else ()

    def has(self, name: str) -> bool:
        """Whether a file's relative path is meant."""
        parts = tuple(name.split("/"))
        return not self.parts or any(
            _matches(parts[: k + 1], self.parts) for k in range(len(parts))
        )

    def reaches(self, folder: str) -> bool:
        """Whether files below a folder may be meant."""
        parts = tuple(folder.split("/"))
        if not self.parts or "**" in self.parts or self.has(folder):
            return True
        return len(parts) < len(self.parts) and _matches(parts, self.parts[: len(parts)])

    @property
    def one_folder(self) -> bool:
        """Whether only files that lie directly in the root can be meant."""
        return len(self.parts) == 1 and self.parts != ("**",)


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[k:], pattern[1:]) for k in range(len(parts) + 1))
    return (
        bool(parts)
        and fnmatch.fnmatchcase(parts[0], pattern[0])
        and _matches(parts[1:], pattern[1:])
    )


class _Walk:
    """Paths of the regular files below a root, relative to it; each real folder is entered once.
    Folders that are images have a `/` at the end, and are not entered.

    Folders come before links to folders, so that what a folder holds has its own name and not
    that of a way round.
    """

    def __init__(self, root: bytes, wanted: Glob, left_out: LeftOut) -> None:
        self.root, self.wanted, self.left_out = root, wanted, left_out
        self.real = os.path.realpath(root)
        self.folders: deque[bytes] = deque([b""])
        self.links: list[bytes] = []

    def __iter__(self) -> Iterator[bytes]:
        seen: set[tuple[int, int]] = set()
        while self.folders or self.links:
            if not self.folders:
                self.links.sort(reverse=True)
            base = self.folders.popleft() if self.folders else self.links.pop()
            path = self.root + b"/" + base if base else self.root
            try:
                status = os.stat(path)
                if (status.st_dev, status.st_ino) in seen:
                    self.left_out.add("links to folders that are listed anyhow", _text(base))
                    continue
                seen.add((status.st_dev, status.st_ino))
                folder = LocalFolder(Path(os.fsdecode(path)))
                if base and _is_whole(folder, _text(base), self.wanted):
                    if self.wanted.has(_text(base)):
                        yield base + b"/"
                    continue
                with os.scandir(path) as entries:
                    for entry in entries:
                        name = base + b"/" + entry.name if base else entry.name
                        if self._is_file(entry, name):
                            yield name
            except OSError as error:
                if not base:
                    raise
                self.left_out.add(f"folders that cannot be read: {error.strerror}", _text(base))

    def _is_file(self, entry: os.DirEntry[bytes], name: bytes) -> bool:
        """Whether an entry is a file to look at; folders are kept for later."""
        hidden = entry.name[:1] == b"."
        if hidden or self.wanted.parts:
            shown = _text(name)
            if hidden:
                if not self.wanted.parts:
                    self.left_out.add("hidden", shown)
                return False
            if not self.wanted.has(shown) and not self.wanted.reaches(shown):
                return False
        link = entry.is_symlink()
        try:
            mode = entry.stat().st_mode if link else 0
        except OSError:
            self.left_out.add("links to nothing", _text(name))
            return False
        if stat.S_ISDIR(mode) if link else entry.is_dir(follow_symlinks=False):
            if link:
                self.links.append(name)
            else:
                self.folders.append(name)
            return False
        if not (stat.S_ISREG(mode) if link else entry.is_file(follow_symlinks=False)):
            self.left_out.add("neither files nor folders", _text(name))
            return False
        if self.wanted.parts and not self.wanted.has(_text(name)):
            return False
        if link and self._listed(entry):
            self.left_out.add("links to files that are listed anyhow", _text(name))
            return False
        return True

    def _listed(self, link: os.DirEntry[bytes]) -> bool:
        """Whether a link leads to a file that is listed under its own name."""
        folder = os.path.realpath(os.path.dirname(link.path))
        target = os.path.normpath(os.path.join(folder, os.readlink(link.path)))
        inside = self.real.rstrip(b"/") + b"/"
        if not target.startswith(inside):
            return False
        name = _text(target[len(inside) :])
        visible = name[:1] != "." and "/." not in name
        return visible and self.wanted.has(name) and name.lower().endswith((*SUFFIXES, ".parquet"))


class _Names:
    """Collects names of files by what they are."""

    def __init__(self) -> None:
        self.left_out = LeftOut()
        self.tables: list[str] = []
        self.odd: dict[str, bytes] = {}
        self._chunks: list[pa.Array] = []
        self._waiting: list[bytes] = []
        self._stamps: list[tuple[int, int]] = []

    def add(
        self, name: bytes, head: Callable[[], bytes], stamp: tuple[int, int] | None = None
    ) -> None:
        """Sort in one file; `head` reads its first bytes where the name says nothing."""
        dot = name.rfind(b".", name.rfind(b"/") + 1)
        suffix = name[dot:].lower() if dot >= 0 else b""
        if suffix == b".gz":  # packed: what it is stands before
            before = name[:dot].rfind(b".")
            suffix = name[before:].lower() if before > name.rfind(b"/") else suffix
        if suffix not in _IMAGES:
            if suffix == b".parquet":
                if _text(name).rpartition("/")[2] in OWN_TABLES:
                    self.left_out.add("tables that snr wrote", _text(name))
                else:
                    self.tables.append(_text(name))
                return
            if _NAMED.fullmatch(suffix):
                self.left_out.add(f"{_text(suffix)} files", _text(name))
                return
            if not self._is_image(name, head):
                return
        self._keep(name, stamp)

    def add_folder(self, name: bytes, stamp: tuple[int, int] | None = None) -> None:
        """A folder that is one image."""
        self._keep(name, stamp)

    def _keep(self, name: bytes, stamp: tuple[int, int] | None) -> None:
        self._waiting.append(name)
        if stamp:
            self._stamps.append(stamp)
        if len(self._waiting) == CHUNK:
            self._flush()

    def _is_image(self, name: bytes, head: Callable[[], bytes]) -> bool:
        try:
            known = recognise(head()) is not None
        except OSError as error:
            self.left_out.add(f"files that cannot be read: {error.strerror}", _text(name))
            return False
        # DICOM's own list of files begins like a file of pixels.
        known = known and name.rpartition(b"/")[2] != b"DICOMDIR"
        if not known:
            self.left_out.add("files of unknown format", _text(name))
        return known

    def _flush(self) -> None:
        names = pa.array(self._waiting, pa.binary())
        try:
            self._chunks.append(names.cast(pa.string()))
        except pa.ArrowInvalid:
            texts = [_text(name) for name in self._waiting]
            self.odd |= {
                text: name
                for text, name in zip(texts, self._waiting, strict=True)
                if text.encode() != name
            }
            self._chunks.append(pa.array(texts, pa.string()))
        self._waiting = []

    def listing(self) -> Listing:
        """All of it, sorted."""
        self._flush()
        size = sum(chunk.nbytes for chunk in self._chunks)
        kind = pa.string() if size < SHORT_OFFSETS else pa.large_string()
        names = pa.chunked_array(self._chunks, pa.string()).cast(kind).combine_chunks()
        self._chunks = []
        order = pc.sort_indices(names)
        sizes, times = None, None
        if self._stamps:
            sizes, times = np.array(self._stamps, np.int64)[order.to_numpy()].T
        images = names.take(order)
        del names, order
        if sizes is not None and times is not None:
            # The key a/ with something in it is listed as a, and no object can be read by it.
            own = np.append(True, pc.not_equal(images[1:], images[:-1]))[: len(images)]
            for name in images.filter(pa.array(~own)).to_pylist():
                self.left_out.add("keys that end in a slash", name + "/")
            images, sizes, times = images.filter(pa.array(own)), sizes[own], times[own]
        pa.default_memory_pool().release_unused()
        return Listing(images, sorted(self.tables), self.left_out, self.odd, sizes, times)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")
