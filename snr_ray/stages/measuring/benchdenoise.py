"""What bulk denoising costs beside the same work in a bare loop, and what its driver bears.

    job            `snr denoise` as users start it, on images that need the network
    bare loop      a process per core: read, decode, exchange, encode, write, and nothing else
    idle driver    a job whose tasks do nothing, over many images: the driver alone
    played GPU     the pipeline around a GPU that only waits: its own ceiling
    GPU            the same around a GPU with a model, where there is one

Processor time is that of all processes of a job. It says more than the clock on a machine that has
other work, too.
"""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import ray
from PIL import Image

from snr_ray.config import Config, ImagesConfig
from snr_ray.errors import InputError
from snr_ray.images.collection import Source, Texts
from snr_ray.images.sources import open_source
from snr_ray.learning.modelfolder import read_model
from snr_ray.localfolder import LocalFolder
from snr_ray.noise.operator import NoiseSpec, noise_operator
from snr_ray.stages.denoising.bulk import Block, Indices, Work
from snr_ray.stages.denoising.cleaning import STAND_IN, Cleaning, Maker
from snr_ray.stages.denoising.denoisejob import MOST_IMAGES, Job, Running
from snr_ray.stages.denoising.imagefiles import (
    ROW_SCHEMA,
    Answer,
    Stack,
    Target,
    check_output_names,
    open_files,
    read_files,
    write_files,
)
from snr_ray.stages.denoising.manifest import Manifest
from snr_ray.stages.denoising.retrylist import asked_for
from snr_ray.stages.denoising.swappermaker import SwapperMaker
from snr_ray.stages.job.connection import connected, cpus
from snr_ray.stages.measuring.benchbare import in_processes


@dataclass(frozen=True)
class Collection:
    """Images to be cleaned, as collections have them."""

    what: str
    model: str
    source: str
    size: int
    channels: int
    n_views: int
    suffix: str
    count: int
    bare: int
    """Images of each bare loop."""


COLLECTIONS = (
    Collection("28 px PNG", "notmnist", "glyphs", 28, 1, 20, ".png", 20_000, 1000),
    Collection("128 px JPEG", "places64-rgb", "photos", 128, 3, 40, ".jpg", 5_000, 100),
    Collection("512 px slices", "places64", "photos", 512, 1, 160, ".tif", 60, 4),
)
ON_GPU = (
    Collection("28 px PNG", "notmnist", "glyphs", 28, 1, 20, ".png", 24_000, 0),
    Collection("64 px PNG", "places64", "photos", 64, 1, 20, ".png", 20_000, 0),
)
DISTINCT = 32
"""Different images of a collection."""
DRIVEN = (20_000, 1_000_000)
"""Images of the idle jobs."""
WAIT_S = 0.01
"""What a played GPU needs for a stack."""
PLAYED_IMAGES = 8192
LINKS = 30_000
"""Names that one file may have; file systems have a bound."""


def measure_denoise(config: Config) -> Iterator[dict[str, Any]]:
    """All rows, as they are measured; with images.limit, of at most so many images each."""
    most = config.images.limit or max(DRIVEN)
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        for k, collection in enumerate(COLLECTIONS):
            images = folder / f"images{k}"
            _make(collection, images, min(collection.count, most))
            yield _job(collection, images, folder / f"out{k}")
        yield from _drivers(folder, most)
        yield _played(folder, folder / "images0", min(PLAYED_IMAGES, most))
        import torch  # slow to import, and most of what is here does without

        for collection in ON_GPU if torch.cuda.is_available() else ():
            yield measure_gpu(collection, folder, most)


def measure_gpu(collection: Collection, folder: Path, most: int) -> dict[str, Any]:
    """Images per second through a GPU, beside decoding and encoding alone on all cores."""
    images = folder / f"gpu{collection.size}"
    _make(collection, images, min(collection.count, most))
    count = min(collection.count, most)
    rates = in_processes(_files_alone, (images, most), os.cpu_count() or 1)
    since = time.monotonic()
    (rate,) = in_processes(_gpu_job, (images, folder / f"out{images.name}", collection.model))
    return {
        "what": f"GPU, {collection.what}, beside decoding and encoding alone",
        "images": count,
        "images_per_s": rate,
        "with_start_images_per_s": count / (time.monotonic() - since),
        "bare_images_per_s": sum(rates),
        "share": rate / sum(rates),
    }


def _make(collection: Collection, folder: Path, count: int) -> None:
    """Noisy images, a few under many names."""
    source = open_source(collection.source)
    config = ImagesConfig(size=collection.size, channels=3 if collection.channels == 3 else 1)
    distinct = min(DISTINCT, count)
    chosen = np.linspace(0, len(source.ids) - 1, distinct).astype(int).tolist()
    clean = np.stack([source.load(index, config) for index in chosen])
    operator = noise_operator(NoiseSpec(collection.n_views), collection.size, collection.size)
    stored = (np.clip(operator(clean), 0, 1) * 255).round().astype(np.uint8)
    folder.mkdir()
    for k in range(count):
        path = folder / f"{k // 1000:04d}" / f"{k:07d}{collection.suffix}"
        path.parent.mkdir(exist_ok=True)
        if k < distinct:
            pixels = np.moveaxis(stored[k], 0, 2)
            Image.fromarray(pixels.squeeze()).save(path)
        else:
            path.hardlink_to(folder / "0000" / f"{k % distinct:07d}{collection.suffix}")


