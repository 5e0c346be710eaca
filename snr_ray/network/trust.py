"""Whether a cleaned image can be trusted, told without the truth.

A cleaned image explains its input if the noise, made anew of it, comes close to that input
(`snr_ray.network.swap`). How close is known from validation images: per view count, the least that
good answers came to. What falls behind that is doubtful: another view count than the model
thinks, other noise, or a size at which its steps lead nowhere.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt
from torch import Tensor

from snr_ray.metrics import psnr
from snr_ray.network.hvae import HVAE
from snr_ray.network.swap import exchange
from snr_ray.network.viewcount import ViewCountMaker

Array = npt.NDArray[np.float32]

RARE = 0.001
"""Share of good answers to validation images that may explain less than what is kept."""
MARGIN = 3.0
"""dB that an answer may explain less than that."""
ENOUGH = 20.0
"""dB that are always enough: what is left then, a tenth of the range, is other noise, and no wrong
answer. A real synchrotron scan, of a few hundred photons a bin, is explained to 22 to 24 dB by
answers that are 5 to 8 dB better than it was."""
ROUNDED = 1e-3
"""Of views per pixel: model folders keep four digits of them."""
LEAST = 15.0
"""dB that any answer must explain, where nothing was measured: noise anew that is off by a sixth of
the range is no explanation."""


def doubtful(
    explained: npt.NDArray[np.floating],
    n_views: npt.NDArray[np.integer],
    side: int,
    least: Mapping[float, float],
) -> npt.NDArray[np.bool_]:
    """Which answers do not explain their inputs as well as good ones do: [B].

    Args:
        explained: PSNR in dB of the noise made anew against the input, [B]; NaN is doubtful.
        n_views: view counts that the images are thought to have, [B]; 0 is clean.
        side: height or width of the images, whichever is larger.
        least: views per pixel -> the least that good answers to validation images explain, in dB;
            may be empty. An image taken for clean is explained by an answer that is like it, and
            that does no harm: LEAST is asked of it alone.
    """
    bounds = np.array([_bound(int(n) / side, least) if n else LEAST for n in n_views])
    return ~(np.asarray(explained, np.float64) >= bounds)


def least_explained(
    model: HVAE, code: list[Tensor], sets: Iterable[tuple[float, Array, Array]]
) -> dict[float, float]:
    """The least that all good answers but one in a thousand explain: what `doubtful` goes by.

    A good answer is nearer to the clean image than its input was. Images are taken as they are and
    as 8-bit files hold them.

    Args:
        model: one that `unrolls`, in eval mode.
        code: mean clean noise code per level, as `snr_ray.network.swap.swap` takes it.
        sets: views per pixel with validation images that have them and their clean images, each
            [B, C, H, W].

    Returns:
        views per pixel -> dB; without those that have no good answer.
    """
    explained: dict[float, list[npt.NDArray[np.float64]]] = {}
    for views_per_pixel, noisy, clean in sets:
        stored = np.round(noisy.clip(0, 1) * 255).astype(np.float32) / np.float32(255)
        told = None
        if isinstance(model.noise_maker, ViewCountMaker):  # whose counts are found, not read
            told = np.full(len(noisy), round(views_per_pixel * max(noisy.shape[2:])))
        for seen in (noisy, stored):
            made = exchange(model, seen, code, told=told, explain=True)
            assert made.explained is not None
            better = psnr(made.images, clean) > psnr(seen, clean)
            explained.setdefault(views_per_pixel, []).append(made.explained[better])
    every = {known: np.concatenate(parts) for known, parts in explained.items()}
    return {
        known: float(np.quantile(good, RARE, method="lower"))
        for known, good in every.items()
        if len(good)
    }


def _bound(views_per_pixel: float, least: Mapping[float, float]) -> float:
    """Of fewer views less is explained, so that of the next lower count that was measured holds."""
    if not least:
        return LEAST
    lower = [known for known in least if known <= views_per_pixel * (1 + ROUNDED)]
    measured = least[max(lower) if lower else min(least)] - MARGIN
    return min(ENOUGH, max(LEAST, measured))
