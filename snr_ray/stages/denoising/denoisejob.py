"""A denoising job from its first block to its page: runs it, counts, and leaves what is to be read.

Every end leaves the rows and failures so far on disk, so that the same command continues.
"""

import contextlib
import math
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from snr_ray.config import ImagesConfig
from snr_ray.errors import InputError, RunError, check
from snr_ray.folder import Folder
from snr_ray.images.collection import Texts
from snr_ray.images.datafolder import FAILURES_SCHEMA
from snr_ray.images.formats.headers import n_values
from snr_ray.images.formats.zarrfolder import is_image
from snr_ray.learning.modelfolder import Knowledge
from snr_ray.localfolder import LocalFolder, discard
from snr_ray.lock import is_lock
from snr_ray.outputs import Progress
from snr_ray.scoring.jobpage import JobPage, denoise_report
from snr_ray.stages.denoising import bulk, manifest, retrylist
from snr_ray.stages.denoising.cleaning import Cleaning, Maker, on_cores, on_gpus
from snr_ray.stages.denoising.imagefiles import (
    DOUBTFUL,
    MANIFEST_SCHEMA,
    OWN_NAMES,
    PASS_PIXELS,
    kept,
)
from snr_ray.stages.denoising.manifest import Manifest, Summary
from snr_ray.stages.job import pools
from snr_ray.stages.job.connection import cpus, gpus
from snr_ray.stages.job.counters import count_images
from snr_ray.stages.job.outcome import Outcome

MOST_IMAGES = 256
"""Images of a block at most; fewer where they are large."""
GPU_BLOCK = 4
"""Blocks for a GPU are up to so many times as large, as long as each core has one: what a stack
costs beside its images is 15 ms of an H100."""
LOOK_AT = 8
"""Images whose headers say how large the images of a collection are."""
PAGE_IMAGES = 24
PAGE_WORST = 6
"""Images on the page of a job: drawn at random, and explained least."""
CURVE_POINTS = 200
"""Points of the curve of images over time, at most."""


def images_per_block(values: float, passes: int = 1) -> int:
    """Images of a block, of so many values each."""
    return int(np.clip(PASS_PIXELS / max(values, 1), 1, MOST_IMAGES) / passes) or 1