def _job(collection: Collection, images: Path, out: Path) -> dict[str, Any]:
    """A job beside the bare loops."""
    count = sum(1 for _ in images.rglob("*" + collection.suffix))
    bare_cpu, bare_rate = _bare_loops(collection, images)
    watched = _watch(["--model", collection.model, "--images", str(images)], out)
    seconds = watched.seconds - watched.first_s
    spent = (watched.cpu_s - watched.first_cpu_s) / count
    return {
        "what": collection.what,
        "images": count,
        "start_s": watched.first_s,
        "start_cpu_s": watched.first_cpu_s,
        "images_per_s": count / max(seconds, 1e-9),
        "bare_images_per_s": bare_rate,
        "cpu_ms": 1000 * spent,
        "bare_cpu_ms": 1000 * bare_cpu,
        "cpu_ratio": spent / bare_cpu,
    }


@dataclass
class _Watched:
    """A job as seen from outside; `first` is up to its first result."""

    first_s: float = 0.0
    first_cpu_s: float = 0.0
    seconds: float = 0.0
    cpu_s: float = 0.0


def _watch(options: list[str], out: Path, *, to_the_end: bool = True) -> _Watched:
    """Run `snr denoise` in a process of its own; to its first result, or to its end."""
    command = [sys.executable, "-m", "snr_ray.cli", "denoise", "--out", str(out), *options]
    found, since = _Watched(), time.monotonic()
    spent: dict[int, float] = {}
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as job:
        try:
            while job.poll() is None:
                _spent(job.pid, spent)
                if not found.first_s and _has_result(out):
                    found.first_s, found.first_cpu_s = time.monotonic() - since, sum(spent.values())
                    if not to_the_end:
                        return found
                time.sleep(0.1)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGTERM if job.poll() is None else signal.SIGKILL)
    if job.returncode not in (0, 3):
        raise InputError(f"The job that is measured must finish, but exited with {job.returncode}.")
    found.seconds, found.cpu_s = time.monotonic() - since, sum(spent.values())
    return found


