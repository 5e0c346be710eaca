"""Images -> rows of clean and noisy tensors, in Ray Data CPU tasks; streamed, or as Parquet shards.

    source index -> decode, crop, resize -> clean [C, H, W] -> one noisy [C, H, W] per noise spec

A shard of a data folder is the unit of work: it appears whole or not at all, so a killed job
continues where it stopped.
"""

import contextlib
import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from snr_ray import __version__
from snr_ray import configfile as configs
from snr_ray.address import open_folder
from snr_ray.config import Config
from snr_ray.errors import InputError, RunError
from snr_ray.folder import Folder, NotShared
from snr_ray.hashing import fingerprint, hash64
from snr_ray.images.collection import SPLITS, Source
from snr_ray.images.datafolder import (
    FORMAT,
    WRITING,
    Failure,
    failures_bytes,
    noisy_column,
    read_metadata,
    row_bytes,
    tensor_array,
    whole,
)
from snr_ray.lock import check_free, locked
from snr_ray.noise.operator import noise_operator, noise_specs, spec_hash
from snr_ray.noise.spec import photon_seeds
from snr_ray.outputs import FILES, Progress, claim
from snr_ray.stages.job.connection import ON_CORES, connected, cpus, shared
from snr_ray.stages.job.counters import count_bytes, count_images
from snr_ray.stages.job.inputs import open_images, split_images
from snr_ray.stages.job.outcome import Outcome
from snr_ray.stages.job.pools import has_autoscaler
from snr_ray.stages.job.waiting import patience

SHARD_BYTES = 128 * 2**20
"""Tensors of a shard; readers want files of 64 to 256 MB."""
GROUP_BYTES = 8 * 2**20
"""Tensors of a row group: what a task holds in memory at once."""
MIN_SHARD_ROWS = 256
"""Small sets are cut down to this, so that every core gets shards."""
MAY_COME = 128
"""Cores that an autoscaler may bring, which nobody says: shards are as if they were there."""
STREAM_ROWS = 256
"""Rows per task where rows are streamed."""


def simulate(
    config: Config, *, images: str, out: Path | str | Folder, overwrite: bool = False
) -> Outcome:
    """Write a data folder of a source. Continues an interrupted job; a finished one is left alone.

    Raises:
        InputError: for a source, folder or setting the user can put right.
    """
    grouped = split_images(open_images(images), config.images.group)
    source = grouped.source
    config = configs.replace(config, {"images.group": grouped.group})
    source.check(source.select("train", config.images.limit), config.images)
    noise = noise_specs(config.noise)
    out = open_folder(out)
    check_free(out)
    claim(
        out,
        {
            "stage": "simulate",
            "source": source.identity,
            "ids": fingerprint(source.ids),
            FILES: source.files(),
            "noise": spec_hash(noise, config.images.size),
            **{f"images.{k}": v for k, v in configs.to_dict(config)["images"].items()},
        },
        owned=(*SPLITS, "manifest.json", "failures.parquet", "plan.json"),
        overwrite=overwrite,
        inputs=source.folder,
        inputs_alone=source.alone,
    )
    done, rows_per_shard = _outcome(out), _rows_per_shard(out)
    if done and rows_per_shard:
        plan = _plan(config, source, rows_per_shard)
        if all(whole(out, shard["path"]) for shard in plan):
            return done
    with locked(out, "simulate"), connected():
        rows_per_shard = _rows_per_shard(out) or _settled(config, source, out)
        plan = _plan(config, source, rows_per_shard)
        todo = [shard for shard in plan if not whole(out, shard["path"])]
        if todo:
            out.remove("manifest.json")
            _write_shards(plan, todo, source, config, out)
        return _finish(config, source, out, plan)


def stream(source: Source, rows: npt.NDArray[np.int64], config: Config) -> "ray.data.Dataset":
    """The same rows without files: a lazy Ray Data set of id, clean, noisy_* and error.

    A failed image has its reason in `error` and zeros for pixels; its noise is never computed.
    """
    blocks = [rows[i : i + STREAM_ROWS] for i in range(0, len(rows), STREAM_ROWS)]
    task = functools.partial(_stream_batch, source=ray.put(source), config=config)
    items = ray.data.from_numpy(blocks)
    return items.map_batches(task, batch_size=None, batch_format="numpy", **ON_CORES)


