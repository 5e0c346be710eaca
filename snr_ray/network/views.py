"""The view count of noisy images, found by themselves.

image --spectrum--> a few likely counts --noise code--> those near it --solver, told each--> the one
that explains it best

The spectrum decides alone where it is sure, which it mostly is (`snr_ray.noise.likelyviews`); the
solver is asked where the image is small, its views are many, or its own lines look like those of a
scan. On an image of 512 pixels that takes seconds for each count, so halves and doubles, which
spectra confuse and noise codes do not, are left out where both agree.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from snr_ray.config import VIEWS_PER_PIXEL
from snr_ray.network.hvae import HVAE
from snr_ray.network.swap import exchange, read_views
from snr_ray.network.viewcount import ViewCountMaker
from snr_ray.noise.likelyviews import SMALLEST_SIDE, Likely, likely
from snr_ray.noise.operator import NoiseSpec

Array = npt.NDArray[np.float32]
Counts = npt.NDArray[np.int64]

NEAR = 1.6
"""Factor between what the spectrum and the noise codes say where they agree: the codes are right to
a fourth (shipped/choices.md)."""
Explains = Callable[[Counts, int], npt.NDArray[np.float64]]
"""rows of images, a count -> how well it explains each of them, in dB."""


def find_views(
    images: Array,
    explains: Explains,
    guesses: Counts | None = None,
    seen: Sequence[Likely] | None = None,
    angle_range: float = 180.0,
) -> Counts:
    """View count of each image [B], by itself.

    Args:
        images: [B, C, H, W] float32, noisy, at least SMALLEST_SIDE high and wide.
        explains: how well images are explained by what they are cleaned to when told a count; it
            is asked for a few counts, of those images of which the spectrum is not sure.
        guesses: what the noise codes say, [B], which is another count to ask about, or the most
            that images of this size can hold; 0 is none.
        seen: what the spectra say, where somebody has looked at them.
        angle_range: degrees that the views are spread over.
    """
    seen = likely(images, angle_range) if seen is None else seen
    most = VIEWS_PER_PIXEL * max(images.shape[2:])
    guesses = np.zeros(len(images), np.int64) if guesses is None else np.minimum(guesses, most)
    rows = [[] if one.sure else _asked(one, guess)
            for one, guess in zip(seen, guesses.tolist(), strict=True)]  # fmt: skip
    found = np.array([one.best for one in seen], np.int64)
    best = np.full(len(images), -np.inf)
    for n_views in sorted({n_views for asked in rows for n_views in asked}):
        its = np.array([k for k, asked in enumerate(rows) if n_views in asked])
        decibels = explains(its, n_views)
        better = decibels > best[its]
        best[its[better]], found[its[better]] = decibels[better], n_views
    return found


def _asked(seen: Likely, guess: int) -> list[int]:
    """Counts of an image that the solver is asked about."""
    asked = {seen.best, *seen.others} | ({guess} if guess else set())
    if guess and _near(seen.best, guess):
        asked = {n_views for n_views in asked if _near(n_views, guess)}
    return sorted(asked)


def _near(n_views: int, guess: int) -> bool:
    return max(n_views, guess) <= NEAR * min(n_views, guess)


def views_of_range(
    model: HVAE,
    codes: list[Tensor],
    images: Array,
    geometry: Callable[[int], NoiseSpec | None],
    seen: Sequence[Likely] | None = None,
) -> Counts | None:
    """View counts that nobody has told a model of a range of them, whose noise codes come near and
    no further: that of each of images [B, C, H, W] by itself, 0 of one whose code says that it is
    clean. None of a model of a few counts, which takes the nearest of them, of one that does not
    unroll, and of images too small for a spectrum. The arguments are those of `explaining`, and
    `seen` that of `find_views`."""
    maker = model.noise_maker
    small = min(images.shape[2:]) < SMALLEST_SIDE
    if small or not (model.unrolls and isinstance(maker, ViewCountMaker)):
        return None
    counts = read_views(model, images)
    rows = np.flatnonzero(counts)
    if len(rows):
        noisy = images[rows]
        explains = explaining(model, codes, noisy, geometry)
        its = seen and [seen[row] for row in rows.tolist()]
        counts[rows] = find_views(noisy, explains, counts[rows], its, maker.views.angle_range)
    return counts


def explaining(
    model: HVAE, codes: list[Tensor], images: Array, geometry: Callable[[int], NoiseSpec | None]
) -> Explains:
    """What `find_views` asks of a model.

    Args:
        model: one that `unrolls`.
        codes: clean noise codes per level, [1, C_noise, h, w].
        images: noisy ones [B, C, H, W].
        geometry: what to tell the solver of a count.
    """

    def explains(rows: Counts, n_views: int) -> npt.NDArray[np.float64]:
        told = geometry(n_views)
        explained = exchange(model, images[rows], codes, geometry=told, explain=True).explained
        assert explained is not None
        return explained

    return explains
