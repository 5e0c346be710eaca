"""Folders, globs, single files and Parquet tables, on a file system or in a bucket, as a source."""

import fnmatch
import functools
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from snr_ray.config import InputError
from snr_ray.images.collection import Raw, Source, Texts
from snr_ray.images.formats import SUFFIXES

OWN_TABLES = ("failures.parquet", "manifest.parquet", "scores.parquet")
"""Parquet files that stages write beside images and rows."""
_IMAGE_COLUMNS = "a column clean, image, img, bytes or data"


def _filesystem(text: str) -> tuple[pafs.FileSystem, str]:
    if "://" in text:
        try:
            return pafs.FileSystem.from_uri(text)
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"{text} is not a URI that can be opened ({error}).") from None
    return pafs.LocalFileSystem(), str(Path(text).expanduser().absolute())


def open_path(text: str, name: str, known: tuple[str, ...] = ()) -> Source:
    """A folder (searched with its subfolders), one file, or a glob; local or by URI.

    `#COLUMN` at the end names the image column of Parquet files; `known` are words that the user
    may have meant.

    Raises:
        InputError: if it is not there or holds no images.
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
                f"SRC must be a path that exists, a URI, or one of {', '.join(known)}, "
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
        ids = Texts(path[len(prefix) :] for path in images)
        return Source(name, ids, functools.partial(_read_file, fs, prefix, ids), folder=folder)
    tables = [
        path
        for path in visible
        if path.lower().endswith(".parquet") and PurePosixPath(path).name not in OWN_TABLES
    ]
    return _parquet(fs, tables, prefix, name, wanted, folder)


def _read_file(fs: pafs.FileSystem, prefix: str, ids: Texts, index: int) -> bytes:
    with fs.open_input_stream(prefix + ids[index]) as stream:
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
    ids: list[pa.Array] = [pa.array([], pa.string())]
    classes: list[pa.Array] = [pa.array([], pa.string())]
    groups: list[tuple[str, int]] = []  # table, row group in it
    chunks = [0]  # index of the first row of each
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
            names = _names(file, path, group, id_column)
            if "label" in file.schema_arrow.names:
                column_of_classes = file.read_row_group(group, ["label"]).column(0)
                classes.append(column_of_classes.cast(pa.string()).combine_chunks())
            chunks.append(chunks[-1] + len(names))
            ids.append(pc.binary_join_element_wise(stem, names, ""))
            groups.append((path, group))
    starts = np.array(chunks[:-1], np.int64)
    every = sum(map(len, classes)) == chunks[-1]
    return Source(
        name,
        Texts(pa.concat_arrays(ids)),
        functools.partial(_read_row, fs, column, groups, starts),
        tensors=is_tensor,
        labels=Texts(pa.concat_arrays(classes)) if every else (),
        folder=folder,
        chunks=starts,
    )


def _names(file: pq.ParquetFile, path: str, group: int, id_column: str) -> pa.StringArray:
    """What identifies each row of a row group: its id, or its place where it has none."""
    keys = pa.nulls(file.metadata.row_group(group).num_rows, pa.string())
    if id_column:
        keys = file.read_row_group(group, [id_column]).column(0).combine_chunks()
        if id_column.endswith(".path"):  # a leaf comes in its struct
            keys = keys.field("path")
        try:
            keys = keys.cast(pa.string())
        except pa.ArrowException as error:
            raise InputError(
                f"Ids of images must be text or numbers, but those of {path} are {keys.type} "
                f"({error}); name them in another column, or drop this one."
            ) from None
    unnamed = pc.equal(pc.fill_null(keys, ""), "")
    if not pc.any(unnamed).as_py():
        return keys
    return pc.if_else(unnamed, [f"{group}-{i:06d}" for i in range(len(keys))], keys)


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


def _read_row(
    fs: pafs.FileSystem,
    column: str,
    groups: list[tuple[str, int]],
    starts: npt.NDArray[np.int64],
    index: int,
) -> Raw:
    chunk = int(np.searchsorted(starts, index, side="right")) - 1
    path, group = groups[chunk]
    value = _row_group(_Hashable(fs), path, group, column)[int(index - starts[chunk])]
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
