"""Parquet tables as a source: rows with encoded images (bytes, or a struct of bytes and path) or
with tensors. Each table names its columns as it likes; one that is broken is one failed item,
and rows that share a name are told apart by their place."""

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from snr_ray.errors import InputError
from snr_ray.images.collection import Raw, Source, Texts
from snr_ray.images.formats.codec import split
from snr_ray.images.places import Place

IMAGE_COLUMNS = ("clean", "image", "img", "bytes", "data")
ID_COLUMNS = ("id", "path", "name")


@dataclass(frozen=True)
class Columns:
    """What a table calls its images and what identifies them."""

    image: str
    id: str
    """Column or leaf; "" where rows have no name."""
    tensors: bool


@dataclass
class _Rows:
    """Row groups of all tables, in order."""

    groups: list[tuple[str, int, str]] = field(default_factory=list)
    """Table, row group in it, image column; a row group of -1 is a table that cannot be read, and
    the last entry says why."""
    ids: list[pa.Array] = field(default_factory=lambda: [pa.array([], pa.string())])
    classes: list[pa.Array] = field(default_factory=lambda: [pa.array([], pa.string())])
    columns: dict[str, None] = field(default_factory=dict)
    """Of all tables."""
    starts: list[int] = field(default_factory=lambda: [0])
    """Index of the first row of each group, and the number of rows."""

    def add(self, ids: pa.Array, group: tuple[str, int, str]) -> None:
        self.ids.append(ids)
        self.groups.append(group)
        self.starts.append(self.starts[-1] + len(ids))


def table_source(
    place: Place, tables: Sequence[str], prefix: str, source: functools.partial[Source]
) -> Source:
    """The rows of tables.

    Args:
        place: where they are; its column is the one that was asked for.
        tables: their names, relative to `prefix`.
        source: makes the Source; what does not depend on the tables is set.

    Raises:
        InputError: if none of them holds images.
    """
    rows = _Rows()
    left_out = source.keywords["left_out"]
    tensors: bool | None = None
    refused: InputError | None = None
    for name in tables:
        path = prefix + name
        try:
            file = _opened(place.fs, path)
            columns = _columns(file.schema_arrow, path, place.column)
            if tensors is not None and tensors != columns.tensors:
                left_out.add("tables of tensors beside tables of files, or the reverse", name)
                continue
            mine = _table_rows(file, path, name, columns)
        except InputError as error:  # a table of something else
            left_out.add("tables without images", name)
            refused = refused or error
        except (pa.ArrowException, OSError) as error:
            reason = f"{path} is not a readable Parquet file ({error})."
            rows.add(pa.array([name]), (path, -1, reason))
            refused = refused or InputError(reason)
        else:
            tensors = columns.tensors
            rows.columns |= dict.fromkeys(file.schema_arrow.names)
            for ids, classes, group in mine:
                rows.add(ids, group)
                rows.classes.append(classes)
    if refused and tensors is None:
        raise refused
    starts = np.array(rows.starts[:-1], np.int64)
    every = sum(map(len, rows.classes)) == rows.starts[-1]
    return source(
        Texts(pa.concat_arrays(rows.ids)),
        functools.partial(_read_row, place.fs, rows.groups, starts),
        tensors=bool(tensors),
        labels=Texts(pa.concat_arrays(rows.classes)) if every else (),
        chunks=starts,
        columns=tuple(rows.columns),
        column=functools.partial(_read_column, place.fs, rows.groups, np.diff(rows.starts)),
        stamps=functools.partial(_stamp, place.fs, rows.groups, starts),
    )


def _opened(fs: pafs.FileSystem, path: str) -> pq.ParquetFile:
    return pq.ParquetFile(path, filesystem=fs, page_checksum_verification=True)


def _table_rows(
    file: pq.ParquetFile, path: str, name: str, columns: Columns
) -> list[tuple[pa.Array, pa.Array, tuple[str, int, str]]]:
    """Ids, classes and place of each row group."""
    # Ids of a data folder are those of its source already.
    own = columns.tensors and bool(columns.id)
    stem = "" if own else name.removesuffix(".parquet") + "/"
    found = []
    every = [_safe(_names(file, path, k, columns.id)) for k in range(file.num_row_groups)]
    for group, names in enumerate(every if own else _told_apart(every)):
        ids = pc.binary_join_element_wise(stem, names, "")
        classes = pa.array([], pa.string())
        if "label" in file.schema_arrow.names:
            labels = file.read_row_group(group, ["label"]).column(0)
            with contextlib.suppress(pa.ArrowException):  # lists or structs, which name no class
                classes = labels.cast(pa.string()).combine_chunks()
        found.append((ids, classes, (path, group, columns.image)))
    return found


def _told_apart(groups: list[pa.StringArray]) -> list[pa.StringArray]:
    """Names of the rows of each row group, with their place where several rows share one: hubs keep
    the last part of a path alone, which files of many folders share."""
    names, counts = pc.value_counts(pa.chunked_array(groups, pa.string())).flatten()
    shared = names.filter(pc.greater(counts, 1))
    if not len(shared):
        return groups
    apart = []
    for group, ids in enumerate(groups):
        again = pc.is_in(ids, value_set=shared)
        places = [(*split(ids[i].as_py()), i) for i in np.flatnonzero(again)]
        numbered = [f"{stem}-{group}-{i:06d}{suffix}" for stem, suffix, i in places]
        apart.append(pc.replace_with_mask(ids, again, pa.array(numbered, pa.string())))
    return apart


