"""One driver at a time in an output folder: a lock that ends with its owner, on shared disks too.

The holder's file says who it is, and is touched every few seconds. A holder on this machine is
gone when its process is; one elsewhere when its file was not touched for a minute by the clock of
the file system, which all machines share.
"""

import json
import os
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

from snr_ray.config import InputError, RunError

LOCK = ".lock"
BEAT_S = 5.0
"""Seconds between two signs of life."""
STALE_BEATS = 12
"""A holder that missed so many is dead."""


@contextmanager
def locked(folder: Path, stage: str) -> Iterator[None]:
    """Hold an existing folder; whoever else asks for it meanwhile is told who has it.

    Args:
        folder: what must not have two drivers.
        stage: of the holder, for the sentence that others read.

    Raises:
        InputError: if a driver that lives holds it.
        RunError: at the end, if another driver took the folder because this one had stood still.
    """
    mine = _me(stage)
    path = _take(folder, mine)
    lost, done = threading.Event(), threading.Event()

    def beat() -> None:
        while not done.wait(BEAT_S):
            if _chain(folder)[-1][1].get("key") != mine["key"]:
                lost.set()
                os.kill(os.getpid(), signal.SIGINT)  # as Ctrl-C: stages know how to stop
                return
            with suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    except KeyboardInterrupt:
        if not lost.is_set():
            raise
    finally:
        done.set()
        thread.join()
        chain = _chain(folder)
        holder = chain[-1][1]
        if holder.get("key") == mine["key"]:
            for file, _ in chain:  # the first of them first: without it the others mean nothing
                file.unlink(missing_ok=True)
    if lost.is_set():
        raise RunError(
            f"{folder} was taken over by {_who(holder)}, because this process had shown no "
            f"sign of life for {BEAT_S * STALE_BEATS:.0f} seconds; what it did until then is kept."
        )


def check_free(folder: Path) -> None:
    """Raise InputError if a driver that lives holds the folder; for before anything is removed."""
    path, holder = _chain(folder)[-1]
    if holder:
        _wait_for_death(path)


def _take(folder: Path, mine: dict[str, Any]) -> Path:
    """Write my file: the first, or the one after that of a dead holder. Returns its path.

    Nobody removes a dead holder's file, which by then may be another's: who takes over writes a
    file that is named after the dead holder's key, and the file system lets only one do so. It
    counts while every file before it is there; a key is never used twice.
    """
    while True:
        path, holder = _chain(folder)[-1]
        if holder:
            _wait_for_death(path)
            path = _after(path, holder)
        if _create(path, mine):
            if _chain(folder)[-1][1].get("key") == mine["key"]:
                return path
            path.unlink(missing_ok=True)  # the holders before it were gone by then


def _chain(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The files of the folder's holders: dead ones, then who has it now, {} where nobody does."""
    chain = [(folder / LOCK, _read(folder / LOCK))]
    while chain[-1][1] and (after := _read(path := _after(*chain[-1]))):
        chain.append((path, after))
    return chain


def _after(path: Path, holder: dict[str, Any]) -> Path:
    """The file of whoever took the folder over from a holder."""
    return path.with_name(f"{LOCK}.{holder['key']}")


def _create(path: Path, mine: dict[str, Any]) -> bool:
    """Write a lock file, if there is none."""
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    with os.fdopen(handle, "w") as file:
        json.dump(mine, file)
        file.flush()
        os.fsync(file.fileno())
    return True


def _wait_for_death(path: Path) -> None:
    """Return once the holder is dead or its file gone. Raises InputError if it lives."""
    first, told = _touched(path), False
    while (touched := _touched(path)) is not None:
        holder = _read(path)
        here = holder.get("machine") == _machine()
        if here and not _lives(holder["pid"], holder["begun"]):
            return
        if here or touched != first:
            raise InputError(
                f"{path.parent} is in use by {_who(holder)}; wait until that has ended, stop it, "
                "or give another --out."
            )
        if _clock(path.parent) - touched > BEAT_S * STALE_BEATS:
            return
        if not told:
            print(f"Asking whether {_who(holder)} still works in {path.parent} ...",
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


def _read(path: Path) -> dict[str, Any]:
    """What the holder wrote, only a key while it writes; {} where there is no file."""
    try:
        text, file = path.read_text(), path.stat().st_ino
    except OSError:
        return {}
    with suppress(ValueError):
        if isinstance(found := json.loads(text), dict) and "key" in found:
            return found
    return {"key": f"file-{file}"}


def _touched(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None


def _clock(folder: Path) -> float:
    """Now, by the clock of the file system."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=f"{LOCK}.") as file:
        return os.stat(file.name).st_mtime


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
