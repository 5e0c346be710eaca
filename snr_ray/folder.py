"""One place for outputs: what a folder on a file system and a prefix in a bucket have in common.

Files and objects are there whole or not at all. Names are relative, with `/` between their parts.
Folders are small and picklable: tasks on any node get them as they are.
"""

import abc
from collections.abc import Mapping
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

import pyarrow.fs as pafs

from snr_ray.errors import InputError

JOB = "job.json"
"""What decides the contents of an output folder; `outputs.claim` writes it."""


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
    @abc.abstractmethod
    def place(self) -> PurePath:
        """The same path for all spellings: by it, what lies in what can be told."""

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


def inside(name: str) -> str:
    """A relative name in its plain form; "" for the folder itself.

    Raises:
        InputError: if it leads out of the folder.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise InputError(f"Names must stay inside the output folder, but got {name!r}.")
    return "" if str(path) == "." else str(path)
