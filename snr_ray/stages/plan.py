"""How long a denoising job will take, and what it needs: from rates measured here, or given.

A small real job runs twice on this machine, with few and with more images: the difference is the
rate, the rest is the start. Other machines are this one times their cores, which is said; a file of
rates that `snr plan --out` wrote on one of them is better.
"""

import dataclasses
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from snr_ray.config import Config, InputError, check
from snr_ray.images.samples import crop_photo, photo_ids
from snr_ray.learning.checkpoint import load_model
from snr_ray.noise.operator import NoiseSpec, noise_operator
from snr_ray.outputs import write_atomic
from snr_ray.stages.cluster import connected, cpus
from snr_ray.stages.denoise import denoise

MEASURE_S = 20.0
"""About as long as the larger of the two jobs works."""
FIRST_IMAGES = 32


@dataclass(frozen=True)
class Rates:
    """What one image of a kind costs on one kind of machine."""

    size: int
    n_views: int
    channels: int
    images_per_s_per_core: float
    start_s: float
    """From the command to the first image."""
    output_bytes: float
    """Of one cleaned image, as 8-bit PNG."""
    driver_bytes: float
    """Memory of the driver and of Ray's own processes on the head."""
    worker_bytes: float
    """Memory of the worker of one core."""
    images_per_s_per_gpu: float | None = None
    """Given only: no machine without GPUs can know it."""


@dataclass(frozen=True)
class Forecast:
    """What a job will take."""

    hours: float
    head_bytes: float
    node_bytes: float
    """Of each node, beside its operating system."""
    store_bytes: float
    """Object store of each node: blocks under way."""
    output_bytes: float
    price: float | None


def plan(
    config: Config,
    *,
    model: str,
    images: int,
    size: int,
    n_views: int,
    nodes: int = 1,
    cores: int | None = None,
    gpus: int = 0,
    rates: Path | None = None,
    price: float | None = None,
    out: Path | None = None,
) -> int:
    """Print a forecast; returns the exit code.

    Args:
        config: `images.channels` is used.
        model: model folder or name, for the measurement.
        images: how many.
        size: height and width in pixels.
        n_views: view count of their noise.
        nodes: machines that work.
        cores: of each; None takes this machine's.
        gpus: of all machines together; needs `rates` with images_per_s_per_gpu.
        rates: JSON that an earlier plan wrote, possibly on another machine; None measures here.
        price: of a node for an hour, in any currency.
        out: where to write rates and forecast as JSON.

    Raises:
        InputError: for numbers below one, or rates that do not fit.
    """
    here = os.cpu_count() or 1
    cores = here if cores is None else cores
    for name, number in (("--images", images), ("--size", size), ("--nodes", nodes),
                         ("--cores", cores)):  # fmt: skip
        check(number >= 1, f"{name} must be at least 1, but got {number}.")
    check(gpus >= 0, f"--gpus must not be negative, but got {gpus}.")
    if rates is None:
        check(gpus == 0, "--gpus needs --rates FILE with images_per_s_per_gpu, measured on one.")
        print(f"plan: measuring {size}x{size} images on this machine's {here} cores.", flush=True)
        known = measure(config, model=model, size=size, n_views=n_views)
    else:
        known = read_rates(rates, size, n_views, config.images.channels, gpus)
    forecast = forecast_job(known, images=images, nodes=nodes, cores=cores, gpus=gpus, price=price)
    print(table(known, forecast, measured=rates is None, cores=cores, nodes=nodes, here=here))
    if out:
        data = {"rates": dataclasses.asdict(known), "forecast": dataclasses.asdict(forecast)}
        write_atomic(out, json.dumps(data, indent=2) + "\n")
    return 0


def forecast_job(
    rates: Rates, *, images: int, nodes: int, cores: int, gpus: int, price: float | None
) -> Forecast:
    """What `images` images take on `nodes` machines of `cores` cores each and `gpus` GPUs in all.

    With GPUs the cores only read and write: the GPUs' own rate, measured so, is taken.
    """
    if gpus:
        assert rates.images_per_s_per_gpu is not None
        rate = gpus * rates.images_per_s_per_gpu
    else:
        rate = nodes * cores * rates.images_per_s_per_core
    hours = (rates.start_s + images / rate) / 3600
    block = 64 * 4 * rates.channels * rates.size**2  # images of a task, as float32
    return Forecast(
        hours=hours,
        head_bytes=rates.driver_bytes,
        node_bytes=cores * rates.worker_bytes,
        store_bytes=2.0 * cores * block,
        output_bytes=images * rates.output_bytes,
        price=None if price is None else price * nodes * hours,
    )


def measure(config: Config, *, model: str, size: int, n_views: int) -> Rates:
    """Rates of this machine, by two small denoising jobs on all of its cores.

    Raises:
        InputError: for a model, size or view count that does not go.
    """
    channels = config.images.channels
    trained = load_model(model)
    told = n_views if trained.can_be_told and not trained.config.model.physics else None
    with tempfile.TemporaryDirectory(prefix="snr-plan-") as folder, connected():
        used = _Memory()
        count, times = FIRST_IMAGES, []
        for name in ("first", "second"):
            images, out = Path(folder) / name, Path(folder) / f"{name}-out"
            _write_images(images, count, size, n_views, channels)
            since = time.perf_counter()
            with used.watched(), _quiet():
                denoise(config, model=model, images=str(images), out=out, n_views=told)
            times.append((count, time.perf_counter() - since))
            sizes = [path.stat().st_size for path in out.rglob("*.png")]
            check(len(sizes) == count, f"The model {model} cannot clean {size}x{size} images.")
            if name == "first":
                count = _second_count(times[0], cpus())
        (few, brief), (many, longer) = times
        rate = (many - few) / max(longer - brief, 1e-3)
        cores = cpus()
    return Rates(
        size=size,
        n_views=n_views,
        channels=channels,
        images_per_s_per_core=rate / cores,
        start_s=max(0.0, brief - few / rate),
        output_bytes=float(np.mean(sizes)),
        driver_bytes=float(used.driver),
        worker_bytes=float(used.worker),
    )


