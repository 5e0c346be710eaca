"""What an image costs on this machine: measured by small jobs, or read from an earlier plan.

The jobs run as a user would start them, with few and with ever more images: the difference of the
first and the last is the rate, the rest is the start. The first has the small blocks that a job of
denoise begins with, and what the others have more are full ones on all cores, as a long job has
them.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import psutil
from PIL import Image
from ray._private.utils import get_num_cpus

from snr_ray import configfile as configs
from snr_ray.address import open_folder
from snr_ray.config import Config
from snr_ray.errors import InputError, check
from snr_ray.hashing import fingerprint
from snr_ray.images.collection import Source
from snr_ray.images.samples import crop_photo, photo_ids
from snr_ray.learning.modelfolder import read_model
from snr_ray.noise.operator import NoiseSpec, noise_operator
from snr_ray.stages.denoising.bulk import ramp_of
from snr_ray.stages.denoising.denoisejob import images_per_block
from snr_ray.stages.denoising.imagefiles import OWN_NAMES
from snr_ray.stages.denoising.retrylist import read_failures
from snr_ray.stages.job.connection import connected, cpus
from snr_ray.stages.job.inputs import open_images

Stage = Literal["denoise", "simulate"]
MEASURE_S = 20.0
"""So much longer than the first job the last one takes at least."""
FIRST_IMAGES, TIMES = 8, 8
"""Images of the first job of simulate, and how many times as many each next one has at most."""
FULL_BLOCKS = 2
"""Full blocks of each core in the second job of denoise."""
MOST_IMAGES = 8 * 8**4
"""No further job is run where the last had so many images."""
LOOK_S = 1.0
"""Seconds between looks at the memory of a job."""


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
    """Of one image: cleaned, as 8-bit PNG, or its row of a data folder."""
    driver_bytes: float
    """Memory of the driver and of Ray's own processes on the head."""
    worker_bytes: float
    """Memory of the worker of one core that it shares with no other."""
    images_per_s_per_gpu: float | None = None
    """Given only: no machine without GPUs can know it."""
    stage: Stage = "denoise"
    shared_bytes: float = 0.0
    """Memory that all workers of a node share, such as the code of libraries."""
    model: str = ""
    """Fingerprint of the weights that denoise was measured with; "" where none says."""


def read_rates(
    path: Path, stage: Stage, size: int, n_views: int, channels: int, gpus: int, model: str
) -> Rates:
    """Rates out of the JSON of an earlier plan.

    Raises:
        InputError: if it is none, is of other images or another model, or says nothing of GPUs
            that are asked for.
    """
    its_model = fingerprint(read_model(model).weights) if stage == "denoise" else ""
    try:
        rates = Rates(**json.loads(path.read_text())["rates"])
        _check_numbers(rates)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"--rates must be a file that `snr plan --out` wrote, but {path} is not ({error})."
        ) from None
    check(
        not rates.model or rates.model == its_model,
        f"--rates must be of the same work, but {path} is of another model than {model}; measure "
        "that.",
    )
    for name, mine, theirs in (("stage", stage, rates.stage), ("size", size, rates.size),
                               ("views", n_views, rates.n_views),
                               ("images.channels", channels, rates.channels)):  # fmt: skip
        check(
            mine == theirs,
            f"--rates must be of the same work, but {path} has {name} {theirs} where {mine} is "
            "asked for; measure those.",
        )
    check(
        not gpus or bool(rates.images_per_s_per_gpu),
        f"--gpus needs images_per_s_per_gpu in {path}; put what `snr denoise` reached there.",
    )
    return rates


def _check_numbers(rates: Rates) -> None:
    """Raise ValueError for rates that somebody wrote by hand and that are no numbers of any use."""
    above = ("images_per_s_per_core", "output_bytes", "driver_bytes", "worker_bytes")
    given = () if rates.images_per_s_per_gpu is None else ("images_per_s_per_gpu",)
    for key in (*above, "start_s", "shared_bytes", *given):
        value = getattr(rates, key)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value < math.inf or (key in above and not value):
            raise ValueError(f"{key} is {value!r}")


