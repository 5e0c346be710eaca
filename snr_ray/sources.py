"""What `SRC` means: a name, path, glob or URI -> image ids, and the bytes or pixels of each.

The driver lists ids; tasks anywhere read images by index. A source is small enough to travel to
every worker (files stay where they are), and ids are stable: they decide splits, order and noise.
"""

import fnmatch
import functools
import io
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from snr_ray import samples
from snr_ray.config import ImagesConfig, InputError
from snr_ray.hashing import hash64
from snr_ray.images import SUFFIXES, Decoded, decode, prepare, scale

Array = npt.NDArray[np.float32]
Raw = bytes | npt.NDArray[np.generic]

NAMES = ("glyphs", "photos", "notmnist", "cifar10", "places365")
SPLITS = ("train", "val", "test")
OWN_TABLES = ("failures.parquet", "manifest.parquet", "scores.parquet")
"""Parquet files that stages write beside images and rows."""
CACHE = Path("~/.cache/snr_ray")


@dataclass(frozen=True)
class Source:
    """A collection of images.

    `fetch(index)` gives the file bytes, or stored pixels [H, W] or [H, W, C], of `ids[index]`.
    `group(id)` names what must stay in one split (by default the image itself). `tensors` says
    that pixels are float with white at 1, as in a data folder.
    """

    name: str
    ids: list[str]
    fetch: Callable[[int], Raw]
    group: Callable[[str], str] = field(default=str)
    tensors: bool = False
    labels: dict[str, str] = field(default_factory=dict)
    folder: Path | None = None
    """The local folder that the images lie in, if they do; results must not land there."""

    def __post_init__(self) -> None:
        if not self.ids:
            raise InputError(
                f"A source must hold at least one image ({' '.join(SUFFIXES)}) or Parquet file, "
                f"but {self.name} holds none."
            )
        if len(set(self.ids)) < len(self.ids):
            twice, times = Counter(self.ids).most_common(1)[0]
            raise InputError(
                f"Every image needs an id of its own, but {self.name} holds {times} images named "
                f"{twice!r}, which would get the same output name; rename them or drop the copies."
            )

    def read(self, index: int, white: float | None = None) -> Decoded:
        """Pixels of one image at its own size. Raises InputError if it cannot be used."""
        name, raw = self.ids[index], self._raw(index)
        if isinstance(raw, bytes):
            return decode(raw, name, white=white)
        return Decoded(scale(raw, name, white=1.0 if self.tensors else white), raw.dtype)

    def load(self, index: int, config: ImagesConfig) -> Array:
        """One image as a run wants it: [channels, size, size] float32. Raises InputError."""
        return prepare(self.read(index, config.white).pixels, config, self.ids[index])

    def select(self, split: str, limit: int | None = None) -> list[int]:
        """Indices of a split ("train", "val" or "test"), in the order of id hashes.

        The split of an image is a hash of its group (80 / 10 / 10 %), so it never changes when
        images are added, and `limit` keeps the same images whatever the split asked for.
        """
        order = sorted(range(len(self.ids)), key=lambda i: hash64(self.ids[i]))[:limit]
        return [i for i in order if self.split(i) == split]

    def split(self, index: int) -> str:
        """Split of one image."""
        share = hash64("split/" + self.group(self.ids[index])) / 2**64
        return "train" if share < 0.8 else "val" if share < 0.9 else "test"

    def file(self, index: int) -> tuple[str, bytes]:
        """File name and bytes of one image (NPY where there is no file). Raises InputError."""
        raw = self._raw(index)
        if isinstance(raw, bytes):
            return self.ids[index], raw
        out = io.BytesIO()
        np.save(out, raw, allow_pickle=False)
        return self.ids[index] + ".npy", out.getvalue()

    def _raw(self, index: int) -> Raw:
        try:
            raw = self.fetch(index)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{self.ids[index]} cannot be read ({error}).") from None
        if raw is None:
            raise InputError(f"A row must hold an image, but {self.ids[index]} is null.")
        return raw


