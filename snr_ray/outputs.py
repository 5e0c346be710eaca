"""What a stage owns on disk: it claims its output folder, continues it, and tells how far it is.

Each output folder holds `job.json` with what decides its contents. The same job again continues
or finds itself done; another job is refused, so nothing a user had is mixed or lost.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from snr_ray.config import InputError

JOB = "job.json"


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A path to write to that becomes `path` at the end, or is gone where writing fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file that is there whole or not at all, whatever happens meanwhile."""
    with atomic(path) as partial:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)


def claim(
    out: Path,
    identity: Mapping[str, Any],
    *,
    owned: Iterable[str],
    overwrite: bool,
    inputs: Path | None = None,
) -> bool:
    """Take an output folder for a job.

    Args:
        out: the folder; made if missing.
        identity: flat key -> JSON value; all that decides what the folder will hold.
        owned: names of files and folders in `out` that this stage writes; `overwrite` removes them.
        overwrite: start afresh whatever is there.
        inputs: folder of the images, which the output folder must not be or lie in.

    Returns:
        True if the folder already belongs to this very job, which then continues.

    Raises:
        InputError: if the folder belongs to another job or holds files of someone else.
    """
    identity = json.loads(json.dumps(identity))
    place = out.resolve()
    if inputs is not None and (place == inputs or inputs in place.parents):
        raise InputError(
            f"--out must lie outside the images, but {out} is inside {inputs}; give another --out."
        )
    if out.exists() and not out.is_dir():
        raise InputError(f"--out must be a folder, but {out} is a file.")
    job = out / JOB
    if job.is_file() and not overwrite:
        before = json.loads(job.read_text())
        for key in identity:
            if before.get(key) != identity[key]:
                raise InputError(
                    f"{out} belongs to another job ({key}: {before.get(key)!r} there, "
                    f"{identity[key]!r} now); give another --out, or --overwrite to replace it."
                )
        return True
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise InputError(
            f"--out must be new, empty or an unfinished job of this kind, but {out} holds other "
            "files; give another --out, or --overwrite to write into it."
        )
    if overwrite:
        owned = (JOB, *owned)
        foreign = [name for name in owned if (out / name).exists() and not job.is_file()]
        if foreign:
            raise InputError(
                f"--overwrite replaces what snr wrote, but {out / foreign[0]} is not from snr; "
                "give another --out or move it away."
            )
        for name in owned:
            path = out / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    try:
        write_atomic(job, json.dumps(identity, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"--out must be a folder that can be written ({error}).") from None
    return False


@dataclass
class Progress:
    """A progress line: `stage 120/400 images, 310 images/s, 0:01 left, ...` on standard error.

    Rewrites itself on a terminal; in a log it is printed every few seconds.
    """

    stage: str
    total: int
    unit: str = "images"
    stream: TextIO = field(default_factory=lambda: sys.stderr)
    start: int = 0
    """Units done before this run (resumed work), which the rate leaves out."""

    def __post_init__(self) -> None:
        self._begun = self._since = self._printed = time.monotonic()
        self._resumed = self.start
        self._started = False

    def update(self, done: int, note: str = "", *, per_unit: float = 1.0) -> None:
        """Tell that `done` units are done; `per_unit` images stand behind a unit."""
        now = time.monotonic()
        every = 0.3 if self.stream.isatty() else 5.0
        if now - self._printed < every and done < self.total:
            return
        self._printed = now
        if done >= self.total:  # the last line tells the rate of the whole run
            self.start, self._since = self._resumed, self._begun
        rate = (done - self.start) / max(now - self._since, 1e-9)
        if not self._started:  # from here on, the time that starting took is left out
            self._started, self.start, self._since = True, done, now
        left = round((self.total - done) / rate) if rate > 0 else 0
        line = (
            f"{self.stage}: {done:,}/{self.total:,} {self.unit}, {rate * per_unit:,.0f} images/s, "
            f"{left // 60}:{left % 60:02d} left{', ' + note if note else ''}"
        )
        end = "\r" if self.stream.isatty() and done < self.total else "\n"
        clear = "\x1b[2K" if self.stream.isatty() else ""
        self.stream.write(clear + line + end)
        self.stream.flush()
