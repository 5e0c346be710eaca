"""Which images a denoising job is about: those of a source, or those that another job failed at.

`--images OUT/failures.parquet` means the images in that table, which says what source they are of.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from snr_ray.address import open_folder, without_secrets
from snr_ray.errors import InputError
from snr_ray.folder import Folder
from snr_ray.images.collection import Source, Texts
from snr_ray.images.datafolder import FAILURES_SCHEMA, parquet_bytes
from snr_ray.images.sources import NAMES
from snr_ray.stages.job.inputs import open_images

NAME = "failures.parquet"
_SOURCE = b"snr_ray.source"
"""Where the schema of a table of failures says which SRC they are of."""


@dataclass(frozen=True)
class Asked:
    """What a user asked for."""

    source: Source
    text: str
    """SRC, such that it means the same from any folder."""
    wanted: npt.NDArray[np.bool_]
    """Which of the source's images, [n]."""


def asked_for(text: str) -> Asked:
    """What the user's SRC means. Raises InputError with the way out."""
    folder = _folder_of_list(text)
    if folder is None:
        source = open_images(text)
        return Asked(source, anywhere(text), np.ones(len(source.ids), bool))
    table = read_failures(folder)
    origin = (table.schema.metadata or {}).get(_SOURCE, b"").decode()
    if not origin:
        raise InputError(
            f"A list of failures must say what source they are of, but {text} does not: it is of "
            "an older snr_ray; run its own command again."
        )
    source = open_images(origin)
    ids = source.ids
    assert isinstance(ids, Texts)
    named = table["id"].combine_chunks().cast(ids.array.type)
    wanted = pc.is_in(ids.array, value_set=named)
    found = np.asarray(wanted.to_numpy(zero_copy_only=False), bool)
    if not found.any():
        raise InputError(
            f"A list of failures must name images of its source, but {text} names "
            f"{len(table)}, none of which are in {origin}."
        )
    return Asked(source, origin, found)


def write_failures(out: Folder, tables: Sequence[pa.Table], text: str) -> int:
    """Write what failed of a source; how many that are."""
    table = pa.concat_tables([FAILURES_SCHEMA.empty_table(), *tables]).sort_by("id")
    table = table.replace_schema_metadata({_SOURCE: without_secrets(text).encode()})
    out.write(NAME, parquet_bytes(table))
    return len(table)


def read_failures(out: Folder) -> pa.Table:
    """What failed; nothing where no such table is. Raises InputError if it is damaged."""
    if not out.exists(NAME):
        return FAILURES_SCHEMA.empty_table()
    try:
        return pq.read_table(pa.BufferReader(out.read(NAME))).select(FAILURES_SCHEMA.names)
    except (pa.ArrowException, KeyError) as error:
        raise InputError(
            f"{out}/{NAME} must be a list of failures, but is not ({error})."
        ) from None


def anywhere(text: str) -> str:
    """A SRC that means the same in any working folder."""
    name, mark, path = text.partition(":")
    if "://" in text or text in NAMES:
        return text
    if name in NAMES and mark:
        return f"{name}:{os.path.abspath(os.path.expanduser(path))}"
    return os.path.abspath(os.path.expanduser(text))


def _folder_of_list(text: str) -> Folder | None:
    """Where a table of failures lies; None if SRC is something else."""
    place, mark, query = text.partition("?") if "://" in text else (text, "", "")
    above, _, name = place.rpartition("/")
    if name != NAME:
        return None
    folder = open_folder(f"{above}{mark}{query}" if "://" in text else Path(text).parent)
    try:
        names = pq.read_schema(pa.BufferReader(folder.read(NAME))).names
    except (pa.ArrowException, OSError):
        return None
    return folder if set(FAILURES_SCHEMA.names) <= set(names) else None
