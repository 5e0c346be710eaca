"""Measurements of the parts on this machine: a small table, and one JSON object with `--out`.

Two things that are compared run side by side in one process or one job, so that a busy machine
slows both; ratios carry over to other machines, absolute rates do not.
"""

import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from skimage.transform import iradon, radon

from snr_ray import configfile as configs
from snr_ray.config import Config
from snr_ray.images.datafolder import DataFolder
from snr_ray.learning.batches import PairFeed, Share
from snr_ray.learning.learner import Learner
from snr_ray.learning.shardfeed import ShardFeed
from snr_ray.metrics import as_json
from snr_ray.noise.operator import NoiseSpec, RadonNoise
from snr_ray.outputs import check_file, write_atomic
from snr_ray.stages.job.connection import connected
from snr_ray.stages.measuring.benchdenoise import measure_denoise
from snr_ray.stages.measuring.benchjob import CURVE, Rows, measure_job
from snr_ray.stages.measuring.benchstep import measure_step
from snr_ray.stages.simulation.dataset import Origin, collect_pairs, open_rows
from snr_ray.stages.simulation.simulate import simulate
from snr_ray.stages.sweeping.sweep import sweep

RADON_SIZES = ((28, 10), (32, 20), (64, 20), (128, 30), (256, 60), (512, 90))
"""(size, n_views) of the published table."""
STEPS = 10
FEED_IMAGES = 3000
FEED_STEPS = 40
GPU_BATCH = 512
"""Images of a step on a GPU; what a feed must keep up with there."""


