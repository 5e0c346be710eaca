"""What a training step costs, part by part, and how many operations a device must be handed."""

import functools
import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from snr_ray import configfile as configs
from snr_ray.config import Config
from snr_ray.learning.batches import Batch, PairFeed, Pairs, Share
from snr_ray.learning.learner import Learner
from snr_ray.stages.job.connection import connected
from snr_ray.stages.measuring.benchjob import Rows
from snr_ray.stages.simulation.dataset import Origin, collect_pairs, open_rows

STEPS = 20
WARM = 5
"""Steps before those that are measured: they compile, capture, and set up what is set up once."""
IMAGES = 1000
PARTS = ("feed", "forward", "backward", "optimizer")
MATRIX = {"cpu": 1024, "cuda": 8192}
"""Side of the square matrices whose product tells what a device can do."""

FREE = {"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
"""Operations beside views that compute nothing."""


class Launches(TorchDispatchMode):
    """Counts operations that compute something: views are free, and what runs over a list of
    tensors at once is one."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[str, int] = defaultdict(int)

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.of.values())

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not op.is_view and op.namespace == "aten" and op.overloadpacket.__name__ not in FREE:
            self.of[op.overloadpacket.__name__] += 1
        return op(*args, **(kwargs or {}))


def measure_step(config: Config) -> Rows:
    """The training step on one core, on as many as workers get, and on a GPU where there is one."""
    small = configs.replace(config, {"images.limit": IMAGES, "train.num_workers": 1})
    with connected():
        pairs = collect_pairs(open_rows(small, Origin(images="glyphs"), "train"), small)[0]
    rows = []
    for threads in sorted({1, config.train.cpus_per_worker, 2}):
        torch.set_num_threads(threads)
        rows.append({"device": "cpu", "threads": threads} | _measure(small, pairs, "cpu"))
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        rows.append({"device": name, "threads": threads} | _measure(small, pairs, "cuda"))
    return rows


def _measure(config: Config, pairs: Pairs, kind: str) -> dict[str, Any]:
    device = torch.device(kind)
    learner = Learner(config, device=device)
    feed = PairFeed(pairs, config.train.batch_size, seed=config.seed, share=Share())
    batches = feed.batches(0)
    for batch in itertools.islice(batches, WARM):
        learner.train_step(batch)
    whole, feeding = _seconds_per_step(learner, batches, device)
    learner.captured = None  # what is replayed has no parts
    seconds: dict[str, float] = defaultdict(float)
    learner.parallel = _timed("forward", learner.parallel, seconds, device)  # type: ignore[assignment]
    learner.gradients = _timed("gradients", learner.gradients, seconds, device)  # type: ignore[method-assign]
    learner.update = _timed("optimizer", learner.update, seconds, device)  # type: ignore[method-assign]
    stepwise, _ = _seconds_per_step(learner, batches, device)
    seconds["backward"] = seconds.pop("gradients") - seconds["forward"]
    shares = {name: seconds[name] / STEPS / stepwise for name in PARTS[1:]}
    shares = {PARTS[0]: feeding / whole} | shares
    launches, flops = _counts(learner, next(batches))
    rate = _matrix_rate(device, config.train.precision)
    return {
        "images_per_s": config.train.batch_size / whole,
        "ms_per_step": 1000 * whole,
        "ms_step_by_step": 1000 * stepwise,
        "launches": launches.total,
        **{f"{name}_share": share for name, share in shares.items()},
        "matrix_rate_share": flops / whole / rate,
        "batch_size": config.train.batch_size,
        "weights": sum(p.numel() for p in learner.objective.model.parameters()),
    }


def _seconds_per_step(
    learner: Learner, batches: Iterator[Batch], device: torch.device
) -> tuple[float, float]:
    """Of steps, and of making their batches."""
    feeding, since = 0.0, time.perf_counter()
    for _ in range(STEPS):
        began = time.perf_counter()
        batch = next(batches)
        feeding += time.perf_counter() - began
        learner.train_step(batch)
    _wait(device)
    return (time.perf_counter() - since) / STEPS, feeding / STEPS


def _timed(
    name: str, call: Callable[..., Any], seconds: dict[str, float], device: torch.device
) -> Callable[..., Any]:
    @functools.wraps(call)
    def timed(*args: Any) -> Any:
        _wait(device)
        since = time.perf_counter()
        result = call(*args)
        _wait(device)
        seconds[name] += time.perf_counter() - since
        return result

    return timed


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _counts(learner: Learner, batch: Batch) -> tuple[Launches, int]:
    """Operations of one step, and floating point operations of its products and convolutions."""
    with Launches() as launches:
        learner.train_step(batch)
    with FlopCounterMode(display=False) as flops:
        learner.train_step(batch)
    return launches, int(flops.get_total_flops())


def _matrix_rate(device: torch.device, precision: str) -> float:
    """Floating point operations per second of a large product, the best of several."""
    side = MATRIX[device.type]
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
    times = []
    for _ in range(5):
        _wait(device)
        since = time.perf_counter()
        a @ b
        _wait(device)
        times.append(time.perf_counter() - since)
    return 2 * side**3 / min(times)
