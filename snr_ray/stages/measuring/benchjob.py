"""The simulate job at full size: its rate beside the same work without Ray, memory over time."""

import contextlib
import io
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from snr_ray import configfile as configs
from snr_ray.config import Config
from snr_ray.errors import InputError
from snr_ray.images.datafolder import parquet_bytes
from snr_ray.images.sources import open_source
from snr_ray.stages.measuring.benchbare import in_processes
from snr_ray.stages.simulation.simulate import simulate_rows

Rows = list[dict[str, Any]]

CURVE = "memory_mb"
"""Column of a measurement over time, [seconds, value]; for the file and a plot, not the table."""
GENERATED_ROWS = 10_000
"""Rows of a generated Parquet file."""
BARE_IMAGES, BARE_STEP = 8000, 500
"""Images of a loop without Ray, and how many of them at a time."""


def measure_job(config: Config) -> Rows:
    """The whole simulate job on a generated set of images.limit images and on a twentieth of it,
    each in whole files: rate beside processes that do the same work without it, and memory over
    time.

    Memory is that of all processes, where what they share counts once.
    """
    n_images = config.images.limit or 100_000
    rows: Rows = []
    with tempfile.TemporaryDirectory() as folder:
        images, out = Path(folder) / "images", Path(folder) / "data"
        _generate(n_images, config, images)
        for n_files in sorted({math.ceil(n / GENERATED_ROWS) for n in (n_images / 20, n_images)}):
            command = [sys.executable, "-m", "snr_ray.cli", "simulate"]
            configs.save(configs.replace(config, {"images.limit": None}), Path(folder) / "c.yaml")
            files = sorted(images.iterdir())[:n_files]
            part = Path(folder) / f"part{n_files}"
            part.mkdir()
            for file in files:
                (part / file.name).symlink_to(file)
            command += ["--config", f"{folder}/c.yaml", "--images", str(part), "--out", str(out)]
            before = _bare_rates(config, part)
            since, curve = time.perf_counter(), []
            job = subprocess.Popen([*command, "--overwrite"])
            while job.poll() is None:
                curve.append([round(time.perf_counter() - since, 1), _memory(job.pid)])
                time.sleep(1)
            elapsed = time.perf_counter() - since
            if job.returncode:
                raise InputError(f"snr simulate ended with {job.returncode}; see above.")
            alone, together = np.mean([before, _bare_rates(config, part)], axis=0)
            total, cores = len(files) * GENERATED_ROWS, os.cpu_count() or 1
            rows.append(
                {
                    "images": total,
                    "seconds": elapsed,
                    "images_per_s": total / elapsed,
                    "one_core_images_per_s": alone,
                    "all_cores_images_per_s": together,
                    "share_of_one_core_x_cores": total / elapsed / alone / cores,
                    "share_of_all_cores": total / elapsed / together,
                    "peak_mb": max(mb for _, mb in curve),
                    CURVE: curve,
                }
            )
            shutil.rmtree(out)
    return rows


def _generate(n_images: int, config: Config, folder: Path) -> None:
    """Parquet files of PNG images: letters, each shifted and shaded in a way of its own."""
    source, rng = open_source("glyphs"), np.random.default_rng(config.seed)
    letters = np.stack([source.load(k, config.images) for k in range(0, len(source.ids), 8)])
    folder.mkdir()
    for first in range(0, n_images, GENERATED_ROWS):
        files = []
        for _ in range(GENERATED_ROWS):
            letter = letters[rng.integers(len(letters))]
            shifted = np.roll(letter, rng.integers(-4, 5, 2), axis=(1, 2)) * rng.uniform(0.5, 1)
            pixels = np.moveaxis((shifted * 255).astype(np.uint8), 0, 2)
            out = io.BytesIO()
            Image.fromarray(pixels.squeeze()).save(out, format="png", compress_level=1)
            files.append(out.getvalue())
        names = [f"{first + k:07d}.png" for k in range(GENERATED_ROWS)]
        table = pa.table({"bytes": files, "path": names})
        pq.write_table(table, folder / f"{first:07d}.parquet", row_group_size=1000)


def _bare_rates(config: Config, images: Path) -> tuple[float, float]:
    """Images per second of decode, noise and encode and nothing else: of one process, and of as
    many at once as there are cores, which get in each other's way in memory."""
    (one,) = in_processes(_bare_loop, (config, images))
    return one, sum(in_processes(_bare_loop, (config, images), os.cpu_count() or 1))


def _bare_loop(config: Config, images: Path, start: Any) -> float:
    """A process of its own: images per second of the work of the job's tasks, without the job."""
    source = open_source(str(images))
    rows = source.gathered(source.select("train"))[:BARE_IMAGES]
    simulate_rows(source, rows[:10], config)
    start.wait()
    since = time.perf_counter()
    for first in range(0, len(rows), BARE_STEP):
        table, _ = simulate_rows(source, rows[first : first + BARE_STEP], config)
        parquet_bytes(table)
    return len(rows) / (time.perf_counter() - since)


def _memory(pid: int) -> float:
    """Megabytes of a process and all that it started; shared pages count once."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        main = psutil.Process(pid)
        for process in [main, *main.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().pss
    return total / 2**20
