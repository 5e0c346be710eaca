"""One driver at a time in an output folder: a lock that ends with its owner, on shared disks too.

The holder's file says who it is, and is touched every few seconds. A holder on this machine is
gone when its process is; one elsewhere when its file was not touched for a minute by the clock of
the file system or the bucket, which all machines share.
"""

import abc
import json
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from snr_ray.address import open_folder, without_secrets
from snr_ray.errors import InputError, RunError
from snr_ray.folder import Folder
from snr_ray.hashing import fingerprint

LOCK = ".lock"
BEAT_S = 5.0
"""Seconds between two signs of life."""
STALE_BEATS = 12
"""A holder that missed so many is dead."""


@contextmanager
def locked(folder: Path | Folder, stage: str) -> Iterator[None]:
    """Hold an existing folder; whoever else asks for it meanwhile is told who has it.

    Args:
        folder: what must not have two drivers; also in a bucket.
        stage: of the holder, for the sentence that others read.

    Raises:
        InputError: if a driver that lives holds it, or its lock cannot be read or written.
        RunError: at the end, if another driver took the folder because this one had stood still.
    """
    mine = _me(stage)
    files = _files(folder)
    with _told(files):
        name = _take(files, mine)
    lost, done = threading.Event(), threading.Event()

    def beat() -> None:
        while not done.wait(BEAT_S):
            with suppress(OSError):
                if _chain(files)[-1][1].get("key") != mine["key"]:
                    lost.set()
                    os.kill(os.getpid(), signal.SIGINT)  # as Ctrl-C: stages know how to stop
                    return
                files.touch(name, mine["key"])

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    holder: dict[str, Any] = {}
    try:
        yield
    except KeyboardInterrupt:
        if not lost.is_set():
            raise
    finally:
        done.set()
        thread.join()
        with suppress(OSError):  # of a bucket that is gone: others wait until it is stale
            chain = _chain(files)
            holder = chain[-1][1]
            if holder.get("key") == mine["key"]:
                # The first of them first: without it the others mean nothing.
                for file, owner in chain:
                    files.remove(file, owner["key"])
    if lost.is_set():
        raise RunError(
            f"{files} was taken over by {_who(holder)}, because this process had shown no "
            f"sign of life for {BEAT_S * STALE_BEATS:.0f} seconds; what it did until then is kept."
        )


def check_free(folder: Path | Folder) -> None:
    """Raise InputError where `locked` would; for before anything is removed."""
    files = _files(folder)
    with _told(files):
        name, holder = _chain(files)[-1]
        if holder:
            _wait_for_death(files, name)


@contextmanager
def _told(files: "_Files") -> Iterator[None]:
    """Raise InputError for a lock that cannot be read or written."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"--out must be a folder in which a lock can be read and written, but {files} is not "
            f"({without_secrets(str(error))}); look at its permissions, or give another --out."
        ) from None


def is_lock(name: str) -> bool:
    """Whether a file of a folder, by its name there, is of its lock."""
    return re.fullmatch(rf"{re.escape(LOCK)}(\.[0-9a-f]{{32}})?", name) is not None


class _Files(abc.ABC):
    """Lock files by their names, where the folder is; `str()` is the folder."""

    @abc.abstractmethod
    def read(self, name: str) -> dict[str, Any]:
        """What the holder wrote, only a key while it writes; {} where there is no file."""

    @abc.abstractmethod
    def create(self, name: str, mine: dict[str, Any]) -> bool:
        """Write a lock file, if there is none; of several at once at most one does it."""

    @abc.abstractmethod
    def touch(self, name: str, key: str) -> None:
        """Give a sign of life of the holder with this key."""

    @abc.abstractmethod
    def touched(self, name: str) -> float | None:
        """When the last sign of life was, by `clock`; None where there is no file."""

    @abc.abstractmethod
    def clock(self) -> float:
        """Now, by the clock of the file system or bucket."""

    @abc.abstractmethod
    def remove(self, name: str, key: str) -> None:
        """Remove the file of the holder with this key."""


class _OnDisk(_Files):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __str__(self) -> str:
        return str(self.folder)

    def read(self, name: str) -> dict[str, Any]:
        try:
            text, file = (self.folder / name).read_text(), (self.folder / name).stat().st_ino
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return _parsed(text) or {"key": f"file-{file}"}

    def create(self, name: str, mine: dict[str, Any]) -> bool:
        try:
            handle = os.open(self.folder / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w") as file:
            json.dump(mine, file)
            file.flush()
            os.fsync(file.fileno())
        return True

    def touch(self, name: str, key: str) -> None:
        os.utime(self.folder / name)

    def touched(self, name: str) -> float | None:
        try:
            return (self.folder / name).stat().st_mtime
        except FileNotFoundError:
            return None

    def clock(self) -> float:
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix=f"{LOCK}.") as file:
            return os.stat(file.name).st_mtime

    def remove(self, name: str, key: str) -> None:
        (self.folder / name).unlink(missing_ok=True)


class _InBucket(_Files):
    """A lock object is written once, as `Folder.create` does; signs of life are objects of their
    own, since writing the first again could put it in the place of another holder's."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    def __str__(self) -> str:
        return str(self.folder)

    def read(self, name: str) -> dict[str, Any]:
        try:
            data = self.folder.read(name)
        except FileNotFoundError:
            return {}
        except OSError:
            if self.folder.exists(name):
                raise
            return {}  # it went between two requests
        return _parsed(data.decode(errors="replace")) or {"key": fingerprint(data)}

    def create(self, name: str, mine: dict[str, Any]) -> bool:
        return self.folder.create(name, json.dumps(mine))

    def touch(self, name: str, key: str) -> None:
        self.folder.write(_beat(key), "")

    def touched(self, name: str) -> float | None:
        taken = self.folder.written(name)
        if taken is None:
            return None
        return max(taken, self.folder.written(_beat(self.read(name).get("key", ""))) or 0.0)

    def clock(self) -> float:
        name = _beat(uuid.uuid4().hex)
        self.folder.write(name, "")
        try:
            return self.folder.written(name) or 0.0
        finally:
            self.folder.remove(name)

    def remove(self, name: str, key: str) -> None:
        self.folder.remove(name)
        self.folder.remove(_beat(key))


