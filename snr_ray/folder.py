"""One place for outputs: a folder on a file system, or a prefix in a bucket (s3://, gs://).

Files and objects are there whole or not at all. Names are relative, with `/` between their parts.
Folders are small and picklable: tasks on any node get them as they are.
"""

import abc
import errno
import os
import random
import re
import shutil
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from snr_ray.config import InputError, check

JOB = "job.json"
"""What decides the contents of an output folder; `outputs.claim` writes it."""
ANSWER_S = 60.0
"""How long a store may take to answer when it is opened."""
CLAIM_S = 60.0
"""Claims of a name in a bucket that lie further apart than this do not compete."""
MOUNT_S = 5.0
"""How long a node may take to see a file that another has written."""
WRITERS = 16
"""Objects of a folder in a bucket that are written at once."""
SWAPS = 8
"""How often a folder is tried to be put in the place of another that comes back."""
_PARTIAL = ".partial"
_SECRET = re.compile(r"(\b[A-Za-z][A-Za-z0-9+.-]*://)[^\s/?#@'\"]*@")

T = TypeVar("T")


class NotShared(InputError):
    """A node does not see the output folder of the job that it works for."""


class Folder(abc.ABC):
    """An output place; `open_folder` makes one.

    `str()` is what a user reads and types, without secrets.
    """

    @abc.abstractmethod
    def __str__(self) -> str: ...

    @property
    def local(self) -> Path | None:
        """The folder on a file system; None in a bucket."""
        return None

    @property
    def named(self) -> "Path | Folder":
        """The path as the user typed it; in a bucket, this folder."""
        return self

    @abc.abstractmethod
    def write(self, name: str, data: bytes | str, *, durable: bool = False) -> None:
        """Write a file whole or not at all, in place of an older one.

        Args:
            name: relative; folders in it are made.
            data: contents; text as UTF-8.
            durable: wait until it would outlive a power cut; for what a job cannot do without.

        Raises:
            OSError: if it cannot be written.
            NotShared: if the folder is `claimed` and its job.json is not to be seen from here.
        """

    @abc.abstractmethod
    def writing(self, name: str) -> Any:
        """Context manager: a local path to write to; the file appears at the end, if at all."""

    @abc.abstractmethod
    def write_folder(self, name: str, files: Mapping[str, bytes]) -> None:
        """Write a folder in place of an older one, whole or not at all.

        Args:
            name: relative; raises as `write`.
            files: contents by their names in it. In a bucket, where nothing is renamed, the last
                is gone before and written after all others: it should be the one without which the
                rest is nothing.
        """

    @abc.abstractmethod
    def create(self, name: str, data: bytes | str) -> bool:
        """As `write`, but only if there is no such file; of several at once at most one does it.

        Returns:
            Whether it was written.
        """

    @abc.abstractmethod
    def read(self, name: str) -> bytes:
        """Contents of a file. Raises FileNotFoundError if there is none, OSError if unreadable."""

    @abc.abstractmethod
    def exists(self, name: str = "") -> bool:
        """Whether there is a file or folder of this name."""

    @abc.abstractmethod
    def written(self, name: str) -> float | None:
        """When a file was written, by the clock of the file system or bucket, which all machines
        share; None if there is none."""

    @abc.abstractmethod
    def list(self, prefix: str = "") -> list[str]:
        """Sorted names of all files in a subfolder and below; none if there is no such folder."""

    @abc.abstractmethod
    def empty(self) -> bool:
        """Whether nothing lies here."""

    @abc.abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all that is in it; nothing happens if there is none."""

    def sweep(self) -> None:
        """Remove what killed processes left half written, here and below."""
        return None

    @abc.abstractmethod
    def join(self, name: str) -> "Folder":
        """A folder in this one."""

    @abc.abstractmethod
    def filesystem(self) -> tuple[pafs.FileSystem, str]:
        """The same place for pyarrow: file system and path, for reading."""

    def claimed(self) -> "Folder":
        """The same folder for tasks: they write only where they see the job.json of now.

        On a node without the shared mount the path is missing, or a folder of the node's own.
        """
        return self


class LocalFolder(Folder):
    """A folder on a file system; see `Folder`."""

    def __init__(self, path: Path, job: bytes | None = None) -> None:
        self._named = str(path)
        self.path = path.absolute()
        self._job = job
        self._seen = False

    def __str__(self) -> str:
        return self._named

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalFolder, (self.path, self._job)

    @property
    def local(self) -> Path:
        return self.path

    @property
    def named(self) -> Path:
        return Path(self._named)

    def write(self, name: str, data: bytes | str, *, durable: bool = False) -> None:
        with self._partial(name, durable) as partial:
            partial.write_bytes(data.encode() if isinstance(data, str) else data)

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        with self._partial(name, durable=True) as partial:
            yield partial

    def write_folder(self, name: str, files: Mapping[str, bytes]) -> None:
        with self._partial(name, durable=False) as partial:
            partial.mkdir()
            for inner, data in files.items():
                path = partial / _inside(inner)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)

    def create(self, name: str, data: bytes | str) -> bool:
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{uuid.uuid4().hex[:12]}{_PARTIAL}")
        try:
            partial.write_bytes(data.encode() if isinstance(data, str) else data)
            _sync(partial)
            os.link(partial, path)  # unlike a rename, fails where the name is taken
        except FileExistsError:
            return False
        except OSError:  # file systems without links; what a kill leaves is told as damaged
            try:
                with path.open("xb") as file:
                    file.write(partial.read_bytes())
            except FileExistsError:
                return False
        finally:
            partial.unlink(missing_ok=True)
        _sync(path.parent)
        return True

    def read(self, name: str) -> bytes:
        return self._path(name).read_bytes()

    def exists(self, name: str = "") -> bool:
        return os.path.lexists(self._path(name))

    def written(self, name: str) -> float | None:
        try:
            return self._path(name).stat().st_mtime
        except FileNotFoundError:
            return None

    def list(self, prefix: str = "") -> list[str]:
        found = []
        for folder, folders, names in os.walk(self._path(prefix)):
            folders[:] = [name for name in folders if not _is_partial(name)]
            place = Path(folder).relative_to(self.path)
            found += [(place / name).as_posix() for name in names if not _is_partial(name)]
        return sorted(found)

    def empty(self) -> bool:
        return not self.path.is_dir() or not any(self.path.iterdir())

    def remove(self, name: str) -> None:
        path = self._path(name)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def sweep(self) -> None:
        for left in list(self.path.rglob(f".*{_PARTIAL}")):
            discard(left)

    def join(self, name: str) -> "LocalFolder":
        return LocalFolder(Path(self._named) / _inside(name))

    def filesystem(self) -> tuple[pafs.FileSystem, str]:
        return pafs.LocalFileSystem(use_mmap=True), str(self.path)

    def claimed(self) -> "LocalFolder":
        return LocalFolder(self.path, self.read(JOB))

    def _path(self, name: str) -> Path:
        return self.path / _inside(name)

    @contextmanager
    def _partial(self, name: str, durable: bool) -> Iterator[Path]:
        path = self._path(name)
        if self._job is None:
            path.parent.mkdir(parents=True, exist_ok=True)
        else:
            self._check_mount()
            _make_below(self.path, path.parent)
        # Not from the name, which may be as long as names can be.
        partial = path.with_name(f".{uuid.uuid4().hex[:12]}{_PARTIAL}")
        try:
            yield partial
            if durable:
                _sync(partial)
            _into_place(partial, path)
        except BaseException:
            discard(partial)
            raise
        if durable:
            _sync(path.parent)

    def _check_mount(self) -> None:
        """Raise NotShared where job.json is missing or another's: each time it is looked for, as
        mounts come and go, and read once."""
        job = self.path / JOB
        if self._seen and job.is_file():
            return
        until = time.monotonic() + MOUNT_S
        while True:
            with suppress(OSError):
                self._seen = job.read_bytes() == self._job
                if self._seen:
                    return
            if time.monotonic() > until:
                raise NotShared(
                    f"--out must be on storage that all nodes share, but node "
                    f"{socket.gethostname()} does not see {job} of this job; mount the storage "
                    "there at the same path, or give an --out that every node has."
                )
            time.sleep(0.5)
            with suppress(OSError):  # a network file system looks anew when a folder is listed
                os.listdir(self.path)


class BucketFolder(Folder):
    """A prefix in a bucket; see `Folder`. Objects appear when they are complete."""

    def __init__(self, uri: str, fs: pafs.FileSystem, root: str) -> None:
        self._uri, self._fs, self._root = uri, fs, root.rstrip("/")

    def __str__(self) -> str:
        return self._uri

    def __reduce__(self) -> tuple[Any, ...]:
        return BucketFolder, (self._uri, self._fs, self._root)

    def write(self, name: str, data: bytes | str, *, durable: bool = False) -> None:
        with self._fs.open_output_stream(self._path(name)) as stream:
            stream.write(data.encode() if isinstance(data, str) else data)

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="snr-") as folder:
            path = Path(folder) / PurePosixPath(name).name
            yield path
            # In one piece: closing a stream completes an object, also after an error.
            self.write(name, path.read_bytes())

    def write_folder(self, name: str, files: Mapping[str, bytes]) -> None:
        *others, last = files
        for old in (f"{name}/{last}", name):
            self.remove(old)

        def write(inner: str) -> None:
            self.write(f"{name}/{_inside(inner)}", files[inner])

        with ThreadPoolExecutor(WRITERS) as pool:
            list(pool.map(write, others))
        write(last)

    def create(self, name: str, data: bytes | str) -> bool:
        # Buckets list what was just written. Whoever writes its claim first and looks for others
        # then, cannot miss one; a claim that a killed process left behind is soon too old.
        mine = f".claims/{uuid.uuid4().hex}"
        self.write(mine, name)
        try:
            claims = self._fs.get_file_info(pafs.FileSelector(self._path(".claims")))
            ages = {info.base_name: info.mtime_ns / 1e9 for info in claims if info.is_file}
            now = ages.pop(mine.rpartition("/")[2])
            alone = all(abs(now - other) >= CLAIM_S for other in ages.values())
            if alone and not self.exists(name):
                self.write(name, data)
                return True
        finally:
            self.remove(mine)
        if not alone:  # who asks again must not meet the others again
            time.sleep(random.uniform(0.2, 1.0))
        return False

    def read(self, name: str) -> bytes:
        with self._fs.open_input_stream(self._path(name)) as stream:
            return stream.read()

    def exists(self, name: str = "") -> bool:
        return self._fs.get_file_info(self._path(name)).type != pafs.FileType.NotFound

    def written(self, name: str) -> float | None:
        info = self._fs.get_file_info(self._path(name))
        return info.mtime_ns / 1e9 if info.is_file else None

    def list(self, prefix: str = "") -> list[str]:
        selector = pafs.FileSelector(self._path(prefix), recursive=True, allow_not_found=True)
        found = [info.path for info in self._fs.get_file_info(selector) if info.is_file]
        return sorted(path[len(self._root) + 1 :] for path in found)

    def empty(self) -> bool:
        # Markers of folders and of claims are nothing that a user put here.
        selector = pafs.FileSelector(self._root, allow_not_found=True)
        return all(
            info.base_name in (".claims", ".beats")
            or (not info.is_file and not self.list(info.base_name))
            for info in self._fs.get_file_info(selector)
        )

    def remove(self, name: str) -> None:
        path = self._path(name)
        kind = self._fs.get_file_info(path).type
        if kind == pafs.FileType.Directory:
            self._fs.delete_dir(path)
        elif kind == pafs.FileType.File:
            self._fs.delete_file(path)

    def join(self, name: str) -> "BucketFolder":
        head, mark, query = self._uri.partition("?")
        uri = f"{head.rstrip('/')}/{_inside(name)}{mark}{query}"
        return BucketFolder(uri, self._fs, self._path(name))

    def filesystem(self) -> tuple[pafs.FileSystem, str]:
        return self._fs, self._root

    def _path(self, name: str) -> str:
        inner = _inside(name)
        return f"{self._root}/{inner}" if inner else self._root


def open_folder(place: str | Path | Folder) -> Folder:
    """The output place that a user named: a path, or a URI with what pyarrow takes in its query.

    Nothing is made yet. Credentials are those of the environment, or stand in the URI.

    Raises:
        InputError: if a URI cannot be opened, or its store does not answer within a minute.
    """
    if isinstance(place, Folder):
        return place
    text = str(place)
    if "://" not in text:
        mangled = re.match(r"(s3|gs|gcs|abfss?|hdfs|file):/", text)
        check(
            mangled is None,
            f"A URI has two slashes after its scheme, but got {text!r}; give "
            f"{text.replace(':/', '://', 1)}.",
        )
        return LocalFolder(Path(text))
    fs, root = open_uri(text)
    if isinstance(fs, pafs.LocalFileSystem):
        return LocalFolder(Path(root))
    check(bool(root), f"A URI must name a bucket, but got {text!r}; give s3://BUCKET/FOLDER.")
    folder = BucketFolder(without_secrets(text), fs, root)
    try:
        within(ANSWER_S, lambda: folder.exists(JOB))
    except (OSError, TimeoutError) as error:
        raise InputError(
            f"{folder} must be in a bucket that can be reached, but the store says: "
            f"{without_secrets(str(error))}; look at the name, the region and the credentials."
        ) from None
    return folder


def open_uri(uri: str) -> tuple[pafs.FileSystem, str]:
    """File system and path of a URI.

    Raises:
        InputError: if pyarrow cannot open it, or its store does not answer within a minute.
    """
    try:
        return within(ANSWER_S, lambda: pafs.FileSystem.from_uri(uri))
    except (pa.ArrowInvalid, OSError, TimeoutError) as error:
        raise InputError(
            f"{without_secrets(uri)} is not a URI that can be opened "
            f"({without_secrets(str(error))})."
        ) from None


def without_secrets(text: str) -> str:
    """Any text with `KEY:SECRET@` taken out of the URIs in it."""
    return _SECRET.sub(r"\1", text)


def within(seconds: float, ask: Callable[[], T]) -> T:
    """The answer of a call that may wait for the network. Raises TimeoutError if it takes longer.

    The call goes on in a thread that does not keep the process from ending.
    """
    answers: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            answers.append(ask())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not answers:
        raise TimeoutError(f"no answer within {seconds:.0f} seconds")
    return answers[0]


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise InputError(f"Names must stay inside the output folder, but got {name!r}.")
    return "" if str(path) == "." else str(path)


def discard(path: Path) -> None:
    """Remove what was half written, be it a file or a folder; nothing happens if it is gone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _into_place(partial: Path, path: Path) -> None:
    """Give a file or folder its name. A folder is put aside for another, as no file system that is
    common exchanges them; who is killed in between leaves neither."""
    for left in reversed(range(SWAPS)):
        try:
            os.replace(partial, path)
            return
        except OSError as error:
            taken = error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
            if not (partial.is_dir() and taken and left):
                raise
        aside = path.with_name(f".{uuid.uuid4().hex[:12]}{_PARTIAL}")
        with suppress(FileNotFoundError):
            os.replace(path, aside)
        discard(aside)


def _is_partial(name: str) -> bool:
    return name.startswith(".") and name.endswith(_PARTIAL)


def _make_below(root: Path, folder: Path) -> None:
    """Make a folder and those between it and `root`, which must be there."""
    if folder != root and not folder.is_dir():
        _make_below(root, folder.parent)
        folder.mkdir(exist_ok=True)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk; some cannot say."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if path.is_file():
            raise
    finally:
        os.close(descriptor)
