"""Data-parallel training on Ray: source or data folder -> run folder with a model in it.

    RUN/job.json, config.yaml   what was asked for
    RUN/metrics.jsonl           a line every 25 steps; validation PSNR at each checkpoint
    RUN/tensorboard/            the same as curves
    RUN/checkpoints/            Ray Train's storage: the two newest states
    RUN/failures.parquet        images that could not be read
    RUN/model/                  the result, written once, at the end
    RUN/data/                   a data folder, of images that do not fit in memory

The same command again continues from the newest checkpoint, on any number of workers. A file
RUN/stop ends training at the next checkpoint as if it were the last.
"""

import json
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import ray
import ray.train
import ray.train.torch
import torch

from snr_ray import configfile as configs
from snr_ray.config import Config, InputError, check
from snr_ray.hashing import fingerprint
from snr_ray.images.datafolder import Failure, write_failures
from snr_ray.learning.batches import PairFeed, Share
from snr_ray.learning.checkpoint import (
    WEIGHTS_FILE,
    load_any,
    load_checkpoint,
    model_path,
    save_checkpoint,
    save_model,
)
from snr_ray.learning.fit import Learner, Metrics, fit
from snr_ray.learning.mixed import MixedFeed
from snr_ray.learning.shardfeed import ShardFeed
from snr_ray.network.swap import N_DONORS
from snr_ray.noise.lmmse import FIT_IMAGES
from snr_ray.outputs import Progress, claim
from snr_ray.stages.cluster import connected, cpus, gpus
from snr_ray.stages.dataset import (
    Origin,
    check_decoder,
    count_rows,
    fits_in_memory,
    gather,
    open_rows,
    settle,
)
from snr_ray.stages.pictures import check_memory, gather_pictures, open_pictures
from snr_ray.stages.simulate import Outcome, simulate

OWNED = ("config.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "failures.parquet",
         "model", "stop", "data")  # fmt: skip
HOW = ("train.num_workers", "train.cpus_per_worker", "train.use_gpu")
"""Settings that say how, not what: a run may continue with others."""


def train(
    config: Config,
    *,
    origin: Origin,
    out: Path,
    overwrite: bool = False,
    progress: bool = True,
) -> Outcome:
    """Train a model, or continue, or leave a finished run alone.

    Raises:
        InputError: for a source, folder or setting the user can put right.
    """
    config = settle_start(settle(config, origin))
    out = out.absolute()
    counts = {split: count_rows(config, origin, split) for split in ("train", "val")}
    if counts["train"] < config.train.batch_size:
        raise InputError(
            f"Training needs at least one batch of images (train.batch_size = "
            f"{config.train.batch_size}), but the train split of {origin.name} holds "
            f"{counts['train']}; add images or lower train.batch_size."
        )
    name = f"snr train {'--images' if origin.images else '--data'} {origin.name}"
    claim(out, identity(config, origin), owned=OWNED, overwrite=overwrite)
    if (out / "model").is_dir():
        return _outcome(out)
    configs.save(config, out / "config.yaml")
    with connected():
        _check_resources(config)
        failures: list[Failure] = []
        mixed = config.noise.views_per_pixel is not None
        if mixed:
            check_memory(config, counts["train"])
        in_memory = mixed or fits_in_memory(config, counts["train"])
        if not in_memory and origin.images:
            print(f"The images do not fit in memory; they go to {out / 'data'}.", file=sys.stderr)
            simulate(config, images=origin.images, out=out / "data")
            origin = Origin(data=out / "data")
            failures = pq.read_table(out / "data" / "failures.parquet").to_pylist()
        datasets = {"val": open_rows(config, origin, "val", config.train.val_images).materialize()}
        if mixed:
            datasets["train"] = open_pictures(config, origin, "train").materialize()
            datasets["donors"] = open_rows(config, origin, "train", N_DONORS).materialize()
        elif in_memory:
            datasets["train"] = open_rows(config, origin, "train").materialize()
        if config.model.physics:
            datasets["physics"] = open_rows(config, origin, "train", FIT_IMAGES).materialize()
        watch = _Watch(out, config) if progress else None
        try:
            job = {
                "config": config,
                "out": out,
                "origin": name,
                "start": config.train.start and model_path(config.train.start).absolute(),
                "data": None if in_memory else origin.folder,
                "failures": failures,
            }
            _fit_on_ray(job, datasets)
        finally:
            if watch:
                watch.stop()
    return _outcome(out)