def _safe(ids: pa.StringArray) -> pa.StringArray:
    """Ids as relative paths: results are written under them, in the output folder alone."""
    ids = pc.replace_substring_regex(ids, "^/+", "")
    climbs = pc.match_substring_regex(ids, r"(^|/)\.\.(/|$)")
    if not pc.any(climbs).as_py():
        return ids
    mended = pa.array(["/".join("__" if p == ".." else p for p in i.split("/")) for i in
                       ids.filter(climbs).to_pylist()], pa.string())  # fmt: skip
    return pc.replace_with_mask(ids, climbs, mended)


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


def _columns(schema: pa.Schema, path: str, wanted: str) -> Columns:
    """The image column and what identifies a row. Raises InputError if there is no image."""
    for name in (wanted,) if wanted else IMAGE_COLUMNS:
        if name not in schema.names:
            continue
        for read in (name, *ID_COLUMNS, "label"):
            if schema.names.count(read) > 1:
                raise InputError(
                    "Columns must have names of their own, but "
                    f"{path} has {schema.names.count(read)} called {read}; rename or drop all but "
                    "one."
                )
        kind = schema.field(name).type
        fields = {f.name: f.type for f in kind} if pa.types.is_struct(kind) else {}
        if _is_bytes(fields.get("bytes", pa.null())):
            return Columns(name, f"{name}.path" if "path" in fields else "", False)
        tensors = isinstance(kind, pa.FixedShapeTensorType)
        if tensors:
            _check_tensors(kind, name, path)
        if tensors or _is_bytes(kind):
            return Columns(name, next((n for n in ID_COLUMNS if n in schema.names), ""), tensors)
    columns = f"a column {', '.join(IMAGE_COLUMNS[:-1])} or {IMAGE_COLUMNS[-1]}"
    raise InputError(
        f"A Parquet file must have {f'the column {wanted}' if wanted else columns} with "
        f"encoded images or fixed-shape tensors, but {path} has "
        + ", ".join(f"{f.name} ({f.type})" if f.name in (wanted, *IMAGE_COLUMNS) else f.name
                    for f in schema)
        + "."
    )  # fmt: skip


def _check_tensors(kind: pa.FixedShapeTensorType, name: str, path: str) -> None:
    """Raise InputError for tensors that are no images as a data folder has them."""
    shape, order = list(kind.shape), kind.permutation or []
    channels = shape[0] if len(shape) == 3 else 1
    if len(shape) not in (2, 3) or channels not in (1, 3) or list(order) != sorted(order):
        turned = f" in the order {list(order)}" if list(order) != sorted(order) else ""
        raise InputError(
            f"Tensors of images must be [H, W], [1, H, W] or [3, H, W], but {name} of {path} holds "
            f"{shape}{turned}; move the channels to the front, or store encoded images."
        )


def _is_bytes(kind: pa.DataType) -> bool:
    types = pa.types
    if types.is_dictionary(kind):  # of files that repeat
        return _is_bytes(kind.value_type)
    return bool(
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_binary_view(kind)
        or types.is_fixed_size_binary(kind)
    )


def _place_of(groups: list[tuple[str, int, str]], starts: npt.NDArray[np.int64], index: int) -> int:
    return int(np.searchsorted(starts, index, side="right")) - 1


def _read_row(
    fs: pafs.FileSystem,
    groups: list[tuple[str, int, str]],
    starts: npt.NDArray[np.int64],
    index: int,
) -> Raw:
    chunk = _place_of(groups, starts, index)
    path, group, column = groups[chunk]
    if group < 0:
        raise InputError(column)
    value = _row_group(_Hashable(fs), path, group, column)[int(index - starts[chunk])]
    if isinstance(value, pa.FixedShapeTensorScalar):
        tensor = value.to_numpy()
        # Tensors of a data folder are [C, H, W] float32 in [0, 1]; scale() wants channels last.
        return np.moveaxis(tensor, 0, 2) if tensor.ndim == 3 else tensor
    data = value.as_py()
    return data["bytes"] if isinstance(data, dict) else data


def _read_column(
    fs: pafs.FileSystem,
    groups: list[tuple[str, int, str]],
    lengths: npt.NDArray[np.int64],
    name: str,
) -> pa.StringArray:
    """A column of all tables as text; null in those that lack it or cannot be read."""
    found = []
    for (path, group, _), length in zip(groups, lengths, strict=True):
        file = None if group < 0 else _opened(fs, path)
        if file is None or name not in file.schema_arrow.names:
            found.append(pa.nulls(length, pa.string()))
            continue
        values = file.read_row_group(group, [name]).column(0)
        try:
            found.append(values.cast(pa.string()).combine_chunks())
        except pa.ArrowException:
            raise InputError(
                f"A column that groups images must hold text or numbers, but {name} of {path} "
                f"holds {values.type}; name another with images.group."
            ) from None
    return pa.concat_arrays(found)


def _stamp(
    fs: pafs.FileSystem,
    groups: list[tuple[str, int, str]],
    starts: npt.NDArray[np.int64],
    index: int,
) -> str:
    return _table_stamp(_Hashable(fs), groups[_place_of(groups, starts, index)][0])


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
    return _opened(fs.fs, path).read_row_group(group, [column]).column(0)


@functools.lru_cache(maxsize=64)
def _table_stamp(fs: _Hashable, path: str) -> str:
    info = fs.fs.get_file_info(path)
    return f"{info.size}-{info.mtime_ns}"
