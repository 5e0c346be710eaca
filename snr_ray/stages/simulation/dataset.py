"""Source or data folder -> Ray Data rows -> the pairs that training and evaluation work on.

rows (id, clean, noisy_*, error) --materialize--> Pairs in shared memory, any order

Sets too large for that are read from the shards of a data folder, without Ray: `shardfeed`.
"""

import functools
import heapq
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray

from snr_ray import configfile as configs
from snr_ray.config import Config
from snr_ray.errors import InputError, check
from snr_ray.folder import Folder
from snr_ray.hashing import hash64
from snr_ray.images.collection import Source
from snr_ray.images.datafolder import (
    DataFolder,
    Failure,
    image_columns,
    read_failures,
    row_bytes,
    tensors,
)
from snr_ray.images.groups import NONE, Grouped
from snr_ray.images.places import shown
from snr_ray.learning.batches import Pairs
from snr_ray.stages.job.connection import ON_CORES
from snr_ray.stages.job.inputs import open_images, split_images
from snr_ray.stages.simulation.simulate import stream

MEMORY_SHARE = 0.5
"""Sets up to this share of the object store are kept in memory; larger ones are read from files."""


@dataclass(frozen=True)
class Origin:
    """Where rows come from: a source (noise simulated on the way) or a data folder."""

    images: str | None = None
    data: Path | str | Folder | None = None

    def __post_init__(self) -> None:
        if (self.images is None) == (self.data is None):
            raise InputError("Give either --images SRC or --data DIR, and not both.")

    @functools.cached_property
    def source(self) -> Source:
        """The source, listed once."""
        return open_images(str(self.images))

    def grouped(self, group: str | None) -> Grouped:
        """The source with its splits as images.group says; found, and told, once."""
        if group not in self._grouped:
            found = split_images(self.source, group)
            self._grouped[group] = self._grouped[found.group] = found
        return self._grouped[group]

    @functools.cached_property
    def _grouped(self) -> dict[str | None, Grouped]:
        return {}

    @property
    def inputs(self) -> dict[str, Any]:
        """What `claim` goes by, so that pictures of a result do not become images of the source."""
        if self.images is None:
            return {}
        return {"inputs": self.source.folder, "inputs_alone": self.source.alone}

    @functools.cached_property
    def folder(self) -> DataFolder:
        """The data folder, checked once; workers on any node open it."""
        assert self.data is not None
        return DataFolder.open(self.data)

    @property
    def name(self) -> str:
        """What the user typed, without keys of buckets."""
        return shown(str(self.data if self.images is None else self.images))


def settle(config: Config, origin: Origin) -> Config:
    """The config that fits the origin: a data folder decides its images and noise sections, images
    what keeps them together in one split.

    Raises:
        InputError: if the data folder is none, damaged, or of another version, if a decoder that
            makes noise of whole images is to be trained on crops, or if images cannot be grouped as
            images.group says.
    """
    if origin.data is None:
        config = settled = configs.replace(
            config, {"images.group": origin.grouped(config.images.group).group}
        )
    else:
        settled = origin.folder.settle(config)
    check_decoder(settled)
    mine, stored = configs.to_dict(config), configs.to_dict(settled)
    for section in ("images", "noise"):
        for key, value in stored[section].items():
            if mine[section][key] != value:
                print(
                    f"{origin.name} was simulated with {section}.{key}={value}, which is used in "
                    f"place of {mine[section][key]}.",
                    file=sys.stderr,
                )
    return settled


def check_decoder(config: Config) -> None:
    """Raise InputError where a decoder that makes noise of whole images is to learn from crops."""
    model, crop = config.model, config.images.crop
    needs = "kind=itnet" if model.kind == "itnet" else "decoder=operator"
    check(
        crop is None or model.kind == "unet" or (model.kind, model.decoder) == ("hvae", "network"),
        f"model.{needs} needs whole images, but these are crops of {crop} pixels, whose noise "
        "comes from the rest of the image too; let it be learned: --config "
        "network, without a train.start whose decoder is another.",
    )


def count_rows(config: Config, origin: Origin, split: str) -> int:
    """Images of a split, those that will fail included. Needs no Ray.

    Raises:
        InputError: if the split is empty, or none of its images can be used.
    """
    if origin.images is not None:
        source = origin.grouped(config.images.group).source
        rows = source.select(split, config.images.limit)
        count = len(rows)
        source.check(rows, config.images)
    else:
        count = origin.folder.count_rows(split)
    if not count:
        failed = [] if origin.data is None else read_failures(origin.folder.place)
        raise InputError(
            f"The {split} split must hold images, but that of {origin.name} is empty; "
            + (
                f"{len(failed)} images of it could not be used, such as: {failed[0]['reason']}"
                if failed
                else f"splits are 80 / 10 / 10 % by hash of {_whose(config)}."
            )
        )
    return count