def simulate_rows(
    source: Source, rows: npt.NDArray[np.int64], config: Config
) -> tuple[pa.Table, list[Failure]]:
    """Clean and noisy tensors of the images at `rows` that can be read, and why others cannot."""
    side = config.images.size
    images = np.empty((len(rows), config.images.channels, side, side), np.float32)
    good, failures = np.ones(len(rows), bool), []
    for k in np.argsort(rows):  # neighbours share files and row groups
        try:
            images[k] = source.load(rows[k], config.images)
        except InputError as error:
            good[k] = False
            failures.append({"id": source.ids[rows[k]], "stage": "read", "reason": str(error)})
    images = images if good.all() else images[good]
    ids = [source.ids[row] for row in rows[good]]
    versions = {"clean": images}
    for spec in noise_specs(config.noise):
        seeds = photon_seeds(ids) if spec.photons else None
        versions[noisy_column(spec.n_views)] = noise_operator(spec, side, side)(images, seeds)
    columns: dict[str, Any] = {"id": pa.array(ids, pa.string())}
    for name, version in versions.items():
        cut = version if config.images.crop is None else crops(version, ids, config.images.crop)
        columns[name] = tensor_array(cut)
    return pa.table(columns), failures


def crops(images: npt.NDArray[np.float32], ids: list[str], side: int) -> npt.NDArray[np.float32]:
    """A square [n, C, side, side] of each of images [n, C, H, W], at a place drawn by its id."""
    out = np.empty((*images.shape[:2], side, side), np.float32)
    for k, name in enumerate(ids):
        place = hash64(f"crop/{name}")
        rows, columns = (extent - side + 1 for extent in images.shape[2:])
        top, left = place % rows, place // rows % columns
        out[k] = images[k, :, top : top + side, left : left + side]
    return out


def _stream_batch(
    batch: dict[str, npt.NDArray[np.int64]], *, source: "ray.ObjectRef", config: Config
) -> pa.Table:
    table, failures = simulate_rows(shared(source), batch["data"], config)
    error = pa.array([""] * len(table), pa.string())
    table = table.append_column("error", error)
    if failures:
        side = config.images.side
        zeros = np.zeros((len(failures), config.images.channels, side, side), np.float32)
        columns: dict[str, Any] = {name: tensor_array(zeros) for name in table.column_names}
        columns["id"] = pa.array([failure["id"] for failure in failures], pa.string())
        columns["error"] = pa.array([failure["reason"] for failure in failures], pa.string())
        table = pa.concat_tables([table, pa.table(columns)])
    return table.combine_chunks()


def _outcome(out: Folder) -> Outcome | None:
    """What a finished job left; None where there is none, or it is damaged and made anew."""
    if out.exists("manifest.json"):
        with contextlib.suppress(ValueError, TypeError, KeyError):
            counts = json.loads(out.read("manifest.json"))
            return Outcome(out.named, int(counts["images"]), int(counts["failed"]))
    return None


def _rows_per_shard(out: Folder) -> int | None:
    """What plan.json says; None where there is none, or it is damaged."""
    if out.exists("plan.json"):
        with contextlib.suppress(ValueError, TypeError, KeyError):
            return int(json.loads(out.read("plan.json"))["rows_per_shard"]) or None
    return None


def _settled(config: Config, source: Source, out: Folder) -> int:
    """Rows of a shard; kept on disk, since a resumed job may run on more or fewer cores."""
    total = sum(len(source.select(split, config.images.limit)) for split in SPLITS)
    by_size = SHARD_BYTES // row_bytes(config.images, len(config.noise.n_views))
    # An autoscaler brings nodes for tasks that wait, and so for shards.
    cores = max(cpus(), MAY_COME) if has_autoscaler() else cpus()
    by_cores = max(MIN_SHARD_ROWS, math.ceil(total / (2 * cores)))
    rows_per_shard = max(1, min(by_size, by_cores))
    for split in SPLITS:  # shards of a plan that is lost
        out.remove(split)
    out.write("plan.json", json.dumps({"rows_per_shard": rows_per_shard}), durable=True)
    return rows_per_shard


