"""Outputs in a folder on a file system, which nodes may share: whole files by renaming."""

import errno
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from snr_ray.folder import JOB, Folder, NotShared, inside

MOUNT_S = 5.0
"""How long a node may take to see a file that another has written."""
SWAP_S = 30.0
"""How long a folder is tried to be put in the place of another that comes back."""
_PARTIAL = ".partial"


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
    def place(self) -> Path:
        return self.path.resolve()

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
                path = partial / inside(inner)
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
        return LocalFolder(Path(self._named) / inside(name))

    def filesystem(self) -> tuple[pafs.FileSystem, str]:
        return pafs.LocalFileSystem(use_mmap=True), str(self.path)

    def claimed(self) -> "LocalFolder":
        return LocalFolder(self.path, self.read(JOB))

    def _path(self, name: str) -> Path:
        return self.path / inside(name)

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


def discard(path: Path) -> None:
    """Remove what was half written, be it a file or a folder; nothing happens if it is gone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _into_place(partial: Path, path: Path) -> None:
    """Give a file or folder its name. A folder is put aside for another, as no file system that is
    common exchanges them; who is killed in between leaves neither."""
    late = time.monotonic() + SWAP_S
    while True:
        try:
            os.replace(partial, path)
            return
        except OSError as error:
            taken = error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
            if not (partial.is_dir() and taken and time.monotonic() < late):
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
