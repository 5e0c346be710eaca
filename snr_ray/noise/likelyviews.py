"""View counts that the spectrum of a noisy image makes likely, and whether it is sure of one.

image --spokes--> log-likelihood of each count --> the best, sure or not, and others to ask about
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from snr_ray.noise.spokes import FEWEST_VIEWS, HALF_TURN, spokes, view_counts

Array = npt.NDArray[np.float32]
Counts = npt.NDArray[np.int64]

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
FEWEST_SURE = 2 * FEWEST_VIEWS - 1
"""Views below which no spectrum is sure: they may be twice as many as there are, which are too few
to be tried."""
CANDIDATES = 4
"""Counts of each kind of spectrum that the solver is asked about, and their halves and doubles."""


@dataclass(frozen=True)
class Likely:
    """What the spectrum of an image says."""

    best: int
    sure: bool
    others: list[int]
    """Counts that are also likely, in no order."""


def likely(images: Array, angle_range: float = HALF_TURN) -> list[Likely]:
    """Likely view counts of each of the images [B, C, H, W], of views that are spread over a range
    of angles, in degrees."""
    if not len(images):  # whose frequencies have no shape
        return []
    height, width = images.shape[2:]
    counts = view_counts(height, width, angle_range)
    many = counts * HALF_TURN / angle_range >= FEW * max(height, width)
    return [_likely(found, counts, many) for found in spokes(images, angle_range)]


def _likely(found: npt.NDArray[np.float64], counts: Counts, many: npt.NDArray[np.bool_]) -> Likely:
    """By the log-likelihoods of one image, [floors, counts]."""
    order = np.argsort(found, axis=1)
    lead = np.take_along_axis(found, order[:, -1:], 1)[:, 0]
    if len(counts) > 1:
        lead = lead - np.take_along_axis(found, order[:, -2:-1], 1)[:, 0]
    firsts, clearest = counts[order[:, -1]], int(lead.argmax())
    others_lead = max(lead[firsts != firsts[clearest]], default=0.0)
    ahead = bool(lead[clearest] > SURE and others_lead < max(SURE, AGAINST * lead[clearest]))
    past = np.argsort(np.where(many, found, -np.inf), axis=1)
    others = {int(k) for places in (order, past) for k in counts[places[:, -CANDIDATES:]].ravel()}
    halves = {half for k in firsts for half in (int(k) // 2, 2 * int(k))}
    others |= halves & set(range(FEWEST_VIEWS // 2, int(counts[-1]) + 1))
    best = int(firsts[clearest])
    sure = ahead and best >= FEWEST_SURE and bool(many[order[clearest, -1]])
    return Likely(best, sure, sorted(others))