def bench(config: Config, name: str, *, out: Path | None) -> int:
    """Run one measurement, print its table and write its JSON. Returns the exit code."""
    measures: dict[str, Callable[[Config], Iterable[dict[str, Any]]]] = {
        "radon": _radon,
        "simulate": measure_job,
        "data": _data,
        "train": measure_step,
        "denoise": measure_denoise,
        "sweep": _sweep,
    }
    check_file(out)
    rows: Rows = []
    since = time.monotonic()
    for row in measures[name](config):
        rows.append(row)
        seconds = time.monotonic() - since
        print(f"bench {name}: row {len(rows)} after {seconds:,.0f} s", file=sys.stderr, flush=True)
    named = (column for row in rows for column in row if column != CURVE)
    columns = list(dict.fromkeys(named))
    cells = [columns] + [[_cell(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(len(line[k]) for line in cells) for k in range(len(columns))]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    if out:
        write_atomic(out, as_json({"bench": name, "results": rows}, indent=2) + "\n")
        curves = {f"{row['images']:,} images": row[CURVE] for row in rows if CURVE in row}
        if curves:
            _plot_memory(curves, out.with_suffix(".png"))
    return 0


def _plot_memory(curves: dict[str, list[list[float]]], path: Path) -> None:
    """Draw megabytes over seconds, a line for each job."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axis = figure.subplots()
    for name, curve in curves.items():
        seconds, megabytes = zip(*curve, strict=True)
        axis.plot(seconds, megabytes, label=name)
    axis.set_xlabel("seconds")
    axis.set_ylabel("memory of the whole job, MB")
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)
    FigureCanvasAgg(figure).print_png(path)


def _cell(value: Any) -> str:
    return (
        f"{value:.3g}"
        if isinstance(value, float) and value < 100
        else (f"{value:,.0f}" if isinstance(value, (int, float)) else str(value))
    )


def _seconds(run: Callable[[], Any], at_least: float = 0.5) -> float:
    """Time of one call: best of several, over at least so many seconds in all."""
    times: list[float] = []
    while not times or sum(times) < at_least:
        since = time.perf_counter()
        run()
        times.append(time.perf_counter() - since)
    return min(times)


def _radon(config: Config) -> Rows:
    """The noise operator against scikit-image, one image at a time as its users call it.

    `build_s` is what the first call takes more than a later one with a single image.
    """
    rows = []
    rng = np.random.default_rng(config.seed)
    RadonNoise(NoiseSpec(4), 8, 8)(images=np.zeros((1, 8, 8)))  # compiles, or finds it on disk
    for size, n_views in RADON_SIZES:
        spec = NoiseSpec(n_views, config.noise.filter)
        since = time.perf_counter()
        operator = RadonNoise(spec, size, size)
        operator(np.zeros((1, size, size), np.float32))
        first = time.perf_counter() - since
        n_images = max(operator.block, 2**20 // size**2)
        images = rng.random((n_images, size, size), dtype=np.float32)
        name = None if spec.filter == "none" else spec.filter

        # In float32, as ours; the reference for the error is float64.
        def reference(image: Any = images[0], spec: NoiseSpec = spec, name: Any = name) -> Any:
            sinogram = radon(image, spec.theta, circle=False)
            return iradon(
                sinogram, spec.theta, output_size=len(image), filter_name=name, circle=False
            )

        theirs = 1 / _seconds(reference)
        ours = len(images) / _seconds(lambda op=operator, x=images: op(x))  # type: ignore[misc]
        single = _seconds(lambda op=operator, x=images[:1]: op(x))  # type: ignore[misc]
        truth = reference(images[0].astype(np.float64))
        error = float(np.abs(operator(images[:1])[0] - truth).max())
        rows.append(
            {
                "size": size,
                "n_views": n_views,
                "skimage_images_per_s": theirs,
                "images_per_s": ours,
                "ratio": ours / theirs,
                "max_abs_error": error,
                "build_s": max(0.0, first - single),
                "operator_mb": operator.nbytes / 2**20,
                "single_images_per_s": 1 / single,
            }
        )
    return rows


def _data(config: Config) -> Rows:
    """The training feed from memory and from shards, beside the step that consumes it.

    An image counts once, with all of its noisy versions.
    """
    small = configs.replace(config, {"images.limit": FEED_IMAGES})
    rows: Rows = []
    with tempfile.TemporaryDirectory() as folder, connected():
        since = time.perf_counter()
        data = simulate(small, images="glyphs", out=Path(folder) / "data").out
        rows.append(_rate("read, decode, noise, write: snr simulate", FEED_IMAGES, since))
        origin = Origin(data=data)
        pairs, _ = collect_pairs(open_rows(small, origin, "train"), small)
        learner = Learner(small)
        for batch_size in (config.train.batch_size, GPU_BATCH):
            wanted = configs.replace(small, {"train.batch_size": batch_size})
            feeds: dict[str, PairFeed | ShardFeed] = {
                "memory": PairFeed(pairs, batch_size, seed=config.seed, share=Share()),
                "shards": ShardFeed(DataFolder.open(data), wanted, Share()),
            }
            for name, feed in feeds.items():
                steps = feed.steps_per_epoch
                since = time.perf_counter()
                for step in range(2 * steps):
                    feed.batch(step)
                what = f"feed from {name}, batches of {batch_size}"
                rows.append(_rate(what, 2 * steps * batch_size, since))
            if batch_size == config.train.batch_size:
                rows += _feed_cost(learner, feeds)
    return rows


def _rate(what: str, n_images: int, since: float) -> dict[str, Any]:
    return {"what": what, "images_per_s": n_images / (time.perf_counter() - since)}


def _feed_cost(learner: Learner, feeds: dict[str, PairFeed | ShardFeed]) -> Rows:
    """The bare step, and the step with each feed; taken in turns, so that all see one machine."""
    batch_size, same = learner.config.train.batch_size, feeds["memory"].batch(0)
    sources = {"step alone": itertools.repeat(same)} | {
        f"step, fed from {name}": feed.batches(0) for name, feed in feeds.items()
    }
    seconds: dict[str, list[float]] = {what: [] for what in sources}
    learner.train_step(same)
    for _ in range(FEED_STEPS):
        for what, batches in sources.items():
            since = time.perf_counter()
            learner.train_step(next(batches))
            seconds[what].append(time.perf_counter() - since)
    bare = float(np.median(seconds["step alone"]))
    return [
        {
            "what": what,
            "images_per_s": batch_size / float(np.median(times)),
            "feed_cost_percent": 100 * (float(np.median(times)) / bare - 1),
        }
        for what, times in seconds.items()
    ]


def _sweep(config: Config) -> Rows:
    """What a trial costs beside its training: three trials of a few steps."""
    changes = {
        "images.limit": 400,
        "sweep.steps": STEPS,
        "train.checkpoint_every_steps": STEPS,
        "train.val_images": 16,
    }
    small = configs.replace(config, changes)
    n_trials = 3
    with tempfile.TemporaryDirectory() as folder, connected():
        since = time.perf_counter()
        sweep(small, origin=Origin(images="glyphs"), out=Path(folder) / "sweep", trials=n_trials)
        elapsed = time.perf_counter() - since
    return [{"trials": n_trials, "steps_per_trial": STEPS, "s_per_trial": elapsed / n_trials}]
