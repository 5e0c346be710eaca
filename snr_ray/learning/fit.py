"""The loop of a run: steps from the learner's to the last, and when to log, validate and save."""

import math
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from snr_ray.learning.ahead import ahead
from snr_ray.learning.batches import Batch
from snr_ray.learning.health import Health
from snr_ray.learning.learner import Learner
from snr_ray.learning.validation import Metrics

LOG_EVERY_STEPS = 25


def fit(
    learner: Learner,
    batches: Iterator[Batch],
    *,
    log: Callable[[Metrics], None],
    checkpoint: Callable[[bool], bool],
) -> None:
    """Train from the learner's step to the last one of its config.

    Args:
        learner: fresh, or loaded from a checkpoint.
        batches: this worker's batches from `learner.step` on.
        log: called every LOG_EVERY_STEPS steps with the step, means of what steps return over all
            workers, steps skipped so far and images per second (clean images over all workers).
        checkpoint: called every train.checkpoint_every_steps steps and at the end, with whether
            this is the end, where the weights are worth keeping; returns True to stop early. At
            once by a learner that is at the last step: its run broke off before all was written.

    Raises:
        Diverged: if the run cannot come to anything any more.
    """
    config = learner.config.train
    health = Health(config.lr, well_at=learner.step)
    tally, since = Tally(), time.perf_counter()
    if learner.step >= config.steps:
        checkpoint(True)
        return
    if learner.device.type == "cuda":
        batches = ahead(batches)
    while learner.step < config.steps:
        batch = next(batches)
        tally.add(learner.train_step(batch), len(batch.clean))
        last = learner.step == config.steps
        logs = learner.step % LOG_EVERY_STEPS == 0 or last
        saves = learner.step % config.checkpoint_every_steps == 0 or last
        if not (logs or saves):
            continue
        means = tally.means()
        health.first_loss = float(over_workers(learner.first_loss))
        well = health.judge(learner.step, means["loss"], learner.longest_skip(), last=last)
        if logs:
            elapsed = time.perf_counter() - since
            rate = tally.images * learner.share.world_size / max(elapsed, 1e-9)
            row = {"step": learner.step, **means, "skipped": learner.skipped}
            log(row | {"images_per_s": rate})
            tally, since = Tally(), time.perf_counter()
        if saves and well:
            paused = time.perf_counter()
            if checkpoint(last):
                return
            since += time.perf_counter() - paused  # validation is not training time


class Tally:
    """Means of what steps return, over the steps that were taken, without waiting for any."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.images = 0
        self.sums = torch.zeros(())

    def add(self, parts: dict[str, Tensor], images: int) -> None:
        """Count one step, and the clean images of this worker in it."""
        values = torch.stack([value.detach() for value in parts.values()])
        values = torch.where(parts["taken"] > 0, values, 0.0)
        self.sums = self.sums + values if self.names else values
        self.names = list(parts)
        self.images += images

    def means(self) -> Metrics:
        """Means over the steps since the start, and over all workers; NaN where none was taken."""
        means = dict(zip(self.names, over_workers(self.sums).tolist(), strict=True))
        taken = means.pop("taken")
        return {name: total / taken if taken else math.nan for name, total in means.items()}


def over_workers(values: Tensor) -> Tensor:
    """The mean of every worker's values, the same on all of them."""
    if not dist.is_initialized():
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / dist.get_world_size()