def open_source(text: str) -> Source:
    """The source that the user's `SRC` names. Raises InputError with the way out."""
    if not text.strip():
        raise InputError(f"SRC must be a path, a URI or one of {', '.join(NAMES)}, but is empty.")
    name, _, path = text.partition(":")
    if name in NAMES and not path.startswith("//"):
        opener: dict[str, Callable[[str], Source]] = {
            "glyphs": _glyphs,
            "photos": _photos,
            "notmnist": _notmnist,
            "cifar10": _cifar10,
            "places365": _places365,
        }
        return opener[name](path)
    return _paths(text, text)


# Paths, globs and URIs ---------------------------------------------------------------------------


def _filesystem(text: str) -> tuple[pafs.FileSystem, str]:
    if "://" in text:
        try:
            return pafs.FileSystem.from_uri(text)
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"{text} is not a URI that can be opened ({error}).") from None
    return pafs.LocalFileSystem(), str(Path(text).expanduser().absolute())


def _paths(text: str, name: str) -> Source:
    """A folder (searched with its subfolders), one file, or a glob; local or by URI.

    `#COLUMN` at the end names the image column of Parquet files.
    """
    wanted = ""
    globbed = False
    if not Path(text).expanduser().exists():  # names may hold any character
        text, _, wanted = text.partition("#")
        globbed = any(c in text for c in "*[") or ("?" in text and "://" not in text)
    head, pattern = text, ""
    if globbed:
        parts = text.split("/")
        first = next(i for i, part in enumerate(parts) if any(c in part for c in "*?["))
        head, pattern = "/".join(parts[:first]) or ("/" if text.startswith("/") else "."), text
    fs, root = _filesystem(head)
    if globbed:
        pattern = f"{root.rstrip('/')}/{'/'.join(pattern.split('/')[first:])}"
    try:
        kind = fs.get_file_info(root).type
        if kind == pafs.FileType.NotFound:
            raise InputError(
                f"SRC must be a path that exists, a URI, or one of {', '.join(NAMES)}, "
                f"but {name!r} is none of these."
            )
        if kind == pafs.FileType.File:
            files, root = [root], str(PurePosixPath(root).parent)
        else:
            listed = fs.get_file_info(pafs.FileSelector(root, recursive=True))
            files = [info.path for info in listed if info.type == pafs.FileType.File]
    except OSError as error:
        raise InputError(f"{name} cannot be listed ({error}).") from None
    if globbed:
        files = [path for path in files if fnmatch.fnmatchcase(path, pattern)]
    prefix = root.rstrip("/") + "/"
    folder = Path(root).resolve() if isinstance(fs, pafs.LocalFileSystem) else None
    visible = [
        p for p in sorted(files) if not any(s[:1] == "." for s in p[len(prefix) :].split("/"))
    ]
    images = [path for path in visible if path.lower().endswith(SUFFIXES)]
    if images and not wanted:
        fetch = functools.partial(_read_file, fs, images)
        return Source(name, [path[len(prefix) :] for path in images], fetch, folder=folder)
    tables = [
        path
        for path in visible
        if path.lower().endswith(".parquet") and PurePosixPath(path).name not in OWN_TABLES
    ]
    return _parquet(fs, tables, prefix, name, wanted, folder)


def _read_file(fs: pafs.FileSystem, paths: Sequence[str], index: int) -> bytes:
    with fs.open_input_stream(paths[index]) as stream:
        return stream.read()