def gpu_block(per_block: int, n_images: int, n_cores: int) -> int:
    """Images of a block for a GPU, of a collection of so many, read and written by so many cores;
    `per_block` is that without GPUs."""
    return int(np.clip(n_images // max(1, n_cores), per_block, GPU_BLOCK * per_block))


@dataclass(frozen=True, kw_only=True)
class Running:
    """How a job runs; nothing here changes what it writes."""

    gpus: int | None = None
    """GPUs to use, 0 for none; None takes all that are there, or the first that may come."""
    max_failures: str | None = None
    """Failed images, or percent of those to do, that are borne; None: all."""
    progress: Literal["text", "json"] = "text"
    """A line for people, or one JSON object a line, on standard error."""
    stall_minutes: float = bulk.STALL_MINUTES
    """Minutes after which a job that finishes nothing is ended."""

    def __post_init__(self) -> None:
        check(
            self.gpus is None or self.gpus >= 0,
            f"--gpus must be a number of GPUs or none, but got {self.gpus}.",
        )
        check(
            self.stall_minutes > 0,
            f"--stall must be above 0 minutes, but got {self.stall_minutes:g}.",
        )
        self.bearable(1)

    def bearable(self, n_images: int) -> float:
        """How many images may fail. Raises InputError for a bound that is no number."""
        if self.max_failures is None:
            return math.inf
        number = self.max_failures.removesuffix("%")
        whole = number == self.max_failures
        try:
            bound = int(number) if whole else float(number)
        except ValueError:
            bound = -1
        check(
            0 <= bound <= (math.inf if whole else 100),
            "--max-failures must be a number of images or a percentage such as 2%, but got "
            f"{self.max_failures!r}.",
        )
        return bound if whole else bound / 100 * n_images


@dataclass
class Job:
    """One job and what became of it so far."""

    asked: retrylist.Asked
    out: Folder
    images: ImagesConfig
    running: Running
    rows: Manifest
    done: npt.NDArray[np.bool_]
    """Images of the source that have a row already, [n]."""
    samples: int = 0
    """Times that an image passes the network, if more than one."""
    failures: list[pa.Table] = field(default_factory=list)
    n_failed: int = 0
    curve: list[tuple[float, int]] = field(default_factory=list)
    """(seconds, images done) of this run."""
    begun: float = field(default_factory=time.time)

    @property
    def n_left(self) -> int:
        """Images to do."""
        return int((self.asked.wanted & ~self.done).sum())

    def run(self, cleaning: Cleaning, maker: Maker) -> None:
        """Do all images that are left.

        Raises:
            InputError, RunError, Lost: if the job cannot go on; all that was done is kept.
        """
        n_gpus, per_block = self._gpus(), self._per_block()
        if not n_gpus:
            return self.drive(on_cores(cleaning, maker), per_block)
        per_block = gpu_block(per_block, len(self.done), cpus())
        wait = self.running.stall_minutes
        return self.drive(on_gpus(cleaning, maker, n_gpus, wait, per_block), per_block)

    def tell_done(self) -> None:
        """The last line of a job that has nothing left to do, for programs that wait for it."""
        if self.running.progress == "json":
            total = int(self.asked.wanted.sum())
            Progress("denoise", total, start=total, form="json").update(total)

    def drive(self, work: bulk.Work, per_block: int) -> None:
        """The same by any work; raises as `run`."""
        passed = self.done | ~self.asked.wanted
        blocks = bulk.plan(len(passed), passed, per_block)
        try:
            with contextlib.closing(
                bulk.tables(blocks, work, stall_minutes=self.running.stall_minutes)
            ) as tables:
                self._take(tables)
        finally:
            with contextlib.suppress(OSError):  # a full disk was told already
                self.rows.flush()
                self._write_failures()

    def _take(self, tables: Iterable[pa.Table]) -> None:
        """Rows to disk, failures to memory, a line to the user."""
        total, since = self.n_left, time.monotonic()
        bearable = self.running.bearable(total)
        progress = Progress("denoise", total, form=self.running.progress)
        n_done = 0
        for table in tables:
            n_done += len(table)
            failed = pc.is_valid(table["error"])
            if table["error"].null_count < len(table):
                bad = table.filter(failed)
                self.failures.append(
                    pa.table([bad["id"], bad["stage"], bad["error"]], schema=FAILURES_SCHEMA)
                )
                self.n_failed += len(bad)
                count_images("denoise", failed=len(bad))
                table = table.filter(pc.invert(failed))
            with kept(self.out):
                self.rows.add(table.select(MANIFEST_SCHEMA.names))
            doubtful = pc.sum(pc.equal(table["status"], DOUBTFUL)).as_py() or 0
            count_images("denoise", done=len(table), doubtful=doubtful)
            self.curve.append((time.monotonic() - since, n_done))
            if len(self.curve) > 2 * CURVE_POINTS:
                self.curve = self.curve[::2]
            progress.update(
                n_done, f"{self.n_failed:,} failed" if self.n_failed else "", failed=self.n_failed
            )
            if self.n_failed > bearable:
                first = self.failures[0].to_pylist()[0]
                raise InputError(
                    f"--max-failures {self.running.max_failures} allows {bearable:.0f} of "
                    f"{total:,} images to fail, but {self.n_failed:,} of {n_done:,} did; the "
                    f"first: {first['reason']} The same command continues."
                )

    def _gpus(self) -> int:
        """GPUs to use: those there, or one that an autoscaler brings. Raises InputError if there
        never are as many as asked for."""
        there, wanted = gpus(), self.running.gpus
        if wanted is None:
            return there or int(pools.has_autoscaler() and pools.brings({"GPU": 1}, 1))
        if wanted > there and not pools.brings({"GPU": 1}, wanted):
            raise InputError(
                f"--gpus must be at most the GPUs that Ray has or its autoscaler brings, but of "
                f"{wanted} only {there} are there; give --gpus none to use cores alone."
            )
        return wanted

    def _per_block(self) -> int:
        """Images of a block, by what the headers of a few say; the same in every run."""
        source = self.asked.source
        sizes = []
        for index in np.linspace(0, len(source.ids) - 1, LOOK_AT).astype(int).tolist():
            with contextlib.suppress(InputError):
                name, data = source.file(index)
                sizes.append(n_values(data, name) or PASS_PIXELS)
        typical = float(np.median(sizes)) if sizes else PASS_PIXELS
        return images_per_block(typical, max(1, self.samples))

    def _write_failures(self) -> int:
        """Failures of this run, and of those before that were not tried now."""
        tables = list(self.failures)
        if not self.asked.wanted.all():
            before = retrylist.read_failures(self.out)
            assert isinstance(self.asked.source.ids, Texts)
            ids = self.asked.source.ids.array.filter(pa.array(self.asked.wanted))
            tried = pc.is_in(before["id"].cast(ids.type), value_set=ids)
            tables.append(before.filter(pc.invert(tried)))
        return retrylist.write_failures(self.out, tables, self.asked.text)

    def finish(self, title: str, trained: Knowledge, *, files_per_image: int) -> Outcome:
        """Write what is to be read at the end, and say what there is to say.

        Raises:
            RunError: if files are missing that rows speak of, or there is no room for the page.
            Lost: if the output folder is not to be reached any more.
        """
        with kept(self.out):
            self.rows.flush(last=True)
            n_failed = self._write_failures()
            size = trained.config.images.size
            summary = self.rows.summary(size, PAGE_IMAGES, PAGE_WORST, trained.views)
            failures = retrylist.read_failures(self.out)
            page = JobPage(
                title,
                self.asked.source,
                self.out,
                summary.images,
                summary.doubtful,
                summary.seconds,
                summary.sample,
                summary.worst,
                failures,
                self.curve,
            )
            self.out.write("report.html", denoise_report(page, self.images))
        self._say(summary, trained)
        if self.out.local is not None:
            found = _count_files(self.out.local, self.begun)
            known = files_per_image * summary.images
            if found > known:
                print(
                    f"{self.out} also holds {found - known:,} files that are no results of this "
                    "job, such as those of an earlier one.",
                    file=sys.stderr,
                )
            if found < known:
                raise RunError(
                    f"{self.out} must hold {known:,} files of "
                    f"{summary.images:,} images, but holds {found:,}: some were removed, or "
                    "written where this machine does not see them; the same command makes them "
                    "anew."
                )
        return Outcome(self.out, summary.images, n_failed, summary.doubtful)

    def _say(self, summary: Summary, trained: Knowledge) -> None:
        its = trained.config.images
        if summary.odd_sizes and its.crop is None:
            print(
                f"{summary.odd_sizes} of {summary.images} images are not {its.size}x{its.size}, "
                "the size that this model was trained on; the larger they are, the less it knows "
                "of their noise.",
                file=sys.stderr,
            )
        if summary.odd_views:
            low, high = trained.views_per_pixel
            print(
                f"{summary.odd_views} of {summary.images} images have more or fewer views than the "
                f"{low:g} to {high:g} per pixel of the longer side that this model was trained on, "
                "as told or as it reads them; beyond these it may do harm.",
                file=sys.stderr,
            )
        if summary.median is not None:
            print(
                f"denoise: what was cleaned explains its input to {summary.median:.0f} dB in the "
                f"median, {summary.least:.0f} dB at the least: `explained` in the manifest, the "
                "lower the more of it is noise that the model does not know."
            )


def _count_files(folder: Path, begun: float) -> int:
    """Results in an output folder, an OME-Zarr folder as one; what a killed job was writing before
    `begun` is removed."""
    total = 0
    for place, folders, names in os.walk(folder):
        if Path(place) == folder:
            folders[:] = [name for name in folders if name != manifest.NAME]
            names = [name for name in names if name not in OWN_NAMES and not is_lock(name)]
        elif is_image(LocalFolder(Path(place))):
            folders[:] = []
            total += 1
            continue
        partial = [
            name for name in folders + names if name[:1] == "." and name.endswith(".partial")
        ]
        for name in partial:
            with contextlib.suppress(OSError):
                if (Path(place) / name).stat().st_mtime < begun:
                    discard(Path(place) / name)
        folders[:] = [name for name in folders if name not in partial]
        total += sum(name not in partial for name in names)
    return total