def _second_count(first: tuple[int, float], cores: int) -> int:
    """How many images keep all cores busy for about MEASURE_S, by a first guess."""
    count, seconds = first
    tasks = 8 * cores * FIRST_IMAGES  # enough for every core, also where the guess is poor
    return int(np.clip(count / seconds * MEASURE_S, 2 * FIRST_IMAGES, max(tasks, 4096)))


def read_rates(path: Path, size: int, n_views: int, channels: int, gpus: int) -> Rates:
    """Rates out of the JSON of an earlier plan.

    Raises:
        InputError: if it is none, is of other images, or says nothing of GPUs that are asked for.
    """
    try:
        rates = Rates(**json.loads(path.read_text())["rates"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"--rates must be a file that `snr plan --out` wrote, but {path} is not ({error})."
        ) from None
    for name, mine, theirs in (("size", size, rates.size), ("views", n_views, rates.n_views),
                               ("images.channels", channels, rates.channels)):  # fmt: skip
        check(
            mine == theirs,
            f"--rates must be of the same images, but {path} has {name} {theirs} where {mine} is "
            "asked for; measure those.",
        )
    check(
        not gpus or bool(rates.images_per_s_per_gpu),
        f"--gpus needs images_per_s_per_gpu in {path}; put what `snr denoise` reached there.",
    )
    return rates


def table(
    rates: Rates, forecast: Forecast, *, measured: bool, cores: int, nodes: int, here: int
) -> str:
    """The forecast as text, each line with where its figure is from."""
    source = "measured here" if measured else "given"
    same = measured and (cores, nodes) == (here, 1)
    scaled = "measured here" if same else f"{source}, times {nodes} x {cores} cores"
    lines = [
        ("images/s of one core", f"{rates.images_per_s_per_core:,.2f}", source),
        ("start", f"{rates.start_s:,.0f} s", source),
        ("hours", f"{forecast.hours:,.2f}", f"extrapolated: {scaled}"),
        ("memory of the head", _bytes(forecast.head_bytes), source),
        ("memory of a node's workers", _bytes(forecast.node_bytes), f"{source}, times cores"),
        ("object store of a node", _bytes(forecast.store_bytes), "reckoned: two blocks a core"),
        ("output", _bytes(forecast.output_bytes), f"extrapolated: 8-bit PNG, {source}"),
    ]
    if rates.images_per_s_per_gpu:
        rate = f"{rates.images_per_s_per_gpu:,.1f}"
        lines.insert(1, ("images/s of one GPU", rate, "given"))
    if forecast.price is not None:
        lines.append(("price", f"{forecast.price:,.2f}", "given, times hours"))
    widths = [max(len(line[k]) for line in lines) for k in (0, 1)]
    return "\n".join(f"{a:{widths[0]}}  {b:>{widths[1]}}  {c}" for a, b, c in lines)


def _bytes(number: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.3g} TB"


def _write_images(folder: Path, count: int, size: int, n_views: int, channels: int) -> None:
    """Noisy 8-bit PNG: as users' files are, from a few photographs whose pixels differ."""
    folder.mkdir()
    noise = noise_operator(NoiseSpec(n_views), size, size)
    clean = []
    for name in photo_ids()[: min(count, 16)]:
        picture = Image.fromarray(crop_photo(name)).convert("RGB" if channels == 3 else "L")
        pixels = np.asarray(picture.resize((size, size)), np.float32) / 255
        clean.append(np.moveaxis(pixels, -1, 0) if channels == 3 else pixels[None])
    noisy = noise(np.stack(clean)).clip(0, 1)
    for k in range(count):
        pixels = np.roll(noisy[k % len(noisy)], k, axis=-1)
        image = (255 * pixels).round().astype(np.uint8)
        out = np.moveaxis(image, 0, -1) if channels == 3 else image[0]
        Image.fromarray(out).save(folder / f"{k:06d}.png")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the small jobs say of themselves."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


class _Memory:
    """The most that the driver's side and any worker held, in bytes, looked at every half second.

    Shared pages count in part (proportional set size) where the system tells that.
    """

    def __init__(self) -> None:
        self.driver = self.worker = 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        done = threading.Event()
        thread = threading.Thread(target=self._watch, args=(done,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _watch(self, done: threading.Event) -> None:
        me = psutil.Process()
        while not done.wait(0.5):
            driver = _held(me)
            for process in me.children(recursive=True):
                try:
                    name, held = process.name(), _held(process)
                except psutil.Error:
                    continue  # it has ended meanwhile
                if name.startswith("ray::") and "IDLE" not in name and "Agent" not in name:
                    self.worker = max(self.worker, held)
                elif not name.startswith("ray::"):
                    driver += held
            self.driver = max(self.driver, driver)


def _held(process: psutil.Process) -> int:
    memory = process.memory_full_info()
    return int(getattr(memory, "pss", 0) or memory.rss)
