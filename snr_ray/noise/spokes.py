"""The view count of a noisy image by its spectrum: its power lies on spokes, one for each view.

A filtered back projection is a sum of images that are constant along the rays of one view, so its
spectrum lies on lines through the origin at the angles of the views, each as wide as the image is
small (the projection-slice theorem; Kak and Slaney, Principles of Computerized Tomographic Imaging
(1988), 3.2). How well spokes of a view count fit is a likelihood of spectra: independent
exponential values whose means are spokes above a floor (Whittle, Estimation and information in
stationary time series, Arkiv för Matematik 2 (1953)), times a level of each ring, and of what
directions the image itself prefers.
"""

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter1d

Array = npt.NDArray[np.float32]
Values = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

FEWEST_VIEWS = 4
MOST_VIEWS_PER_PIXEL = 1.5
"""Spokes of more views lie too near to each other everywhere to be told from none."""
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


def view_counts(height: int, width: int) -> Counts:
    """Counts that `spokes` tries on images of a size, ascending."""
    most = int(MOST_VIEWS_PER_PIXEL * max(height, width))
    return np.arange(FEWEST_VIEWS, max(FEWEST_VIEWS, most) + 1)


def spokes(image: Array) -> Values:
    """Log-likelihood of each count of `view_counts`, under each of FLOORS: [floors, counts].

    Args:
        image: noisy, [C, H, W] float32, clipped or not, at least 8 pixels high and wide.
    """
    power, radius, angle, width = _spectrum(image)
    counts = view_counts(*image.shape[1:])
    some = np.arange(len(power))
    if len(power) > FREQUENCIES:
        some = np.random.default_rng(0).choice(len(power), FREQUENCIES, replace=False)
    found = np.stack([_fit(power, radius, angle, width, some, k) for k in counts], axis=1)
    if len(power) > FREQUENCIES:  # the best again, on all of them
        found *= len(power) / FREQUENCIES
        best = {k for row in found for k in counts[np.argsort(row)[-FINALISTS:]].tolist()}
        best |= {k for n in best for k in (n // 2, 2 * n)} & set(counts.tolist())
        whole = np.full_like(found, -np.inf)
        for k in best:
            whole[:, k - counts[0]] = _fit(power, radius, angle, width, np.arange(len(power)), k)
        found = whole
    return found


def _spectrum(image: Array) -> tuple[Values, Values, Values, Values]:
    """Of half of the frequencies: power, less what the image prefers; radius in cycles per pixel,
    angle as that of a view in [0, pi), and the frequencies per cycle per pixel across a spoke."""
    from scipy.signal.windows import tukey  # slow to import, and few look at spectra

    # The Laplacian evens out a spectrum that falls steeply, or its foot would cover the spokes.
    x = 4.0 * image[:, 1:-1, 1:-1] - image[:, :-2, 1:-1] - image[:, 2:, 1:-1]
    x -= image[:, 1:-1, :-2] + image[:, 1:-1, 2:]
    height, width = x.shape[1:]
    fade = tukey(height + 2, TAPER)[1:-1, None] * tukey(width + 2, TAPER)[1:-1]
    spectrum = np.square(np.abs(np.fft.fft2((x - x.mean((1, 2), keepdims=True)) * fade))).sum(0)
    fy, fx = np.meshgrid(np.fft.fftfreq(height), np.fft.fftfreq(width), indexing="ij")
    radius = np.hypot(fx, fy)
    half = (radius > LOWEST) & (radius < HIGHEST) & ((fx > 0) | ((fx == 0) & (fy > 0)))
    power, radius = spectrum[half] + 1e-12, radius[half]
    angle = np.arctan2(-fy[half], fx[half]) % np.pi
    across = np.hypot(width * np.sin(angle), height * np.cos(angle))
    return power / _preferred(power, radius, angle), radius, angle, across


def _preferred(power: Values, radius: Values, angle: Values) -> Values:
    """Mean power around each frequency, by ring and wide sector."""
    ring = ((radius - LOWEST) / (HIGHEST - LOWEST) * RINGS).astype(int)
    cell = ring * SECTORS + (angle / np.pi * SECTORS).astype(int) % SECTORS
    level = np.bincount(ring, power, RINGS) / np.maximum(np.bincount(ring, minlength=RINGS), 1)

    def smooth(weights: Values) -> Values:
        sums = np.bincount(cell, weights, RINGS * SECTORS).reshape(RINGS, SECTORS)
        along = gaussian_filter1d(sums, DIRECTION_WIDTH * SECTORS / 180, axis=1, mode="wrap")
        return np.asarray(gaussian_filter1d(along, 0.15 * RINGS, axis=0, mode="nearest")).ravel()

    around = (smooth(power / level[ring]) + 1e-3) / (smooth(np.ones_like(power)) + 1e-3)
    return level[ring] * around[cell]


def _fit(
    power: Values, radius: Values, angle: Values, across: Values, some: Counts, n_views: int
) -> Values:
    """Log-likelihood under each of FLOORS: [floors]."""
    power, radius, angle, across = (part[some] for part in (power, radius, angle, across))
    step = np.pi / n_views
    off = angle - np.round(angle / step) * step
    reach = radius * across / SPOKE_WIDTH
    near = sum(np.exp(-np.square(reach * np.sin(off + k * step))) for k in (-1, 0, 1))
    ring = ((radius - LOWEST) / (HIGHEST - LOWEST) * 2 * RINGS).astype(int)
    members = np.maximum(np.bincount(ring, minlength=2 * RINGS), 1)
    found = []
    for floor in FLOORS:
        mean = near + floor
        level = np.bincount(ring, power / mean, 2 * RINGS) / members
        found.append(-np.log(level[ring]).sum() - np.log(mean).sum())
    return np.array(found)
