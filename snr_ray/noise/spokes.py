"""The view count of a noisy image by its spectrum: its power lies on spokes, one for each view.

A filtered back projection is a sum of images that are constant along the rays of one view, so its
spectrum lies on lines through the origin at the angles of the views, each as wide as the image is
small (the projection-slice theorem; Kak and Slaney, Principles of Computerized Tomographic Imaging
(1988), 3.2). How well spokes of a view count fit is a likelihood of spectra: independent
exponential values whose means are spokes above a floor (Whittle, Estimation and information in
stationary time series, Arkiv för Matematik 2 (1953)), times a level of each ring, and of what
directions the image itself prefers.
"""

import functools
import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Values = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

HALF_TURN = 180.0
"""Degrees after which projections come again; of a range below it, none lie beyond its end."""
FEWEST_VIEWS = 4
MOST_VIEWS_PER_PIXEL = 1.5
"""Spokes of more views over a half turn lie too near to each other everywhere to be told from
none."""
FLOORS = (0.03, 0.3)
"""Power between spokes, as a share of that on them: of exact noise, and with more on top."""
SPOKE_WIDTH = 0.7
"""Half width of a spoke, in frequencies of the transform."""
LOWEST, HIGHEST = 0.12, 0.72
"""Frequencies that are looked at, in cycles per pixel; below, spokes overlap."""
TAPER = 0.15
"""Share of the image over which its edges fade out."""
RINGS, SECTORS = 20, 36
"""Into which the spectrum is divided to see what directions the image prefers."""
DIRECTION_WIDTH = 12.0
"""Degrees over which these are smoothed."""
FREQUENCIES = 24_000
"""That all counts are tried on; the best are tried again on all of them."""
FINALISTS = 12
KEPT_BYTES = 32 * 2**20
"""Memory for what is computed of the spokes of many counts, and kept of sizes where it is all."""


def view_counts(height: int, width: int, angle_range: float = HALF_TURN) -> Counts:
    """Counts over a range of angles that `spokes` tries on images of a size, ascending."""
    most = int(MOST_VIEWS_PER_PIXEL * max(height, width) * angle_range / HALF_TURN)
    return np.arange(FEWEST_VIEWS, max(FEWEST_VIEWS, most) + 1)


@dataclass(frozen=True)
class _Frequencies:
    """Half of the frequencies of images of one size, ring by ring; of them those at the angles of
    views."""

    places: Counts
    """In the flat spectrum, [F]."""
    radius: Values
    """Cycles per pixel."""
    angle: Values
    """As that of a view, in [0, pi)."""
    across: Values
    """Frequencies per cycle per pixel across a spoke."""
    angle_range: float
    """Degrees."""

    def some(self, chosen: Counts) -> "_Frequencies":
        """Those of ascending places in the arrays."""
        radius, angle, across = (part[chosen] for part in (self.radius, self.angle, self.across))
        return _Frequencies(self.places[chosen], radius, angle, across, self.angle_range)

    def rings(self, n: int) -> Counts:
        """Which of n rings each lies in, ascending."""
        return ((self.radius - LOWEST) / (HIGHEST - LOWEST) * n).astype(int)


