"""Where a run or a sweep is worked on: its folder, or, of one in a bucket, a copy on this machine.

    worker of rank 0 --metrics, curves, states, model--> bucket --metrics.jsonl--> driver
    driver --report.html, of a sweep its journal and plots--> bucket

Who writes a file writes it here first, and the bucket has it whole or as it was. Desks are small
and picklable; each process that gets one works at its own copy.
"""

import atexit
import functools
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from snr_ray.folder import Folder

SOON_S = 5.0
"""What grows all the time goes to a bucket, and is looked at there, so often."""


class Desk:
    """The folder of a run, as a path to work at; where it is on a file system, all else is nothing
    to do."""

    def __init__(self, place: Folder) -> None:
        self.place = place
        self._told: dict[str, float] = {}

    def __reduce__(self) -> tuple[type["Desk"], tuple[Folder]]:
        return Desk, (self.place,)

    @property
    def name(self) -> str:
        """The folder, as it may be told."""
        return str(self.place.local or self.place)

    @functools.cached_property
    def path(self) -> Path:
        """The folder, or the copy of one in a bucket: empty at first, gone with the process."""
        if self.place.local is not None:
            return self.place.local
        top = Path(tempfile.mkdtemp(prefix="snr-desk-"))
        atexit.register(shutil.rmtree, top, ignore_errors=True)
        path = top / self.place.filesystem()[1].rstrip("/").rpartition("/")[2]  # names the run
        path.mkdir()
        return path

    def fetch(self, *names: str) -> None:
        """Copy files, and folders with all that is in them, from the bucket, over those here.

        Raises:
            OSError: if the bucket does not give what it has.
        """
        for name in self._far(names):
            for file in self.place.list(name) or [name]:
                with suppress(FileNotFoundError):  # it has just been removed, or never was
                    data = self.place.read(file)
                    target = self.path / file
                    target.parent.mkdir(parents=True, exist_ok=True)
                    partial = target.with_name(f".{target.name}.fetched")
                    partial.write_bytes(data)
                    os.replace(partial, target)

    def keep(self, *names: str, last: str = "") -> None:
        """Copy files, and folders with all that is in them, to the bucket, in this order.

        Args:
            names: of what is here; what is not is left out.
            last: file of a folder that tells that the others are there.

        Raises:
            OSError: if the bucket does not take them.
        """
        for name in self._far(names):
            for file in sorted(self._files(name), key=lambda file: (file == last, file)):
                self.place.write(file, (self.path / file).read_bytes())

    def drop(self, name: str, which: Callable[[str], bool] = lambda file: True) -> None:
        """Remove from the bucket what is no longer here: files of a folder, or a file.

        `which` names those that are this desk's.
        """
        for folder in self._far([name]):
            here = set(self._files(folder))
            for file in self.place.list(folder) or [folder]:
                if file not in here and which(file):
                    self.place.remove(file)

    def soon(self, name: str) -> bool:
        """Whether it is time for something that is done all the time: always, on a file system."""
        if self.place.local is None and time.monotonic() - self._told.get(name, -SOON_S) < SOON_S:
            return False
        self._told[name] = time.monotonic()
        return True

    def _far(self, names: "tuple[str, ...] | list[str]") -> "tuple[str, ...] | list[str]":
        return names if self.place.local is None else ()

    def _files(self, name: str) -> list[str]:
        path = self.path / name
        found = path.rglob("*") if path.is_dir() else [path]
        return [file.relative_to(self.path).as_posix() for file in found if file.is_file()]
