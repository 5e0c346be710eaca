"""Outputs under a prefix in a bucket (s3://, gs://); an object appears when it is complete."""

import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow.fs as pafs

from snr_ray.bucketcreate import create_object
from snr_ray.folder import Folder, inside

WRITERS = 16
"""Objects of a folder in a bucket that are written at once."""


class BucketFolder(Folder):
    """A prefix in a bucket; see `Folder`. Objects appear when they are complete."""

    def __init__(self, uri: str, fs: pafs.FileSystem, root: str) -> None:
        self._uri, self._fs, self._root = uri, fs, root.rstrip("/")

    def __str__(self) -> str:
        return self._uri

    def __reduce__(self) -> tuple[Any, ...]:
        return BucketFolder, (self._uri, self._fs, self._root)

    @property
    def place(self) -> PurePosixPath:
        # What is pickled of a file system is all there is of its address.
        options = self._fs.__reduce__()[1][0]
        endpoint = options.get("endpoint_override", "") if isinstance(options, dict) else ""
        return PurePosixPath("/", self._fs.type_name, endpoint or "-", self._root)

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
            self.write(f"{name}/{inside(inner)}", files[inner])

        with ThreadPoolExecutor(WRITERS) as pool:
            list(pool.map(write, others))
        write(last)

    def create(self, name: str, data: bytes | str) -> bool:
        data = data.encode() if isinstance(data, str) else data
        return create_object(self._fs, self._path(name), data)

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
        # Markers of folders and signs of life are nothing that a user put here.
        selector = pafs.FileSelector(self._root, allow_not_found=True)
        return all(
            info.base_name == ".beats" or (not info.is_file and not self.list(info.base_name))
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
        uri = f"{head.rstrip('/')}/{inside(name)}{mark}{query}"
        return BucketFolder(uri, self._fs, self._path(name))

    def filesystem(self) -> tuple[pafs.FileSystem, str]:
        return self._fs, self._root

    def _path(self, name: str) -> str:
        inner = inside(name)
        return f"{self._root}/{inner}" if inner else self._root