def _parquet(
    fs: pafs.FileSystem,
    tables: list[str],
    prefix: str,
    name: str,
    wanted: str,
    folder: Path | None,
) -> Source:
    """Parquet rows with encoded images (bytes, or a struct with bytes and path) or tensors."""
    ids: list[str] = []
    rows: list[tuple[str, int, int]] = []  # table, row group, row in it
    labels: dict[str, str] = {}
    column, is_tensor = wanted, False
    for path in tables:
        try:
            file = pq.ParquetFile(path, filesystem=fs)
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"{path} is not a readable Parquet file ({error}).") from None
        column, id_column = _columns(file.schema_arrow, path, wanted)
        is_tensor = isinstance(file.schema_arrow.field(column).type, pa.FixedShapeTensorType)
        # Ids of a data folder are those of its source already.
        stem = "" if is_tensor and id_column else path[len(prefix) :].removesuffix(".parquet") + "/"
        for group in range(file.num_row_groups):
            n_rows = file.metadata.row_group(group).num_rows
            keys: list[Any] = [None] * n_rows
            if id_column:
                keys = file.read_row_group(group, [id_column]).column(0).to_pylist()
                keys = [key["path"] if isinstance(key, dict) else key for key in keys]
            names = [f"{stem}{key or f'{group}-{i:06d}'}" for i, key in enumerate(keys)]
            if "label" in file.schema_arrow.names:
                classes = file.read_row_group(group, ["label"]).column(0).to_pylist()
                labels |= {n: str(c) for n, c in zip(names, classes, strict=True) if c is not None}
            ids += names
            rows += [(path, group, i) for i in range(n_rows)]
    fetch = functools.partial(_read_row, fs, column, rows)
    return Source(name, ids, fetch, tensors=is_tensor, labels=labels, folder=folder)


def _columns(schema: pa.Schema, path: str, wanted: str) -> tuple[str, str]:
    """Names of the image column and of the leaf that identifies a row ("" if none)."""
    for name in (wanted,) if wanted else ("clean", "image", "img", "bytes", "data"):
        if name not in schema.names:
            continue
        kind = schema.field(name).type
        if pa.types.is_struct(kind) and "bytes" in {f.name for f in kind}:
            return name, f"{name}.path" if "path" in {f.name for f in kind} else ""
        if pa.types.is_binary(kind) or isinstance(kind, pa.FixedShapeTensorType):
            return name, next((n for n in ("id", "path", "name") if n in schema.names), "")
    raise InputError(
        f"A Parquet file must have {f'the column {wanted}' if wanted else _IMAGE_COLUMNS} with "
        f"encoded images or fixed-shape tensors, but {path} has {', '.join(schema.names)}."
    )


_IMAGE_COLUMNS = "a column clean, image, img, bytes or data"


def _read_row(
    fs: pafs.FileSystem, column: str, rows: Sequence[tuple[str, int, int]], index: int
) -> Raw:
    path, group, row = rows[index]
    value = _row_group(_Hashable(fs), path, group, column)[row]
    if isinstance(value, pa.FixedShapeTensorScalar):
        tensor = value.to_numpy()
        # Tensors of a data folder are [C, H, W] float32 in [0, 1]; scale() wants channels last.
        return np.moveaxis(tensor, 0, 2) if tensor.ndim == 3 else tensor
    data = value.as_py()
    return data["bytes"] if isinstance(data, dict) else data


class _Hashable:
    """Lets a file system be a cache key: equal file systems share a cached row group."""

    def __init__(self, fs: pafs.FileSystem) -> None:
        self.fs = fs

    def __hash__(self) -> int:
        return hash(self.fs.type_name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hashable) and self.fs.equals(other.fs)


@functools.lru_cache(maxsize=4)
def _row_group(fs: _Hashable, path: str, group: int, column: str) -> pa.ChunkedArray:
    return pq.ParquetFile(path, filesystem=fs.fs).read_row_group(group, [column]).column(0)


# Named collections -------------------------------------------------------------------------------


def _glyphs(path: str) -> Source:
    _no_path("glyphs", path)
    ids = samples.glyph_ids()
    make = functools.partial(_make, samples.draw_glyph, ids)
    return Source("glyphs", ids, make, samples.group, labels=_first_folder(ids))


def _photos(path: str) -> Source:
    _no_path("photos", path)
    ids = samples.photo_ids()
    return Source("photos", ids, functools.partial(_make, samples.crop_photo, ids), samples.group)


def _make(make: Callable[[str], Raw], ids: Sequence[str], index: int) -> Raw:
    return make(ids[index])


