"""One run of a sweep, as a task of Ray: what it is given, and how many there is room for."""

import logging
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import ray

from snr_ray.config import Config
from snr_ray.folder import Folder
from snr_ray.stages.job import pools
from snr_ray.stages.job.connection import OFF_HEAD, cpus, gpus
from snr_ray.stages.simulation.dataset import Origin
from snr_ray.stages.training.setup import of_a_worker
from snr_ray.stages.training.tracker import Settings, settings
from snr_ray.stages.training.train import train

TRIAL_BYTES = 700 * 2**20
"""Memory of a trial that runs in its task."""
TRIAL_ON_TRAIN_BYTES = 1_300 * 2**20
"""Memory of one of several workers beside these: its driver, and five processes of Ray Train."""
ENDING_S = 60.0
"""How long a driver that is left waits for the ends of its runs."""


def start_run(config: Config, origin: Origin, out: Folder, memory: int) -> Any:
    """Start, or continue, a run in a folder; returns what `ray.wait` takes.

    `memory`: in bytes, as `slots_of` says.
    """
    # Cores are counted by `slots_of`: a trial that held its own would wait for ever where the tasks
    # that read its images found none.
    alone = config.train.num_workers == 1
    there = {"num_cpus": 0, "num_gpus": int(alone and config.train.use_gpu), "memory": memory}
    return _train_trial.options(**there).remote(config, origin, out, settings())


@contextmanager
def ending(live: Collection[Any]) -> Iterator[None]:
    """End the runs that are still `live`, of `start_run`, when a driver is left by an error: where
    Ray goes on, as in a notebook, they would write beside those that continue them."""
    try:
        yield
    finally:
        if left := list(live):
            for ref in left:
                ray.cancel(ref, force=True)
            ray.wait(left, num_returns=len(left), timeout=ENDING_S)


# On any node, not all on the one that this process is on. A trial whose node is lost is tried again
# and continues from its checkpoint; what fails of itself is not.
@ray.remote(max_retries=3, scheduling_strategy="SPREAD", **OFF_HEAD)
def _train_trial(config: Config, origin: Origin, folder: Folder, tracker: Settings) -> None:
    """One trial, in a task of its own: that of a single worker runs in it, those of several hold
    the resources of a larger one. `tracker`: the driver's settings of MLflow."""
    os.environ.update(tracker.variables)
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    here = config.train.num_workers == 1
    train(config, origin=origin, out=folder, progress=False, alone=False, here=here)


def ask_for_room(config: Config, trials: int) -> None:
    """Have an autoscaler bring what so many trials at once need, or as many as there may be."""
    one = of_a_worker(config)
    while pools.has_autoscaler() and trials:
        # A core more, which `slots_of` leaves to those that read.
        if pools.brings(one, trials * config.train.num_workers + (not config.train.use_gpu)):
            break
        trials //= 2


def slots_of(config: Config) -> tuple[int, int]:
    """How many trials run at once, and the memory in bytes that Ray is to find for each: as many
    as there are cores, GPUs and memory for, on all nodes together."""
    train = config.train
    bounds = [(cpus() - 1) // (train.num_workers * train.cpus_per_worker)]
    if train.use_gpu:
        bounds.append(gpus() // train.num_workers)
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Labels"].get("pool") != "head"]
    rooms = [node["Resources"].get("memory", 0.0) for node in nodes]
    wanted = TRIAL_BYTES if train.num_workers == 1 else TRIAL_ON_TRAIN_BYTES
    memory = int(min(wanted, max(rooms, default=wanted)))
    bounds.append(sum(int(room // memory) for room in rooms) if memory else 1)
    return max(1, min(bounds)), memory