def _spent(pid: int, spent: dict[int, float]) -> None:
    """Processor seconds of a process and of all that it started, as far as they were seen."""
    with contextlib.suppress(psutil.Error):
        main = psutil.Process(pid)
        for process in [main, *main.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                spent[process.pid] = times.user + times.system


def _has_result(out: Path) -> bool:
    folders = (path for path in out.glob("[0-9]*") if path.is_dir())
    return any(not path.name.startswith(".") for folder in folders for path in folder.iterdir())


def _bare_loops(collection: Collection, images: Path) -> tuple[float, float]:
    """Processor seconds of an image, and images per second of a loop per core at once."""
    found = in_processes(_bare_loop, (collection, images), os.cpu_count() or 1)
    return float(np.mean([cpu for cpu, _ in found])), sum(rate for _, rate in found)


def _bare_loop(collection: Collection, images: Path, start: Any) -> tuple[float, float]:
    import torch

    from snr_ray.learning.checkpoint import load_model
    from snr_ray.stages.denoising.fileswap import FileSwapper

    torch.set_num_threads(1)
    trained = load_model(collection.model)
    swapper = FileSwapper(trained, [level.numpy() for level in trained.codes.mean(0)])
    source, settings = open_source(str(images)), ImagesConfig()
    count = min(collection.bare, len(source.ids))
    with tempfile.TemporaryDirectory() as out:
        target = Target(LocalFolder(Path(out)))
        swapper.run(read_files(source, range(min(2, count))), settings, target)  # builds operators
        start.wait()
        since, before = time.perf_counter(), time.process_time()
        swapper.run(read_files(source, range(count)), settings, target)
        return (time.process_time() - before) / count, count / (time.perf_counter() - since)


def _drivers(folder: Path, most: int) -> Iterator[dict[str, Any]]:
    """Idle jobs over few and many images: what each image costs the driver."""
    least = 0.0
    for n_images in sorted({min(n, most) for n in DRIVEN}):
        images = folder / f"driven{n_images}"
        _link(folder / "images0", images, n_images)
        (found,) = in_processes(_idle_driver, (images, folder / f"idle{n_images}"))
        options = ["--model", COLLECTIONS[0].model, "--images", str(images)]
        first = _watch(options, folder / f"first{n_images}", to_the_end=False)
        least = least or found["driver_mb"]
        yield {
            "what": "driver, tasks that do nothing",
            "images": n_images,
            "start_s": first.first_s,
            "start_cpu_s": first.first_cpu_s,
            **found,
            "memory_ratio": found["driver_mb"] / least,
        }


def _link(originals: Path, folder: Path, count: int) -> None:
    """A folder of so many names of a few images."""
    files = sorted(originals.rglob("*.png"))[:DISTINCT]
    folder.mkdir()
    for first in range(0, count, LINKS):
        place = folder / f"{first // LINKS:04d}"
        place.mkdir()
        data = files[first // LINKS % len(files)].read_bytes()
        original = place / f"{first:07d}.png"
        original.write_bytes(data)
        for k in range(first + 1, min(first + LINKS, count)):
            os.link(original, place / f"{k:07d}.png")


def _idle_driver(images: Path, out: Path, start: Any) -> dict[str, float]:
    source = (asked := asked_for(str(images))).source
    check_output_names(source, samples=False)
    place = LocalFolder(out)
    rows, done = Manifest(place), np.zeros(len(source.ids), bool)
    job = Job(asked, place, ImagesConfig(), Running(), rows, done)
    with connected(data=False):
        ref, width = ray.put(source), 2 * cpus()
        work = Work(lambda block: _nothing.remote(ref, block.indices), lambda: width, _never)
        for warm in [work.start(Block(np.zeros(1, np.int64))) for _ in range(width)]:
            ray.get(warm)
        since, before = time.perf_counter(), time.process_time()
        job.drive(work, MOST_IMAGES)
        seconds, spent = time.perf_counter() - since, time.process_time() - before
    rows.summary(28, 24, 6)
    return {
        "images_per_s": len(done) / seconds,
        "cpu_ms": 1000 * spent / len(done),
        "driver_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


@ray.remote(num_cpus=1, max_retries=0)
def _nothing(source: Source, indices: Indices) -> pa.Table:
    """Rows of a block about which nothing was done."""
    ids = source.ids
    assert isinstance(ids, Texts)
    names = ids.array.take(pa.array(indices)).cast(pa.string())
    columns = [
        names if field.name in ("id", "output") else pa.nulls(len(indices), field.type)
        for field in ROW_SCHEMA
    ]
    return pa.table(columns, schema=ROW_SCHEMA)


def _never(index: int, stage: str, reason: str) -> pa.Table:
    raise AssertionError(reason)


def _played(folder: Path, images: Path, most: int) -> dict[str, Any]:
    """Images per second around a GPU that only waits, beside decoding and encoding alone."""
    rates = in_processes(_files_alone, (images, most), os.cpu_count() or 1)
    (rate,) = in_processes(_played_job, (images, folder / "played"))
    return {
        "what": f"GPU played by {1000 * WAIT_S:.0f} ms a stack, beside decoding and encoding alone",
        "images_per_s": rate,
        "bare_images_per_s": sum(rates),
        "share": rate / sum(rates),
    }


class Waits:
    """Gives back the images after the time that a GPU would take."""

    def __call__(self, device: str) -> "Waits":
        return self

    def answer(self, stack: Stack) -> Answer:
        """The images themselves."""
        time.sleep(WAIT_S)
        return Answer(stack.pixels, [0] * len(stack.ids), [""] * len(stack.ids))


def _played_job(images: Path, out: Path, start: Any) -> float:
    os.environ[STAND_IN] = "1"
    return _rate(through_gpu(images, out, Waits()))  # type: ignore[arg-type]


def _gpu_job(images: Path, out: Path, model: str, start: Any) -> float:
    return _rate(through_gpu(images, out, SwapperMaker(read_model(model), "mean", {})))


def through_gpu(images: Path, out: Path, maker: Maker) -> list[tuple[float, int]]:
    """A job whose nodes have one GPU: seconds and images done, as of its `curve`."""
    asked = asked_for(str(images))
    place = LocalFolder(out)
    place.write("job.json", "{}")
    done = np.zeros(len(asked.source.ids), bool)
    ray.init(address="local", num_gpus=1, include_dashboard=False, log_to_driver=False)
    job = Job(asked, place, ImagesConfig(), Running(), Manifest(place), done)
    job.run(Cleaning("gpu", asked.source, ImagesConfig(), Target(place), 0), maker)
    ray.shutdown()
    return job.curve


def _rate(curve: list[tuple[float, int]]) -> float:
    """Without the start: from the first block that was finished to the last."""
    (first_s, first), (last_s, last) = curve[0], curve[-1]
    return (last - first) / max(last_s - first_s, 1e-9)


def _files_alone(images: Path, most: int, start: Any) -> float:
    source = open_source(str(images))
    count = min(most, len(source.ids), 2000)
    with tempfile.TemporaryDirectory() as out:
        target = Target(LocalFolder(Path(out)))
        start.wait()
        since = time.perf_counter()
        for opened, stacks, _ in open_files(read_files(source, range(count)), ImagesConfig()):
            answers = [Answer(s.pixels, [0] * len(s.ids), [""] * len(s.ids)) for s in stacks]
            write_files(opened, stacks, answers, target)
        return count / (time.perf_counter() - since)