def _first_folder(ids: Sequence[str]) -> dict[str, str]:
    return {name: name.partition("/")[0] for name in ids}


def _no_path(name: str, path: str) -> None:
    if path:
        raise InputError(f"{name} is made here and takes no path, but got {name}:{path}.")


def _notmnist(path: str) -> Source:
    """notMNIST: the tar.gz, its unpacked folder, or a download of notMNIST_small."""
    if not path:
        archive = CACHE.expanduser() / "notMNIST_small.tar.gz"
        address = "http://yaroslavvb.com/upload/notMNIST/notMNIST_small.tar.gz"
        if not archive.is_file():
            _download("notmnist", archive.name, lambda: _fetch_url(address, archive))
        path = str(archive)
    if not path.endswith((".tar.gz", ".tgz", ".tar")):
        return _paths(path, f"notmnist:{path}")
    if not Path(path).is_file():
        raise InputError(f"notmnist:PATH must be the archive or its folder, but {path} is missing.")
    ids, offsets, chunks = [], [0], []
    try:
        with tarfile.open(path) as archive_file:
            for member in archive_file:
                if member.isfile() and member.name.lower().endswith(SUFFIXES):
                    stream = archive_file.extractfile(member)
                    chunks.append(stream.read() if stream else b"")
                    ids.append("/".join(member.name.split("/")[1:]))
                    offsets.append(offsets[-1] + len(chunks[-1]))
    except (tarfile.TarError, EOFError, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{path} is not a readable tar archive ({reason}).") from None
    # One array, so that the workers of a machine share it through the object store.
    buffer = np.frombuffer(b"".join(chunks), np.uint8)
    fetch = functools.partial(_read_slice, buffer, offsets)
    return Source(f"notmnist:{path}", ids, fetch, labels=_first_folder(ids))


def _read_slice(buffer: npt.NDArray[np.uint8], offsets: Sequence[int], index: int) -> bytes:
    return buffer[offsets[index] : offsets[index + 1]].tobytes()


def _cifar10(path: str) -> Source:
    """CIFAR-10: Parquet files as data hubs publish them, a folder of images, or torchvision's."""
    root = Path(path or CACHE).expanduser()
    python = [root / "cifar-10-batches-py", root / "cifar-10-python.tar.gz"]
    if path and not any(p.exists() for p in python):
        return _paths(path, f"cifar10:{path}")
    from torchvision.datasets import CIFAR10  # only here: torch is slow to import

    def fetch() -> list[Any]:
        return [CIFAR10(str(root), train=train, download=True) for train in (True, False)]

    sets = _download("cifar10", "cifar-10-python.tar.gz", fetch)
    pixels = np.concatenate([part.data for part in sets])
    ids = [
        f"{split}/{i:05d}.png"
        for split, part in zip(SPLITS[::2], sets, strict=True)
        for i in range(len(part))
    ]
    return Source("cifar10", ids, pixels.__getitem__)


def _places365(path: str) -> Source:
    """Places365: a folder of images, or torchvision's download of the small validation set."""
    if path:
        return _paths(path, f"places365:{path}")
    root = CACHE.expanduser() / "places365"
    folder = root / "val_256"
    if not folder.is_dir():
        from torchvision.datasets import Places365

        root.mkdir(parents=True, exist_ok=True)
        _download(
            "places365",
            "val_256.tar (unpacked)",
            lambda: Places365(str(root), split="val", small=True, download=True),
        )
    return _paths(str(folder), "places365")


def _fetch_url(address: str, target: Path) -> None:
    from torchvision.datasets.utils import download_url

    target.parent.mkdir(parents=True, exist_ok=True)
    download_url(address, str(target.parent), target.name)


def _download(name: str, file: str, fetch: Callable[[], Any]) -> Any:
    try:
        return fetch()
    except Exception as error:  # urllib, ssl, tarfile and torchvision each raise their own
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise InputError(
            f"{name} could not be downloaded ({reason}); "
            f"bring {file} yourself and pass it as {name}:PATH."
        ) from None
