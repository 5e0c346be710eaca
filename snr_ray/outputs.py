"""What a stage owns on disk: it claims its output folder, continues it, and tells how far it is.

Each output folder holds `job.json` with what decides its contents. The same job again continues
or finds itself done; another job is refused, so nothing a user had is mixed or lost.
"""

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

from snr_ray.address import open_folder, without_secrets
from snr_ray.errors import InputError
from snr_ray.folder import JOB, Folder
from snr_ray.localfolder import LocalFolder

EMPTYING = "emptying"
"""Key of a job.json whose folder still holds what `--overwrite` is about to remove."""


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file that is there whole or not at all, whatever happens meanwhile."""
    LocalFolder(path.parent).write(path.name, data)


def check_file(path: Path | None) -> None:
    """Raise InputError for a file that cannot be written; for before long work."""
    if path is None:
        return
    above = next(p for p in path.absolute().parents if p.exists())
    if path.is_dir() or not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(
            f"--out must be a file that can be written, but {path} "
            + ("is a folder" if path.is_dir() else f"would lie in {above}, which takes none")
            + "; give another."
        )


_FINGERPRINT = re.compile("[0-9a-f]{16}")
FILES = "sizes and times of the images"
DONORS = "sizes and times of the donors"
SETTINGS = "settings of the model"
"""Keys of identities, as a refusal names them; earlier versions did not look at these."""


def claim(
    out: Folder | Path,
    identity: Mapping[str, Any],
    *,
    owned: Iterable[str],
    overwrite: bool,
    inputs: Folder | None = None,
    inputs_alone: bool = False,
) -> bool:
    """Take an output folder for a job.

    Args:
        out: the folder, also in a bucket; made if missing.
        identity: flat key -> JSON value; all that decides what the folder will hold. Secrets of
            URIs are taken out.
        owned: names of files and folders in `out` that this stage writes; `overwrite` removes them.
        overwrite: start afresh whatever is there.
        inputs: folder of the images, which the output folder must not be or lie in.
        inputs_alone: only files of `inputs` itself are read, so the output may lie in it.

    Returns:
        True if the folder already belongs to this very job, which then continues.

    Raises:
        InputError: if the folder belongs to another job or holds files of someone else, or cannot
            be written; also to `overwrite`, if another stage wrote it.
    """
    out = open_folder(out)
    known: dict[str, Any] = json.loads(without_secrets(json.dumps(identity)))
    place = out.place
    if inputs:
        images = inputs.place
        inside = images in place.parents and not inputs_alone
        above = (place, *place.parents) if isinstance(place, Path) else ()
        image = next((p for p in above if images in p.parents and _is_image(p)), None)
        if image or inside or place == images:
            where = "inside" if image or inside else "their folder"
            raise InputError(
                f"--out must lie outside the images, but {out} is {where} {image or inputs}; give "
                "another --out."
            )
    if isinstance(place, Path) and place.exists() and not place.is_dir():
        raise InputError(f"--out must be a folder, but {out} is a file.")
    try:
        return _claim(out, known, (JOB, *owned), overwrite)
    except OSError as error:
        raise InputError(
            f"--out must be a folder that can be written, but {out} cannot "
            f"({without_secrets(str(error))}); look at its permissions, or give another --out."
        ) from None


def _is_image(folder: Path) -> bool:
    """Whether a folder is an OME-Zarr image, or a part of one, by the names in it."""
    return any((folder / name).is_file() for name in ("zarr.json", ".zattrs", ".zarray"))


def _claim(out: Folder, identity: dict[str, Any], owned: tuple[str, ...], overwrite: bool) -> bool:
    text = json.dumps(identity, indent=2) + "\n"
    taken = out.exists(JOB)
    before = {} if overwrite or not taken else _job(out)
    stage = _stage(out) if taken else None
    if stage and "stage" in identity and stage != identity["stage"]:
        raise InputError(
            f"{out} holds what snr {stage} wrote, which snr {identity['stage']} neither continues "
            "nor replaces; give another --out."
        )
    for key in [*identity, *(key for key in before if key not in identity)]:
        if key == EMPTYING or (key in (FILES, DONORS, SETTINGS) and key not in before):
            continue
        if before and before.get(key) != identity.get(key):
            raise InputError(
                f"{out} belongs to another job ({_difference(key, before, identity)}); give "
                "another --out, or --overwrite to replace it."
            )
    if before and EMPTYING not in before:
        return True
    if not overwrite and not before:
        if not out.empty():
            raise InputError(
                f"--out must be new, empty or an unfinished job of this kind, but {out} holds "
                "other files; give another --out, or --overwrite to write into it."
            )
        # Not taken if another driver was faster: then it is the other's, or this job's as well.
        return not out.create(JOB, text) and _claim(out, identity, owned, overwrite)
    foreign = [name for name in owned if out.exists(name) and not taken]
    if foreign:
        raise InputError(
            f"--overwrite replaces what snr wrote, but {out}/{foreign[0]} is not from snr; "
            "give another --out or move it away."
        )
    # The folder is this job's before anything goes, and stays marked until all is gone: a stop in
    # between leaves neither a folder that is refused nor old results that pass for new ones.
    out.write(JOB, json.dumps(identity | {EMPTYING: True}, indent=2) + "\n", durable=True)
    for name in owned:
        if name != JOB:
            out.remove(name)
    out.write(JOB, text, durable=True)
    return False


def _difference(key: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """How two jobs differ; a fingerprint tells nobody anything."""
    values = [job.get(key) for job in (before, now)]
    if all(isinstance(value, str) and _FINGERPRINT.fullmatch(value) for value in values):
        return f"{key} changed"
    return f"{key}: {values[0]!r} there, {values[1]!r} now"


def _stage(out: Folder) -> Any:
    """The stage that wrote a folder; None where its job.json is damaged."""
    with contextlib.suppress(InputError):
        return _job(out).get("stage")
    return None


def _job(out: Folder) -> dict[str, Any]:
    """What stands in the job.json of a folder."""
    try:
        before = json.loads(out.read(JOB))
    except ValueError:  # also bytes that are not text
        before = None
    if not isinstance(before, dict) or not before:
        raise InputError(
            f"{out}/{JOB} must say whose results these are, but is damaged; give another --out, or "
            "--overwrite to start afresh."
        )
    return before


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
    form: Literal["text", "json"] = "text"
    """A line for people, or one JSON object a line."""

    def __post_init__(self) -> None:
        self._begun = self._since = self._printed = time.monotonic()
        self._resumed = self.start
        self._started = False

    def update(self, done: int, note: str = "", *, per_unit: float = 1.0, failed: int = 0) -> None:
        """Tell that `done` units are done; `per_unit` images stand behind a unit. The note is for
        people, `failed` for programs."""
        now = time.monotonic()
        every = 0.3 if self.stream.isatty() and self.form == "text" else 5.0
        if now - self._printed < every and done < self.total:
            return
        self._printed = now
        if done >= self.total:  # the last line tells the rate of the whole run
            self.start, self._since = self._resumed, self._begun
        rate = (done - self.start) / max(now - self._since, 1e-9)
        if not self._started:  # from here on, the time that starting took is left out
            self._started, self.start, self._since = True, done, now
        left = round((self.total - done) / rate) if rate > 0 else 0
        if self.form == "json":
            told = {
                "stage": self.stage,
                "done": done,
                "total": self.total,
                "unit": self.unit,
                "failed": failed,
                "images_per_s": round(rate * per_unit, 2),
                "seconds": round(now - self._begun, 1),
                "seconds_left": left,
            }
            self.stream.write(json.dumps(told) + "\n")
            self.stream.flush()
            return
        images = rate * per_unit
        pace = (
            f"{images:,.0f} images/s" if images >= 1 or not images else f"{1 / images:.1f} s/image"
        )
        line = (
            f"{self.stage}: {done:,}/{self.total:,} {self.unit}, {pace}, "
            f"{left // 60}:{left % 60:02d} left{', ' + note if note else ''}"
        )
        end = "\r" if self.stream.isatty() and done < self.total else "\n"
        clear = "\x1b[2K" if self.stream.isatty() else ""
        self.stream.write(clear + line + end)
        self.stream.flush()