def _fit_on_ray(job: dict[str, Any], datasets: dict[str, Any]) -> None:
    config = job["config"]
    scaling = ray.train.ScalingConfig(
        num_workers=config.train.num_workers,
        use_gpu=config.train.use_gpu,
        resources_per_worker={"CPU": config.train.cpus_per_worker}
        | ({"GPU": 1} if config.train.use_gpu else {}),
    )
    trainer = ray.train.torch.TorchTrainer(
        _worker,
        train_loop_config=job,
        datasets=datasets,
        dataset_config=ray.train.DataConfig(datasets_to_split=[]),
        scaling_config=scaling,
        run_config=ray.train.RunConfig(
            name="checkpoints",
            storage_path=str(job["out"]),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            failure_config=ray.train.FailureConfig(max_failures=3),
        ),
    )
    try:
        trainer.fit()
    except SystemExit:  # Ray Train's answer to an interrupt
        raise KeyboardInterrupt from None


def _worker(job: dict[str, Any]) -> None:
    """What every training worker runs."""
    config, out = job["config"], job["out"]
    context = ray.train.get_context()
    share = Share(context.get_world_rank(), context.get_world_size())
    torch.set_num_threads(config.train.cpus_per_worker)
    val, val_failures = gather(_tables("val"), config)
    failures = job["failures"] + val_failures
    feed: PairFeed | ShardFeed | MixedFeed
    if config.noise.views_per_pixel is not None:
        donors, _ = gather(_tables("donors"), config)
        pictures, train_failures = gather_pictures(_tables("train"), config)
        failures += train_failures
        feed = MixedFeed(pictures, config, share)
    elif job["data"]:
        feed, donors = ShardFeed(job["data"], config, share), val
    else:
        donors, train_failures = gather(_tables("train"), config)
        failures += train_failures
        feed = PairFeed(donors, config.train.batch_size, seed=config.seed, share=share)
    if share.rank == 0:
        write_failures(out / "failures.parquet", failures)

    learner = Learner(
        config,
        device=ray.train.torch.get_device(),
        share=share,
        wrap=ray.train.torch.prepare_model,
    )
    if config.model.physics:
        known, _ = gather(_tables("physics"), config)
        learner.fit_physics(known)
    checkpoint = ray.train.get_checkpoint()
    if job["start"] and not checkpoint:
        learner.start_from(load_any(job["start"], learner.device).model)
    if checkpoint:
        with checkpoint.as_directory() as folder:
            load_checkpoint(Path(folder), learner)
    run_log = RunLog(out, learner.step) if share.rank == 0 else None

    def log(metrics: Metrics) -> None:
        if run_log:
            run_log.write(metrics)

    def save(last: bool) -> bool:
        # Every rank reports equally often, or the others wait for ever.
        stop = _from_rank_zero(share, (out / "stop").exists())
        with tempfile.TemporaryDirectory() as folder:
            state: ray.train.Checkpoint | None = None
            metrics: Metrics = {}
            if run_log:
                codes, metrics = learner.validate(donors, val)
                run_log.write({"step": learner.step, **metrics})
                save_checkpoint(Path(folder), learner)
                state = ray.train.Checkpoint.from_directory(folder)
                if last or stop:
                    metrics |= learner.least_explained(codes, val)
                    origin = job["origin"]
                    save_model(out / "model", config, learner.average, codes, metrics, origin)
            ray.train.report({"step": learner.step, **metrics}, checkpoint=state)
        return stop

    fit(learner, feed.batches(learner.step), log=log, checkpoint=save)


def _tables(name: str) -> Any:
    shard = ray.train.get_dataset_shard(name)
    return iter(shard.iter_batches(batch_size=None, batch_format="pyarrow"))


def _from_rank_zero(share: Share, value: bool) -> bool:
    if share.world_size == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


class RunLog:
    """metrics.jsonl and TensorBoard events of a run; continued without repeating a step."""

    def __init__(self, out: Path, step: int) -> None:
        """`step`: the step the run continues from; later lines of a killed run are dropped."""
        from torch.utils.tensorboard import SummaryWriter  # only rank 0 needs it

        self.path = out / "metrics.jsonl"
        kept = [row for row in read_metrics(self.path) if row["step"] <= step]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def write(self, metrics: Metrics) -> None:
        """Add one line; `step` says where on the curves it belongs."""
        with self.path.open("a") as file:
            file.write(json.dumps(metrics) + "\n")
        for name, value in metrics.items():
            if name != "step":
                self.writer.add_scalar(name, value, metrics["step"])
        self.writer.flush()


