"""The curves of a run: metrics.jsonl, TensorBoard, MLflow, and the progress line of the driver.

A worker writes and the driver reads, through the run folder: each may be killed, and the other sees
what there is.
"""

import json
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from snr_ray.config import Config
from snr_ray.errors import InputError
from snr_ray.folder import Folder
from snr_ray.learning.validation import Metrics
from snr_ray.metrics import as_json
from snr_ray.outputs import Progress, write_atomic
from snr_ray.scoring.runpage import Array, png, run_page
from snr_ray.stages.job.counters import show_training
from snr_ray.stages.training.desk import Desk
from snr_ray.stages.training.tracker import Tracker

WAITING_S = 30.0
"""A run that waits for processors says so every so many seconds."""


class RunLog:
    """metrics.jsonl, TensorBoard events and MLflow of a run; continued without repeating a step."""

    def __init__(self, out: Path, step: int, tracker: Tracker) -> None:
        """`step`: the step the run continues from; later lines of a killed run are dropped."""
        from torch.utils.tensorboard import SummaryWriter  # only rank 0 needs it

        self.path = out / "metrics.jsonl"
        kept = [row for row in read_metrics(self.path) if row["step"] <= step]
        self.path.write_text("".join(as_json(row) + "\n" for row in kept))
        self.known = {(row["step"], *sorted(row)) for row in kept}
        self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)
        self.tracker = tracker

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        stopped = kind is not None and not issubclass(kind, Exception)
        self.tracker.end("KILLED" if stopped else "FAILED" if kind else "FINISHED")
        self.writer.close()

    def write(self, metrics: Metrics) -> None:
        """Add one line, once; `step` says where on the curves it belongs."""
        if (metrics["step"], *sorted(metrics)) in self.known:
            return  # the run broke off after this line, and before what came next
        with self.path.open("a") as file:
            file.write(as_json(metrics) + "\n")
        for name, value in metrics.items():
            if name != "step":
                self.writer.add_scalar(name, value, metrics["step"])
        self.writer.flush()
        self.tracker.write(metrics)

    def picture(self, sheet: Array, columns: list[str], step: int) -> None:
        """Show an image [H, W, 3] in [0, 1] of named columns; the newest is a file, too."""
        self.writer.add_image(" | ".join(columns), sheet, step, dataformats="HWC")
        self.writer.flush()
        write_atomic(self.path.with_name("pictures.png"), png(sheet, " | ".join(columns), step))


def read_metrics(path: Path) -> list[Metrics]:
    """Lines of a metrics.jsonl; a last line cut short by a kill is left out.

    Numbers that were not finite are missing.

    Raises:
        InputError: if another line is damaged.
    """
    return _rows(path.read_text(errors="replace"), path) if path.is_file() else []


def metrics_of(run: Folder) -> list[Metrics]:
    """The same of a run folder, also in a bucket."""
    try:
        return _rows(run.read("metrics.jsonl").decode(errors="replace"), run.join("metrics.jsonl"))
    except FileNotFoundError:
        return []


def _rows(text: str, path: object) -> list[Metrics]:
    lines, rows = text.split("\n"), []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
            whole = isinstance(row, dict) and isinstance(row.get("step"), int | float)
        except ValueError:
            whole = False
        if whole:
            rows.append({name: value for name, value in row.items() if value is not None})
        elif number < len(lines):  # what a kill cuts short has no end of line
            raise InputError(
                f"Each line of {path} must be a step and its numbers, but line {number} is damaged "
                f"({line[:40]!r}); remove that line, and the same command continues."
            )
    return rows


def write_page(desk: Desk, ending: str) -> None:
    """report.html of a run folder; `ending` says in a sentence how the run stands."""
    desk.fetch("metrics.jsonl", "pictures.png")
    out = desk.path
    pictures, settings = out / "pictures.png", out / "config.yaml"
    page = run_page(
        read_metrics(out / "metrics.jsonl"),
        settings.read_text() if settings.is_file() else "",
        pictures.read_bytes() if pictures.is_file() else None,
        ending,
    )
    write_atomic(out / "report.html", page)
    desk.keep("report.html")


class Watch:
    """Follows metrics.jsonl from the driver and keeps the progress line."""

    def __init__(self, desk: Desk, config: Config, waiting: Callable[[], str]) -> None:
        """`waiting` says what the workers wait for, or "" if for nothing."""
        self.desk, self.path = desk, desk.path / "metrics.jsonl"
        rows = read_metrics(self.path)
        self.seen = len(rows)
        start = int(rows[-1]["step"]) if rows else 0
        self.batch_size = config.train.batch_size
        self.progress = Progress("train", config.train.steps, "steps", start=start)
        self.val, self.waiting, self.told = "", waiting, time.monotonic()
        self.latest: tuple[int, float] | None = None
        """Step and images per second of the newest row."""
        self.row: Metrics | None = None
        """A row that the progress line does not show yet."""
        self.scored = 0
        """Step of the newest checkpoint whose PSNR is known."""
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Read what is left, and end."""
        self._done.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._done.wait(0.5):
            if self.desk.soon("metrics"):
                self._read()
            if self.latest:  # told again and again, or Prometheus forgets it
                show_training(self.path.parent.name, *self.latest)
            if time.monotonic() - self.told > WAITING_S:
                self.told = time.monotonic()
                if sentence := self.waiting():
                    print(f"train: {sentence}", file=sys.stderr, flush=True)
        self._read()

    def _read(self) -> None:
        with suppress(OSError):  # of a bucket: next time
            self._tell()

    def _tell(self) -> None:
        self.desk.fetch("metrics.jsonl")
        rows = read_metrics(self.path)
        if len(rows) < self.seen:  # a restarted worker dropped lines
            self.seen = 0
        new, self.seen = rows[self.seen :], len(rows)
        if new:
            self.told = time.monotonic()
        if any("recon_clean_psnr" in row or "unet_psnr" in row for row in new):
            done = int(rows[-1]["step"])
            write_page(self.desk, f"Step {done:,} of {self.progress.total:,}.")
        for row in new:
            for name in ("swap_psnr", "unet_psnr"):
                if name in row:
                    self.scored = int(row["step"])
                    self.val = f"{name.partition('_')[0]} {row[name]:.1f} dB"
        if curve := [row for row in new if "images_per_s" in row]:
            self.row, self.latest = curve[-1], (int(curve[-1]["step"]), curve[-1]["images_per_s"])
        if self.row is None:
            return
        step = int(self.row["step"])
        # The last line waits for the PSNR of the last checkpoint, which comes some seconds later.
        if step < self.progress.total or self.scored >= step or self._done.is_set():
            self.progress.update(step, self._note(self.row), per_unit=self.batch_size)
            self.row = None

    def _note(self, row: Metrics) -> str:
        parts = [f"loss {row['loss']:.3f}"] if "loss" in row else []
        parts += [self.val] if self.val else []
        parts += [f"{row['skipped']:.0f} steps skipped"] if row.get("skipped") else []
        return ", ".join(parts)
