"""Filtered back projection of measured sinograms: any angles, any centre of rotation, any size.

It is what the noise operator does to the projections that it makes, for projections that a detector
made; equal to `skimage.transform.iradon` with linear interpolation and circle=False.
"""

import numpy as np
import numpy.typing as npt

from snr_ray.config import FILTERS
from snr_ray.errors import InputError, check
from snr_ray.noise.filters import filtered
from snr_ray.noise.sums import compiled

Array = npt.NDArray[np.float32]
Values = npt.NDArray[np.float64]

LEAST_TRANSMITTED = 1e-6
"""Share of photons that a bin counts at the least: the logarithm of none is infinite."""


def line_integrals(counts: Array, flats: Array, darks: Array | None = None) -> Array:
    """Line integrals of attenuation, -ln((counts - dark) / (flat - dark)), [A, ..., N] float32.

    Source: Buzug, Computed Tomography (2008), 2.4.

    Args:
        counts: [A, ..., N] of the views.
        flats: [F, ..., N] without a sample; their mean is taken.
        darks: [D, ..., N] without a beam, the same; None: nothing is counted then.

    Raises:
        InputError: if shapes do not fit, or no bin of the flats, or of the views where flats are,
            is brighter than the darks.
    """
    for name, fields in (("flats", flats), ("darks", darks)):
        check(
            fields is None or fields.shape[1:] == counts.shape[1:],
            f"--{name} must have the rows and bins of the sinogram, {list(counts.shape[1:])}, but "
            f"have {[] if fields is None else list(fields.shape[1:])}.",
        )
    dark = 0.0 if darks is None else darks.mean(0, dtype=np.float64)
    beam = flats.mean(0, dtype=np.float64) - dark
    lit = beam > 0
    if not lit.any():
        raise InputError("--flats must be brighter than --darks, but none of their bins is.")
    share = (counts - dark) / np.where(lit, beam, 1.0)
    if share.size and not (lit & (share > 0)).any():
        raise InputError(
            "Counts must be brighter than --darks, or 0 where there are none, but no bin of any "
            "view is; line integrals are taken without --flats."
        )
    # A dead bin says nothing; 0 is what air would have given.
    integrals = -np.log(np.maximum(np.where(lit, share, 1.0), LEAST_TRANSMITTED))
    return integrals.astype(np.float32)


def binned(fields: Array, together: int) -> Array:
    """Means of so many neighbouring bins, [..., N // together]; what is left over is dropped."""
    n_bins = fields.shape[-1] // together
    kept = fields[..., : n_bins * together]
    return kept.reshape(*fields.shape[:-1], n_bins, together).mean(-1, dtype=np.float64).astype(
        np.float32
    )  # fmt: skip


def back_project(
    sinogram: Array,
    theta: Values,
    *,
    size: int | None = None,
    center: float | None = None,
    filter: str = "ramp",
) -> Array:
    """Image [size, size] float32 of a sinogram [A, N] of line integrals; per bin width.

    Args:
        sinogram: float32, views by bins.
        theta: [A] angles in degrees, of views spread evenly over 180.
        size: of the image, in pixels as wide as bins; None: N.
        center: bin of the axis of rotation, from 0, fractions count; None: N // 2. The axis goes
            to pixel (size // 2, size // 2).
        filter: out of FILTERS.

    Raises:
        InputError: if the filter is none of them, the angles are not as many as the views, or the
            centre lies outside of the detector.
    """
    n_views, n_bins = sinogram.shape
    check(filter in FILTERS, f"--filter must be out of {', '.join(FILTERS)}, but got {filter!r}.")
    check(
        len(theta) == n_views,
        f"Every view needs an angle, but there are {len(theta)} angles of {n_views} views.",
    )
    center = float(n_bins // 2) if center is None else center
    check(
        0 <= center <= n_bins - 1,
        f"--center must be a bin of the detector, 0 to {n_bins - 1}, but got {center:g}.",
    )
    columns = np.ascontiguousarray(sinogram, np.float32)[..., None]
    clean = filtered(columns, filter, np.empty_like(columns))[..., 0]
    side = size or n_bins
    out = np.zeros((side, side), np.float32)
    _spread(clean, np.deg2rad(np.asarray(theta, np.float64)), center, out)
    return np.asarray(out * np.float32(np.pi / (2 * n_views)))


@compiled
def _spread(views, angles, center, out):  # type: ignore[no-untyped-def]
    """Add to every pixel what each view has where its ray meets the detector, 0 outside."""
    n_bins, side = views.shape[1], out.shape[0]
    for i in range(side):
        y = i - side // 2
        for view in range(len(angles)):
            cos, sin = np.cos(angles[view]), np.sin(angles[view])
            for j in range(side):
                t = (j - side // 2) * cos - y * sin + center
                if t >= 0 and t <= n_bins - 1:
                    low = min(int(t), n_bins - 2)
                    share = np.float32(t - low)
                    out[i, j] += (1 - share) * views[view, low] + share * views[view, low + 1]
