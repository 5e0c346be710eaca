"""Images of a measured sinogram by filtered back projection: scan -> one float TIFF per slice.

    OUT/NAME_0000.tif    slice 0: attenuation per pixel, float32, as wide as the detector has bins
    OUT/failures.parquet slices that cannot be read, and why

A slice is there whole or not at all; a killed job continues with those that are missing.
"""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import ray
import tifffile

from snr_ray.address import local_path, open_folder
from snr_ray.errors import InputError, RunError, check
from snr_ray.folder import Folder, NotShared
from snr_ray.hashing import fingerprint
from snr_ray.images.datafolder import Failure, failures_bytes
from snr_ray.images.scans import Scan, open_scan
from snr_ray.noise.fbp import back_project, binned, line_integrals
from snr_ray.outputs import FILES, Progress, claim
from snr_ray.stages.job.connection import ON_CORES, connected, shared
from snr_ray.stages.job.outcome import Outcome

FAILURES = "failures.parquet"
FEWEST_BINS = 8
LOOK_AT = 8
"""Slices of which one should be good."""
MOST_PER_BIN = 8
"""Pixels along an image for each bin of a view, at most."""
_ENDS = {"find": InputError, "write": RunError}
"""What a slice that has no place on the output folder ends the job with."""


def reconstruct(
    *,
    sinogram: str,
    out: Path | str | Folder,
    flats: str = "",
    darks: str = "",
    center: float | None = None,
    every: int = 1,
    together: int = 1,
    size: int | None = None,
    filter: str = "ramp",
    overwrite: bool = False,
) -> Outcome:
    """Reconstruct every slice of a scan.

    Args:
        sinogram: HDF5 or NPY file, as `snr_ray.images.scans` says; counts, where there are flats,
            else line integrals.
        out: output folder.
        flats: file of the fields without a sample; nothing: those in the HDF5 file, if any.
        darks: of the fields without a beam, the same.
        center: bin of the axis of rotation, from 0; None: the middle of the detector, N // 2.
        every: take every so many views only; as many as make whole steps of the scan.
        together: neighbouring bins whose mean is one, for smaller images.
        size: height and width of the images, in pixels; None: the bins of a view.
        filter: of the back projection.
        overwrite: replace what this stage wrote there before.

    Raises:
        InputError: for a file or setting the user can put right.
    """
    check(every >= 1, f"--every must be at least 1, but got {every}.")
    check(together >= 1, f"--bin must be at least 1, but got {together}.")
    scan = open_scan(
        str(local_path(sinogram).absolute()), *(_absolute(name) for name in (flats, darks))
    )
    n_views, n_slices, n_bins = scan.shape()
    scan.check_fields()
    check(
        n_bins // together >= FEWEST_BINS,
        f"A view must have at least {FEWEST_BINS} bins, but {sinogram} has {n_bins}"
        + (f", in groups of {together}." if together > 1 else "."),
    )
    check(
        n_views >= every, f"--every must be at most the {n_views} views there are, but got {every}."
    )
    theta = scan.theta()
    if theta is None:
        theta = np.arange(n_views) * 180.0 / n_views
        _tell("there are no angles beside the views, so they are taken as even over 180 degrees")
    check(
        len(theta) == n_views,
        f"Every view needs an angle, but {sinogram} has {len(theta)} angles of {n_views} views.",
    )
    check(bool(np.isfinite(theta).all()), f"Angles must be finite, but some of {sinogram} are not.")
    if n_views > 1 and np.ptp(theta) <= 2 * np.pi:
        _tell(
            f"the angles span {np.ptp(theta):.3g} degrees; if those of the file are radians, "
            "give them in degrees"
        )
    views = slice(0, n_views // every * every, every)
    first_bin = (together - 1) / 2
    last_bin = first_bin + (n_bins // together - 1) * together
    check(
        center is None or first_bin <= center <= last_bin,
        f"--center must be a bin of the detector, {first_bin:g} to {last_bin:g}"
        + (f" in groups of {together}" if together > 1 else "")
        + f", but got {center}.",
    )
    if together > 1:  # the same axis among bins that are means of several
        center = ((n_bins // 2 if center is None else center) - first_bin) / together
    check(
        size is None or FEWEST_BINS <= size <= MOST_PER_BIN * n_bins,
        f"--size must be from {FEWEST_BINS} to {MOST_PER_BIN * n_bins}, {MOST_PER_BIN} for each "
        f"bin, but got {size}.",
    )
    if not scan.flats:
        _tell("no fields without a sample (--flats), so the numbers are taken as line integrals")
    # Whatever else is wrong shows with a slice, before the cluster works.
    settings: dict[str, Any] = {"center": center, "size": size, "filter": filter}
    first = _first(scan, n_slices, views, theta[views], together, settings)
    _tell(
        f"{len(theta[views])} views of {n_slices} slices, images of {first.shape[0]} pixels; "
        f"values from {first.min():.4g} to {first.max():.4g} per pixel"
    )
    names = [f"{scan.path.stem}_{row:04d}.tif" for row in range(n_slices)]
    out = open_folder(out)
    claim(
        out,
        {
            "stage": "reconstruct",
            "sinogram": scan.data,
            "flats": scan.flats,
            "darks": scan.darks,
            FILES: scan.stamp(),
            "shape": [n_views, n_slices, n_bins],
            "theta": fingerprint(theta.tobytes()),
            "every": every,
            "bin": together,
            **settings,
        },
        owned=[*names, FAILURES],
        overwrite=overwrite,
    )
    failures: list[Failure] = []
    todo = [row for row, name in enumerate(names) if not out.exists(name)]
    if todo:
        with connected():
            task = functools.partial(
                _write,
                work=ray.put((scan, views, theta[views], together, settings, out.claimed(), names)),
            )
            rows = ray.data.from_numpy([np.array([row]) for row in todo])
            progress, done = Progress("reconstruct", len(todo), "slices"), 0
            written = rows.map_batches(task, batch_size=None, batch_format="numpy", **ON_CORES)
            for batch in written.iter_batches(batch_size=None, batch_format="numpy"):
                for row, stage, reason in zip(
                    batch["data"], batch["stage"], batch["reason"], strict=True
                ):
                    if stage in _ENDS:
                        raise _ENDS[stage](
                            f"{out} must be a folder that can be written, but {reason}; mend it "
                            "and run the same command to continue."
                        )
                    if stage:
                        failures.append({"id": names[row], "stage": stage, "reason": reason})
                done += len(batch["data"])
                progress.update(done, f"{len(failures):,} failed" if failures else "")
        out.write(FAILURES, failures_bytes(failures))
    return Outcome(out.named, n_slices - len(failures), len(failures))


def _absolute(name: str) -> str:
    return str(local_path(name).absolute()) if name else ""


def _tell(what: str) -> None:
    print(f"reconstruct: {what}.", flush=True)


def _first(scan: Scan, n_slices: int, *of_slice: Any) -> np.ndarray:
    """The first slice that can be made. Raises what the first of all says where none can."""
    wrong: list[InputError] = []
    for row in range(min(n_slices, LOOK_AT)):
        try:
            return _image(scan, row, *of_slice)
        except InputError as error:
            wrong.append(error)
    raise wrong[0]


def _image(
    scan: Scan,
    row: int,
    views: slice,
    theta: np.ndarray,
    together: int,
    settings: dict[str, Any],
) -> np.ndarray:
    """One slice, [size, size] float32."""
    data, *fields = scan.fields(views, row)
    flats, darks = (field if field is None else binned(field, together) for field in fields)
    views_of_row = binned(data, together)
    if flats is not None:
        views_of_row = line_integrals(views_of_row, flats, darks)
    elif darks is not None:
        raise InputError("--darks say nothing without --flats; give both, or neither.")
    return back_project(views_of_row, theta, **settings)


def _write(batch: dict[str, np.ndarray], *, work: "ray.ObjectRef") -> dict[str, np.ndarray]:
    """Task: slices by number -> files, or why they could not be read or written."""
    scan, views, theta, together, settings, out, names = shared(work)
    stages, reasons = [""] * len(batch["data"]), [""] * len(batch["data"])
    for k, row in enumerate(batch["data"].tolist()):
        try:
            image = _image(scan, row, views, theta, together, settings)
        except InputError as error:
            stages[k], reasons[k] = "read", str(error)
            continue
        try:
            with out.writing(names[row]) as path:
                tifffile.imwrite(path, image)
        except NotShared as error:
            stages[k], reasons[k] = "find", str(error)
        except OSError as error:
            stages[k], reasons[k] = "write", str(error)
    return batch | {"stage": np.array(stages, object), "reason": np.array(reasons, object)}
