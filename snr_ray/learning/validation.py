"""How good a model is on images in memory: the curve of a run, and what it is chosen by."""

import numpy as np
import numpy.typing as npt

from snr_ray.learning.batches import Pairs
from snr_ray.metrics import psnr
from snr_ray.network.hvae import HVAE
from snr_ray.network.swap import N_DONORS, NoiseCodes, collect, swap
from snr_ray.network.unet import UNet, regress
from snr_ray.noise.viewrange import ViewRange

Metrics = dict[str, float]
SCORE_BATCH = 256
SCORE_BOTH_WAYS = 32
"""Validation images that are also rebuilt and injected with noise: for a curve, not for a table."""


def donor_codes(model: HVAE, pairs: Pairs) -> NoiseCodes:
    """Noise codes of N_DONORS images of a set, clean and under every noise id."""
    rows = pairs.sample(N_DONORS)
    return collect(model, [pairs.take(rows, k) for k in range(len(pairs.noisy) + 1)])


def both_ways(model: HVAE, codes: NoiseCodes, pairs: Pairs, rows: npt.NDArray[np.int64]) -> Metrics:
    """PSNR in dB of the other things that a model does to images, mean over noise ids: of noisy
    images rebuilt from their own codes, and of clean ones with noise injected, which are scored
    unclipped."""
    clean, rebuilt, injected = pairs.take(rows, 0), [], []
    for noise_id in range(1, len(pairs.noisy) + 1):
        noisy, ids = pairs.take(rows, noise_id), np.full(len(rows), noise_id)
        again = swap(model, noisy, None, noise_ids=ids)
        rebuilt.append(psnr(again, noisy, clip=False).mean())
        made = swap(model, clean, codes.mean(noise_id))
        injected.append(psnr(made, noisy, clip=False).mean())
    return {
        "recon_noisy_psnr": float(np.mean(rebuilt)),
        "inject_psnr": float(np.mean(injected)),
    }


def validate(
    model: HVAE | UNet,
    codes: NoiseCodes | None,
    pairs: Pairs,
    n_views: tuple[int, ...],
    told: ViewRange | None = None,
) -> Metrics:
    """PSNR in dB of cleaned images for each noise id and their mean, under `swap_psnr`.

    Args:
        model: in eval mode; of a HVAE also reconstructed clean images are scored, and `both_ways`.
        codes: noise codes of training images; the mean clean code does the swap. None for a U-Net,
            whose scores are named `unet_psnr`.
        pairs: validation images.
        n_views: view count of each noise id, for the names of the metrics.
        told: of a model of a range; images are then scored told their view count as well, under
            `told_psnr`.
    """
    rows = np.arange(len(pairs))
    name = "unet_psnr" if codes is None else "swap_psnr"
    sums: Metrics = {}
    if isinstance(model, HVAE) and codes is not None:
        sums |= both_ways(model, codes, pairs, pairs.sample(SCORE_BOTH_WAYS))
    for start in range(0, len(rows), SCORE_BATCH):
        part = rows[start : start + SCORE_BATCH]
        clean = pairs.take(part, 0)
        scored = {}
        if isinstance(model, HVAE):
            scored["recon_clean_psnr"] = psnr(swap(model, clean, None), clean)
        for noise_id, views in enumerate(n_views, start=1):
            noisy, ids = pairs.take(part, noise_id), np.full(len(part), noise_id)
            if isinstance(model, HVAE):
                assert codes is not None
                image = swap(model, noisy, codes.mean(0), noise_ids=ids)
                if told is not None:
                    known = swap(model, noisy, codes.mean(0), geometry=told.spec(views))
                    scored[f"told_psnr_{views}"] = psnr(known, clean)
            else:
                image = regress(model, noisy, ids)
            scored[f"{name}_{views}"] = psnr(image, clean)
        for metric, values in scored.items():
            sums[metric] = sums.get(metric, 0.0) + float(values.sum()) / len(rows)
    for total in (name, "told_psnr") if told is not None else (name,):
        sums[total] = float(np.mean([sums[f"{total}_{views}"] for views in n_views]))
    return sums
