"""What every training worker runs, between the driver and the learner."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import psutil
import pyarrow as pa
import ray
import ray.train
import ray.train.torch
import torch
from ray.train.torch.config import TorchConfig, _TorchBackend
from torch import nn

from snr_ray.errors import room_in
from snr_ray.learning.batches import PairFeed, Share
from snr_ray.learning.checkpoint import WEIGHTS_FILE, load_any, save_model
from snr_ray.learning.fit import fit
from snr_ray.learning.learner import Learner
from snr_ray.learning.mixed import MixedFeed
from snr_ray.learning.restart import load_checkpoint, newest_checkpoint, save_checkpoint
from snr_ray.learning.shardfeed import ShardFeed
from snr_ray.learning.speed import seconds_per_image
from snr_ray.learning.validation import Metrics
from snr_ray.scoring.runpage import tiles
from snr_ray.stages.simulation.dataset import gather
from snr_ray.stages.training.pictures import gather_pictures
from snr_ray.stages.training.runlog import RunLog
from snr_ray.stages.training.tracker import RUN_FILE, Tracker

CHECKPOINTS = "checkpoints"

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Where a worker runs: its part of every batch, its device, its rows, its fellow workers."""

    share: Share
    device: torch.device
    tables: Callable[[str], Iterator[pa.Table]]
    """Rows of a data set by its name."""
    wrap: Callable[[nn.Module], nn.Module]
    """Turns the objective into its data-parallel form."""
    meet: Callable[[int], object]
    """Waits for the others at a step, so that none is ahead of a checkpoint."""


def work(job: dict[str, Any]) -> None:
    """`train_at` as one of the workers of Ray Train."""
    context = ray.train.get_context()

    def tables(name: str) -> Iterator[pa.Table]:
        shard = ray.train.get_dataset_shard(name)
        return iter(shard.iter_batches(batch_size=None, batch_format="pyarrow"))

    place = Place(
        share=Share(context.get_world_rank(), context.get_world_size()),
        device=ray.train.torch.get_device(),
        tables=tables,
        wrap=ray.train.torch.prepare_model,
        meet=lambda step: ray.train.report({"step": step}),
    )
    with room_in(job["desk"].path):
        train_at(place, job)


def work_alone(job: dict[str, Any], datasets: dict[str, Any]) -> None:
    """`train_at` as the only worker, in this process, without Ray Train and its five others."""

    def tables(name: str) -> Iterator[pa.Table]:
        return iter(datasets[name].iter_batches(batch_size=None, batch_format="pyarrow"))

    device = torch.device("cuda" if job["config"].train.use_gpu else "cpu")
    place = Place(Share(), device, tables, lambda module: module, lambda step: None)
    with room_in(job["desk"].path):
        train_at(place, job)


def train_at(place: Place, job: dict[str, Any]) -> None:
    """Train from the newest checkpoint of the run folder to the end.

    Args:
        place: where.
        job: `config`; `desk`, of the run folder; `origin`, the command for the model card;
            `start`, the model folder to begin from, or None; `data`, the data folder, or None where
            the images are in memory; `tracker`, the settings of MLflow.
    """
    config, desk, share = job["config"], job["desk"], place.share
    out = desk.path
    desk.fetch(CHECKPOINTS, "metrics.jsonl", RUN_FILE)
    torch.set_num_threads(config.train.cpus_per_worker)
    val, _ = gather(place.tables("val"), config)
    feed: PairFeed | ShardFeed | MixedFeed
    if config.noise.views_per_pixel is not None:
        donors, _ = gather(place.tables("donors"), config)
        pictures, _ = gather_pictures(place.tables("train"), config)
        feed = MixedFeed(pictures, config, share)
    elif job["data"]:
        feed, donors = ShardFeed(job["data"], config, share), val
    else:
        donors, _ = gather(place.tables("train"), config)
        feed = PairFeed(donors, config.train.batch_size, seed=config.seed, share=share)

    learner = Learner(config, device=place.device, share=share, wrap=place.wrap)
    if config.model.physics:
        known, _ = gather(place.tables("physics"), config)
        learner.fit_physics(known)
    newest = _from_rank_zero(share, newest_checkpoint(out / CHECKPOINTS)[0])
    if newest:
        load_checkpoint(newest, learner)
    elif job["start"]:
        learner.start_from(load_any(job["start"], learner.device).model)
    run_log = None
    if share.rank == 0:
        tracker = Tracker(out, config, job["tracker"], where=str(desk.place))
        run_log = RunLog(out, learner.step, tracker)
        desk.keep(RUN_FILE)

    def log(metrics: Metrics) -> None:
        if run_log:
            run_log.write(metrics)
            if desk.soon("metrics"):
                with contextlib.suppress(OSError):  # they go with the next checkpoint at the latest
                    desk.keep("metrics.jsonl")

    def save(last: bool) -> bool:
        stop = _from_rank_zero(share, desk.place.exists("stop"))
        if run_log:
            codes, metrics = learner.validate(donors, val)
            row = {"step": learner.step, **metrics}
            if last or stop:
                row["seconds_per_image"] = seconds_per_image(learner.average, codes, val)
            run_log.write(row)
            run_log.picture(*tiles(learner.average, codes, val, config.noise.n_views), learner.step)
            desk.keep("metrics.jsonl", "pictures.png", "tensorboard")
            state = save_checkpoint(out / CHECKPOINTS, learner)
            desk.keep(f"{CHECKPOINTS}/{state.name}")
            desk.drop(CHECKPOINTS, functools.partial(_is_older, state.name))
            if last or stop:
                metrics |= learner.least_explained(codes, val)
                metrics |= learner.bf16_costs(donors, val, metrics)
                save_model(
                    out / "model",
                    config,
                    learner.average,
                    codes,
                    metrics,
                    job["origin"],
                    steps=learner.step,
                )
                desk.keep("model", last=f"model/{WEIGHTS_FILE}")
        # All wait here until the state is on disk: none is a step ahead when a worker dies.
        place.meet(learner.step)
        return stop

    with run_log or contextlib.nullcontext():
        fit(learner, feed.batches(learner.step), log=log, checkpoint=save)


def _is_older(state: str, file: str) -> bool:
    """Whether a file of a run is part of a state before this one: Ray keeps its own beside them,
    and a worker that was given up may be behind the one that took its place."""
    step = file.split("/")[1]
    return step.startswith("step-") and step < state


def _from_rank_zero(share: Share, value: T) -> T:
    if share.world_size == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


class NodeTorch(TorchConfig):
    """Ray's setup of torch, by the network that the cluster itself uses.

    Gloo takes the interface that the host's name resolves to, which on many machines is loopback:
    workers on two nodes then look for each other on their own.
    """

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _NodeBackend


class _NodeBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(use_interface_of_node)
        super().on_start(worker_group, backend_config)


def use_interface_of_node() -> None:
    """Tell Gloo the interface of this node's address; what the user has set stays."""
    if name := interface_of(ray.util.get_node_ip_address()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def interface_of(address: str) -> str | None:
    """The name of the network interface that has an address; None if none has."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in addresses):
            return name
    return None
