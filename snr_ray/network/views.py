"""The view count of noisy images, found by themselves.

image --spectrum--> a few likely counts --noise code--> those near it --solver, told each--> the one
that explains it best

The spectrum decides alone where it is sure, which it mostly is (`snr_ray.noise.spokes`); the solver
is asked where the image is small, its views are many, or its own lines look like those of a scan.
On an image of 512 pixels that takes seconds for each count, so halves and doubles, which spectra
confuse and noise codes do not, are left out where both agree.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from snr_ray.network.hvae import HVAE
from snr_ray.network.swap import exchange
from snr_ray.noise.operator import NoiseSpec
from snr_ray.noise.spokes import spokes, view_counts

Array = npt.NDArray[np.float32]

SMALLEST_SIDE = 8
"""Height and width that images need at least."""
SURE = 60.0
"""Log-likelihood ahead of all other counts that needs no second opinion."""
AGAINST = 0.25
"""Of that lead, what another count may be ahead of all others under another floor of the spectrum:
large images are so many numbers that even the wrong floor is certain of something."""
FEW = 0.1
"""Views per pixel below which no spectrum is sure: the edges of a smooth image are few spokes, too,
and are looked past for candidates."""
NEAR = 1.6
"""Factor between what the spectrum and the noise codes say where they agree: the codes are right to
a fourth (shipped/choices.md)."""
CANDIDATES = 4
"""Counts of each kind of spectrum that the solver is asked about, and their halves and doubles."""


@dataclass(frozen=True)
class Likely:
    """What the spectrum of an image says."""

    best: int
    sure: bool
    others: list[int]
    """Counts that are also likely, in no order."""


def likely(images: Sequence[Array]) -> Likely:
    """Likely view counts of images [C, H, W] of one size that have the same count."""
    counts = view_counts(*images[0].shape[1:])
    found = np.sum([spokes(image) for image in images], axis=0)  # [floors, counts]
    order = np.argsort(found, axis=1)
    lead = np.take_along_axis(found, order[:, -1:], 1)[:, 0]
    if len(counts) > 1:
        lead = lead - np.take_along_axis(found, order[:, -2:-1], 1)[:, 0]
    firsts, clearest = counts[order[:, -1]], int(lead.argmax())
    others_lead = max(lead[firsts != firsts[clearest]], default=0.0)
    ahead = bool(lead[clearest] > SURE and others_lead < max(SURE, AGAINST * lead[clearest]))
    many = counts >= FEW * max(images[0].shape[1:])
    past = np.argsort(np.where(many, found, -np.inf), axis=1)
    others = {int(k) for places in (order, past) for k in counts[places[:, -CANDIDATES:]].ravel()}
    others |= {half for k in firsts for half in (int(k) // 2, 2 * int(k))} & set(counts.tolist())
    sure = ahead and bool(many[order[clearest, -1]])
    return Likely(int(firsts[clearest]), sure, sorted(others))


def find_views(
    images: Sequence[Array], explains: Callable[[int], float], guess: int | None = None
) -> int:
    """View count of images [C, H, W] of one size that have the same count, or of one image.

    Args:
        images: float32, noisy, at least SMALLEST_SIDE high and wide.
        explains: how well the images are explained by what they are cleaned to when told a count,
            in dB; it is asked for a few counts where the spectrum is not sure.
        guess: what the noise codes say, which is another count to ask about.
    """
    seen = likely(images)
    if seen.sure:
        return seen.best
    asked = {seen.best, *seen.others} | ({guess} if guess else set())
    if guess and _near(seen.best, guess):
        asked = {n_views for n_views in asked if _near(n_views, guess)}
    return max(sorted(asked), key=explains)


def _near(n_views: int, guess: int) -> bool:
    return max(n_views, guess) <= NEAR * min(n_views, guess)


def explaining(
    model: HVAE, codes: list[Tensor], images: Array, geometry: Callable[[int], NoiseSpec | None]
) -> Callable[[int], float]:
    """What `find_views` asks: the mean over images [B, C, H, W] of how well a count explains them.

    Args:
        model: one that `unrolls`.
        codes: clean noise codes per level, [1, C_noise, h, w].
        images: noisy ones.
        geometry: what to tell the solver of a count.
    """

    @functools.cache
    def explains(n_views: int) -> float:
        result = exchange(model, images, codes, geometry=geometry(n_views), explain=True)
        assert result.explained is not None
        return float(result.explained.mean())

    return explains