def _files(folder: Path | Folder) -> _Files:
    place = open_folder(folder)
    return _InBucket(place) if place.local is None else _OnDisk(place.local)


def _beat(key: str) -> str:
    return f".beats/{key}"


def _take(files: _Files, mine: dict[str, Any]) -> str:
    """Write my file: the first, or the one after that of a dead holder. Returns its name.

    Nobody removes a dead holder's file, which by then may be another's: who takes over writes a
    file that is named after the dead holder's key, and only one can do so. It counts while every
    file before it is there; a key is never used twice.
    """
    while True:
        name, holder = _chain(files)[-1]
        if holder:
            _wait_for_death(files, name)
            name = _after(holder)
        if files.create(name, mine):
            if _chain(files)[-1][1].get("key") == mine["key"]:
                return name
            files.remove(name, mine["key"])  # the holders before it were gone by then


def _chain(files: _Files) -> list[tuple[str, dict[str, Any]]]:
    """The files of the folder's holders: dead ones, then who has it now, {} where nobody does."""
    chain = [(LOCK, files.read(LOCK))]
    while (last := chain[-1][1]) and (after := files.read(_after(last))):
        chain.append((_after(last), after))
    return chain


def _after(holder: dict[str, Any]) -> str:
    """The file of whoever took the folder over from a holder."""
    return f"{LOCK}.{holder['key']}"


def _wait_for_death(files: _Files, name: str) -> None:
    """Return once the holder is dead or its file gone. Raises InputError if it lives."""
    first, told = files.touched(name), False
    while (touched := files.touched(name)) is not None:
        holder = files.read(name)
        here = holder.get("machine") == _machine()
        if here and not _lives(holder["pid"], holder["begun"]):
            return
        if here or touched != first:
            raise InputError(
                f"{files} is in use by {_who(holder)}; wait until that has ended, stop it, "
                "or give another --out."
            )
        if files.clock() - touched > BEAT_S * STALE_BEATS:
            return
        if not told:
            print(f"Asking whether {_who(holder)} still works in {files} ...",
                  file=sys.stderr)  # fmt: skip
            told = True
        time.sleep(BEAT_S / 10)


def _me(stage: str) -> dict[str, Any]:
    return {
        "key": uuid.uuid4().hex,
        "stage": stage,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "begun": _begun(os.getpid()),
        "machine": _machine(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _who(holder: dict[str, Any]) -> str:
    if "stage" not in holder:
        return "another process"
    return (
        f"snr {holder['stage']} on {holder['host']} (process {holder['pid']}, since "
        f"{holder['since']})"
    )


def _parsed(text: str) -> dict[str, Any]:
    with suppress(ValueError):
        if isinstance(found := json.loads(text), dict) and "key" in found:
            return found
    return {}


def _machine() -> str:
    """What tells apart machines, their boots and containers: where a process id means the same."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
                  os.readlink("/proc/self/ns/pid")]  # fmt: skip
    return " ".join(parts)


def _begun(pid: int) -> str:
    """When a process began, in the kernel's ticks: ids are used again. "" where none can tell."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _lives(pid: int, begun: str) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return _begun(pid) == begun