def spokes(images: Array, angle_range: float = HALF_TURN) -> Values:
    """Log-likelihood of each count of `view_counts`, under each of FLOORS: [B, floors, counts].

    Args:
        images: noisy, [B, C, H, W] float32, clipped or not, at least 8 pixels high and wide.
        angle_range: degrees that their views are spread over.
    """
    height, width = images.shape[2:]
    counts = view_counts(height, width, angle_range)
    all_ = _frequencies(height - 2, width - 2, angle_range)
    power = _spectra(images, all_)
    n = len(all_.places)
    if n <= FREQUENCIES:
        return _fit(power, all_, counts, (height, width, angle_range))
    chosen = np.sort(np.random.default_rng(0).choice(n, FREQUENCIES, replace=False))
    found = _fit(power[:, chosen], all_.some(chosen), counts) * (n / FREQUENCIES)
    whole = np.full_like(found, -np.inf)
    for one, its, spectrum in zip(whole, found, power, strict=True):  # the best again, on all
        best = {k for row in its for k in counts[np.argsort(row)[-FINALISTS:]].tolist()}
        best |= {k for n in best for k in (n // 2, 2 * n)} & set(counts.tolist())
        again = np.array(sorted(best))
        one[:, again - counts[0]] = _fit(spectrum[None], all_, again)[0]
    return whole


@functools.lru_cache(maxsize=8)
def _frequencies(height: int, width: int, angle_range: float) -> _Frequencies:
    fy, fx = np.meshgrid(np.fft.fftfreq(height), np.fft.fftfreq(width), indexing="ij")
    radius = np.hypot(fx, fy)
    half = (radius > LOWEST) & (radius < HIGHEST) & ((fx > 0) | ((fx == 0) & (fy > 0)))
    places = np.flatnonzero(half)
    places = places[np.argsort(radius.ravel()[places], kind="stable")]
    angle = np.arctan2(-fy.ravel()[places], fx.ravel()[places]) % np.pi
    if angle_range < HALF_TURN:  # beyond there is no power, whatever the count
        within = angle < np.deg2rad(angle_range)
        places, angle = places[within], angle[within]
    across = np.hypot(width * np.sin(angle), height * np.cos(angle))
    return _Frequencies(places, radius.ravel()[places], angle, across, angle_range)


def _spectra(images: Array, at: _Frequencies) -> Values:
    """Power of images [B, C, H, W], less what each prefers: [B, F]."""
    from scipy.signal.windows import tukey  # slow to import, and few look at spectra

    # The Laplacian evens out a spectrum that falls steeply, or its foot would cover the spokes.
    x = 4.0 * images[..., 1:-1, 1:-1] - images[..., :-2, 1:-1] - images[..., 2:, 1:-1]
    x -= images[..., 1:-1, :-2] + images[..., 1:-1, 2:]
    height, width = x.shape[2:]
    fade = tukey(height + 2, TAPER)[1:-1, None] * tukey(width + 2, TAPER)[1:-1]
    spectra = np.fft.fft2((x - x.mean((2, 3), keepdims=True)) * fade)
    power = (spectra.real**2 + spectra.imag**2).sum(1).reshape(len(x), -1)[:, at.places] + 1e-12
    return power / _preferred(power, at)


def _preferred(power: Values, at: _Frequencies) -> Values:
    """Mean power around each frequency, by ring and wide sector: [B, F]."""
    from scipy.ndimage import gaussian_filter1d  # as slow

    ring = at.rings(RINGS)
    cell = ring * SECTORS + (at.angle / np.pi * SECTORS).astype(int) % SECTORS
    level = _sums(power, ring, RINGS) / np.maximum(np.bincount(ring, minlength=RINGS), 1)

    def smooth(weights: Values) -> Values:
        sums = _sums(weights, cell, RINGS * SECTORS).reshape(-1, RINGS, SECTORS)
        along = gaussian_filter1d(sums, DIRECTION_WIDTH * SECTORS / 180, axis=2, mode="wrap")
        around = gaussian_filter1d(along, 0.15 * RINGS, axis=1, mode="nearest")
        return np.asarray(around).reshape(len(weights), -1)

    around = (smooth(power / level[:, ring]) + 1e-3) / (smooth(np.ones_like(power[:1])) + 1e-3)
    return level[:, ring] * around[:, cell]


def _sums(values: Values, group: Counts, n: int) -> Values:
    """Sums of values [B, F] by their group [F]: [B, n]."""
    shifted = (np.arange(len(values))[:, None] * n + group).ravel()
    sums = np.bincount(shifted, values.ravel(), len(values) * n)
    return np.asarray(sums, np.float64).reshape(-1, n)


def _fit(
    power: Values, at: _Frequencies, counts: Counts, of: tuple[int, int, float] | None = None
) -> Values:
    """Log-likelihoods [B, floors, counts] of power [B, F]; `of`: size and range of angles of the
    images where counts and frequencies are all of theirs, and what is computed of them is kept."""
    ring, rings = at.rings(2 * RINGS), 2 * RINGS
    ends = np.searchsorted(ring, np.arange(rings + 1))
    members = np.diff(ends)
    power = power.astype(np.float32)
    found = np.empty((len(power), len(FLOORS), len(counts)))
    together = max(1, KEPT_BYTES // (4 * len(FLOORS) * len(ring)))
    for k in range(0, len(counts), together):
        some = counts[k : k + together]
        whole = of is not None and len(some) == len(counts)
        inverse, logs = _of_size(*of) if whole and of else _inverse_means(at, some)
        level = np.empty((len(power), rings, len(FLOORS) * len(some)), np.float32)
        for r, (first, last) in enumerate(itertools.pairwise(ends)):
            np.matmul(power[:, first:last], inverse[first:last], out=level[:, r])
        level /= np.maximum(members, 1)[:, None]
        level[:, members == 0] = 1
        fits = -np.einsum("brc,r->bc", np.log(level), members.astype(float)) - logs
        found[..., k : k + together] = fits.reshape(len(power), len(FLOORS), len(some))
    return found


@functools.lru_cache(maxsize=4)
def _of_size(height: int, width: int, angle_range: float) -> tuple[Array, Values]:
    """As of `_inverse_means`, of all counts of a size: up to KEPT_BYTES each."""
    at = _frequencies(height - 2, width - 2, angle_range)
    return _inverse_means(at, view_counts(height, width, angle_range))


def _inverse_means(at: _Frequencies, counts: Counts) -> tuple[Array, Values]:
    """One over the mean power [F, floors counts] of spokes of each count above each floor, for a
    ring of level 1, and the sum of the logarithms of the means [floors counts]."""
    reach = at.radius * at.across / SPOKE_WIDTH
    inverse = np.empty((len(reach), len(FLOORS), len(counts)), np.float32)
    logs = np.empty((len(FLOORS), len(counts)))
    for k, n_views in enumerate(counts.tolist()):
        step = np.deg2rad(at.angle_range) / n_views
        nearest = np.round(at.angle / step)
        off = at.angle - nearest * step
        near = np.zeros_like(off)
        for j in (-1, 0, 1):
            spoke = np.exp(-np.square(reach * np.sin(off + j * step)))
            if at.angle_range < HALF_TURN:  # else the first follows the last
                spoke *= (nearest >= j) & (nearest - j < n_views)
            near += spoke
        for f, floor in enumerate(FLOORS):
            inverse[:, f, k], logs[f, k] = 1 / (near + floor), np.log(near + floor).sum()
    return inverse.reshape(len(reach), -1), logs.ravel()