def _whose(config: Config) -> str:
    if config.images.group in (None, NONE):
        return "the image id, so give more images"
    return (
        f"its group (images.group={config.images.group}), so give images of more groups, or split "
        f"image by image with images.group={NONE}"
    )


def open_rows(
    config: Config, origin: Origin, split: str, limit: int | None = None
) -> "ray.data.Dataset":
    """Rows of a split, in the order of id hashes or of the shards; at most `limit`. Lazy."""
    if origin.images is not None:
        source = origin.grouped(config.images.group).source
        rows = source.select(split, config.images.limit)[:limit]
        return stream(source, source.gathered(rows), config)
    # One shard per task: the reader of Ray would pack small shards into a single one.
    names = [{"name": name} for name in origin.folder.shards(split)]
    items = ray.data.from_items(names, override_num_blocks=len(names))
    read = functools.partial(_read_shard, folder=origin.folder)
    dataset = items.map_batches(read, batch_size=1, batch_format="pyarrow", **ON_CORES)
    return dataset if limit is None else dataset.limit(limit)


def fits_in_memory(config: Config, count: int) -> bool:
    """Whether rows of this config fit the object store of every node beside all else it holds."""
    return count * row_bytes(config.images, len(config.noise.n_views)) <= memory_for_rows()


def memory_for_rows() -> float:
    """Bytes of the object store of every node that rows may take."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return MEMORY_SHARE * min(node.get("object_store_memory", 0.0) for node in nodes)


def gather(batches: Iterator[pa.Table], config: Config) -> tuple[Pairs, list[Failure]]:
    """Tables of rows as Pairs, without copying where a block has no failed image.

    Images are numbered in the order of their ids, whatever order the blocks came in.

    Raises:
        InputError: if every image failed.
    """
    blocks, failures = [], []
    for table in batches:
        if "error" in table.column_names:
            bad = _failures(table)
            failures += bad
            if bad:
                table = _good(table)
        if len(table):
            blocks.append(table)
    if not blocks:
        why = f": {failures[0]['reason']}" if failures else "."
        raise InputError(f"Of {len(failures)} images none can be used{why}")
    ids = [i for table in blocks for i in table["id"].to_pylist()]
    clean, *noisy = ([tensors(t[name]) for t in blocks] for name in image_columns(config))
    pairs = Pairs(
        ids=ids,
        clean=clean,
        noisy=noisy,
    )
    return pairs, failures


def failed_images(rows: "ray.data.Dataset") -> list[Failure]:
    """The images of materialized rows that could not be read."""
    if "error" not in rows.schema().names:
        return []
    told = rows.select_columns(["id", "error"])
    tables = told.iter_batches(batch_size=None, batch_format="pyarrow")
    return [failure for table in tables for failure in _failures(table)]


def _failures(table: pa.Table) -> list[Failure]:
    bad = table.select(["id", "error"]).filter(pc.not_equal(table["error"], ""))
    return [{"id": row["id"], "stage": "read", "reason": row["error"]} for row in bad.to_pylist()]


def collect_pairs(rows: "ray.data.Dataset", config: Config) -> tuple[Pairs, list[Failure]]:
    """Rows as Pairs in this process, and the images that failed."""
    batches = rows.iter_batches(batch_size=None, batch_format="pyarrow")
    return gather(iter(batches), config)


def draw_pairs(rows: "ray.data.Dataset", n: int, config: Config) -> Pairs:
    """At most n of the images of materialized rows that could be read, as Pairs: those with the
    smallest hashes, which stand for all. Rows come as tables hold them, which often are sorted."""
    told = rows.select_columns(["id", "error"]).iter_batches(
        batch_size=None, batch_format="pyarrow"
    )
    good = (name for table in told for name in _good(table)["id"].to_pylist())
    names = pa.array(heapq.nsmallest(n, good, key=hash64), pa.string())
    chosen = rows.map_batches(
        functools.partial(_named, names=names), batch_size=None, batch_format="pyarrow", **ON_CORES
    )
    return collect_pairs(chosen, config)[0]


def _good(table: pa.Table) -> pa.Table:
    return table.filter(pc.equal(table["error"], ""))


def _named(table: pa.Table, *, names: pa.StringArray) -> pa.Table:
    return table.filter(pc.is_in(table["id"], value_set=names))


def _read_shard(item: pa.Table, *, folder: DataFolder) -> pa.Table:
    with folder.shard(item["name"][0].as_py()) as file:
        return file.read().replace_schema_metadata(None)