def measure(
    config: Config, *, stage: Stage, model: str, size: int, n_views: int, like: str | None = None
) -> Rates:
    """Rates of this machine or of the cluster of RAY_ADDRESS, by small jobs on all its cores.

    Raises:
        InputError: for a model, size or view count that does not go, or images that cannot be read.
    """
    source = None if like is None else open_images(like)
    channels = config.images.channels
    if "RAY_ADDRESS" in os.environ:
        with connected(data=False):
            cores = cpus()
    else:
        cores = get_num_cpus()
    memory = _Memory()
    first, more = _counts(stage, channels * size**2, cores)
    weights = ""
    count = first
    times: list[tuple[int, float]] = []
    with tempfile.TemporaryDirectory(prefix="snr-plan-") as folder:
        settings = {"images.size": size, "images.limit": None, "noise.n_views": [n_views]}
        words = ["--config", str(Path(folder) / "plan.yaml")]
        if stage == "simulate":
            config = configs.replace(config, settings)
        else:
            words += ["--model", model]
            its = read_model(model)
            weights = fingerprint(its.weights)
            if its.can_be_told and not its.config.model.physics:
                words += ["--views", str(n_views)]
        configs.save(config, Path(words[1]))
        while len(times) < 2 or (
            times[-1][1] - times[0][1] < MEASURE_S and times[-1][0] < MOST_IMAGES
        ):
            images, out = Path(folder) / f"{count}", Path(folder) / f"{count}-out"
            if source is None:
                _write_images(images, count, size, n_views, channels)
            else:
                _copy_images(source, images, count)
            since = time.perf_counter()
            _run([stage, *words, "--images", str(images), "--out", str(out)], memory)
            times.append((count, time.perf_counter() - since))
            failed = read_failures(open_folder(out))
            if len(failed):
                raise InputError(
                    f"A measurement needs images of which none fails, but {len(failed)} of {count} "
                    f"did: {failed['reason'][0].as_py()}"
                )
            if len(times) > 1:  # as many as it takes, at most TIMES as many
                longer = max(times[-1][1] - times[0][1], 1e-3)
                more *= int(np.clip(math.ceil(1.5 * MEASURE_S / longer), 2, TIMES))
            count = first + more
        place = open_folder(out)
        written = sum((out / name).stat().st_size for name in place.list() if _is_result(name))
    (few, brief), (many, longer) = times[0], times[-1]
    rate = (many - few) / max(longer - brief, 1e-3)
    return Rates(
        stage=stage,
        model=weights,
        size=size,
        n_views=n_views,
        channels=channels,
        images_per_s_per_core=rate / cores,
        start_s=max(0.0, brief - few / rate),
        output_bytes=written / many,
        driver_bytes=float(memory.driver),
        worker_bytes=float(memory.worker),
        shared_bytes=float(memory.shared),
    )


def _counts(stage: Stage, values: int, cores: int) -> tuple[int, int]:
    """Images of the first job, of so many values each, and how many more the second has."""
    if stage == "simulate":
        return FIRST_IMAGES, (TIMES - 1) * FIRST_IMAGES
    block = images_per_block(values)
    first = ramp_of(block) if block > 1 else cores  # of one image, all blocks are alike
    return first, FULL_BLOCKS * cores * block


def _run(words: list[str], memory: "_Memory") -> None:
    """`snr ...` to its end. Raises InputError with what it said where it was refused."""
    job = subprocess.Popen(
        [sys.executable, "-m", "snr_ray.cli", *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    said = ""
    try:
        while job.returncode is None:
            with suppress(subprocess.TimeoutExpired):
                said = job.communicate(timeout=LOOK_S)[0]
            memory.look(job.pid)
    finally:
        if job.returncode is None:  # this process was interrupted
            job.terminate()
            job.communicate()
    if job.returncode not in (0, 3):  # 3 is also of doubtful images, which take as long
        reason = (said.strip().splitlines() or ["it said nothing"])[-1]
        raise InputError(f"A measurement ended with {job.returncode}: {reason}")


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


def _copy_images(source: Source, folder: Path, count: int) -> None:
    """Files of a source, over and over, under other names."""
    folder.mkdir()
    for k in range(count):
        name, data = source.file(k % len(source.ids))
        (folder / f"{k:06d}-{PurePosixPath(name).name}").write_bytes(data)


def _is_result(name: str) -> bool:
    """Whether a file of a job's folder is an image, or a shard of a data folder."""
    top = PurePosixPath(name).parts[0]
    return top not in OWN_NAMES and top not in ("manifest.json", "failures.parquet", "plan.json")


class _Memory:
    """The most that a driver with Ray's own processes, and any worker, held, in bytes.

    What processes share, such as the code of libraries, counts once. Proportional shares would do,
    but for others on this machine, of whom each that uses the same libraries makes them smaller.
    """

    def __init__(self) -> None:
        self.driver = self.worker = self.shared = 0

    def look(self, pid: int) -> None:
        """Look at a driver and its children now."""
        driver, shared = 0, 0
        with suppress(psutil.Error):  # it has ended meanwhile
            root = psutil.Process(pid)
            for process in (root, *root.children(recursive=True)):
                with suppress(psutil.Error):
                    name, (own, common) = process.name(), _held(process)
                    if not name.startswith("ray::") or "Agent" in name:
                        driver += own
                        shared = max(shared, common)
                    elif "IDLE" not in name:
                        self.worker = max(self.worker, own)
                        self.shared = max(self.shared, common)
        self.driver = max(self.driver, driver + shared)


def _held(process: psutil.Process) -> tuple[int, int]:
    """What a process holds: alone, and with others."""
    memory = process.memory_full_info()
    own = int(getattr(memory, "uss", memory.rss))
    return own, max(0, int(memory.rss) - own)