def _plan(config: Config, source: Source, rows_per_shard: int) -> list[dict[str, Any]]:
    """Shards with their rows."""
    plan = []
    for split in SPLITS:
        rows = source.gathered(source.select(split, config.images.limit))
        n_shards = math.ceil(len(rows) / rows_per_shard)
        for k in range(n_shards):
            part = rows[k * rows_per_shard : (k + 1) * rows_per_shard]
            plan.append({"path": f"{split}/{k:05d}-of-{n_shards:05d}.parquet", "rows": part})
    return plan


def _write_shards(
    plan: list[dict[str, Any]],
    todo: list[dict[str, Any]],
    source: Source,
    config: Config,
    out: Folder,
) -> None:
    """Write what is missing, a task per shard.

    Raises:
        RunError: if the disk is full or refuses to be written.
        InputError: if a node does not see the folder.
    """
    out.sweep()  # what a killed job left
    total = sum(len(shard["rows"]) for shard in plan)
    done = total - sum(len(shard["rows"]) for shard in todo)
    progress = Progress("simulate", total, start=done)
    task = functools.partial(
        _write_shard,
        source=ray.put(source),
        config=config,
        out=out.claimed(),
        step=max(1, GROUP_BYTES // row_bytes(config.images, len(config.noise.n_views))),
    )
    items = ray.data.from_items(todo, override_num_blocks=len(todo))
    results = items.map_batches(task, batch_size=1, batch_format="pyarrow", **ON_CORES)
    with patience("simulate", lambda: done):
        for batch in results.iter_batches(batch_size=None, batch_format="numpy"):
            errors = [error for error in batch["error"] if error]
            if errors:
                ended = RunError if batch["shared"].all() else InputError
                raise ended(
                    f"{out} must be a folder that can be written, but {errors[0]}; {done:,} of "
                    f"{total:,} images are done: mend it and run the same command to continue."
                )
            rows, failed = int(batch["rows"].sum()), int(batch["failed"].sum())
            count_images("simulate", read=rows, done=rows - failed, failed=failed)
            count_bytes("simulate", written=int(batch["bytes"].sum()))
            done += rows
            progress.update(done)


def _write_shard(
    shard: pa.Table, *, source: "ray.ObjectRef", config: Config, out: Folder, step: int
) -> dict[str, npt.NDArray[Any]]:
    """Task: one shard, `step` rows at a time; counts, or why it was not written."""
    item = shard.to_pylist()[0]
    rows = np.array(item["rows"])
    failures: list[Failure] = []
    error, size, shared_folder = "", 0, True
    try:
        with out.writing(item["path"]) as partial, contextlib.ExitStack() as stack:
            writer = None
            for start in range(0, len(rows), step):
                table, failed = simulate_rows(shared(source), rows[start : start + step], config)
                failures += failed
                if writer is None:
                    writer = stack.enter_context(pq.ParquetWriter(partial, table.schema, **WRITING))
                writer.write_table(table)
            assert writer is not None
            writer.add_key_value_metadata({"snr_ray.failures": json.dumps(failures)})
            stack.close()
            size = partial.stat().st_size
    except (OSError, NotShared) as problem:
        error, shared_folder = str(problem), not isinstance(problem, NotShared)
    return {
        "rows": np.array([len(rows)]),
        "failed": np.array([len(failures)]),
        "bytes": np.array([size]),
        "error": np.array([error], object),
        "shared": np.array([shared_folder]),
    }


def _finish(config: Config, source: Source, out: Folder, plan: list[dict[str, Any]]) -> Outcome:
    failures: list[Failure] = []
    counts = dict.fromkeys(SPLITS, 0)
    for shard in plan:
        metadata = read_metadata(out, shard["path"])
        counts[shard["path"].split("/")[0]] += metadata.num_rows
        failures += json.loads(metadata.metadata[b"snr_ray.failures"])
    out.write("failures.parquet", failures_bytes(failures))
    noise = noise_specs(config.noise)
    manifest = {
        "version": __version__,
        "format": FORMAT,
        "source": source.identity,
        "noise": [dataclasses.asdict(spec) for spec in noise],
        "noise_hash": spec_hash(noise, config.images.size),
        "config": {k: configs.to_dict(config)[k] for k in ("images", "noise")},
        "splits": counts,
        "images": sum(counts.values()),
        "failed": len(failures),
    }
    out.write("manifest.json", json.dumps(manifest, indent=2) + "\n", durable=True)
    return Outcome(out.named, sum(counts.values()), len(failures))