def read_metrics(path: Path) -> list[Metrics]:
    """Lines of a metrics.jsonl; a last line cut short by a kill is left out."""
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines if line.endswith("}")]


class _Watch:
    """Follows metrics.jsonl from the driver and keeps the progress line."""

    def __init__(self, out: Path, config: Config) -> None:
        self.path = out / "metrics.jsonl"
        rows = read_metrics(self.path)
        self.seen = len(rows)
        start = int(rows[-1]["step"]) if rows else 0
        self.batch_size = config.train.batch_size
        self.progress = Progress("train", config.train.steps, "steps", start=start)
        self.val = ""
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._done.wait(0.5):
            self._read()
        self._read()

    def _read(self) -> None:
        rows = read_metrics(self.path)
        if len(rows) < self.seen:  # a restarted worker dropped lines
            self.seen = 0
        new, self.seen = rows[self.seen :], len(rows)
        for row in new:
            for name in ("swap_psnr", "unet_psnr"):
                if name in row:
                    self.val = f"{name.partition('_')[0]} {row[name]:.1f} dB"
        losses = [row["loss"] for row in new if "loss" in row]
        if losses:
            note = f"loss {losses[-1]:.3f}" + (f", {self.val}" if self.val else "")
            self.progress.update(int(new[-1]["step"]), note, per_unit=self.batch_size)


def settle_start(config: Config) -> Config:
    """The config with the model section of train.start, if there is one.

    Raises:
        InputError: if that is no model folder, or of a model that cannot begin this run.
    """
    start = config.train.start
    if start is None:
        return config
    its = load_any(start).config
    for key, mine, theirs in (
        ("images.channels", config.images.channels, its.images.channels),
        ("model.kind", config.model.kind, its.model.kind),
    ):
        check(
            mine == theirs,
            f"train.start needs a model of the same {key}, but {start} has {theirs} where this run "
            f"has {mine}; set {key}={theirs}, or start from another.",
        )
    mine, stored = configs.to_dict(config)["model"], configs.to_dict(its)["model"]
    stored["physics"] = stored["physics"] or mine["physics"]
    for key in ("bounded", "correction"):  # which have no weights
        stored[key] = mine[key]
    for key, value in stored.items():
        if mine[key] != value:
            print(f"{start} has model.{key}={value}, which is used in place of {mine[key]}.",
                  file=sys.stderr)  # fmt: skip
    settled = configs.replace(config, {f"model.{key}": value for key, value in stored.items()})
    check_decoder(settled)
    return settled


def identity(config: Config, origin: Origin) -> dict[str, Any]:
    """All that decides what a run learns, flat: what its folder is known by."""
    what = configs.to_dict(config)
    for key in HOW:
        section, name = key.split(".")
        what[section].pop(name)
    flat = {
        f"{section}.{key}": value
        for section, values in what.items()
        if isinstance(values, dict) and section != "sweep"
        for key, value in values.items()
    }
    data = {}
    if origin.images:
        data["source"] = origin.source.identity
    if origin.data:  # known by what it holds, wherever it lies
        data["data"] = fingerprint((origin.data / "manifest.json").read_bytes())
    if config.train.start:
        weights = model_path(config.train.start) / WEIGHTS_FILE
        data["start"] = fingerprint(weights.read_bytes())
    return {"stage": "train", **data, "seed": config.seed, **flat}


def _outcome(out: Path) -> Outcome:
    failed = pq.read_metadata(out / "failures.parquet").num_rows
    rows = read_metrics(out / "metrics.jsonl")
    return Outcome(out, int(rows[-1]["step"]) if rows else 0, failed)


def _check_resources(config: Config) -> None:
    want, have = config.train.num_workers * config.train.cpus_per_worker, cpus()
    if want > have:
        raise InputError(
            f"train.num_workers x train.cpus_per_worker must be at most the cluster's {have} "
            f"cores, but got {config.train.num_workers} x {config.train.cpus_per_worker}."
        )
    if config.train.use_gpu and config.train.num_workers > gpus():
        raise InputError(
            f"train.use_gpu needs one GPU per worker ({config.train.num_workers}), but the "
            f"cluster has {gpus()}; set train.use_gpu=false to train on processors."
        )
