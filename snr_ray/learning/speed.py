"""How fast a model cleans images, on the device it is on."""

import time

import numpy as np

from snr_ray.learning.batches import Pairs
from snr_ray.network.hvae import HVAE
from snr_ray.network.swap import NoiseCodes, swap
from snr_ray.network.unet import UNet, regress

SPEED_BATCH = 64
ROUNDS = 3


def seconds_per_image(model: HVAE | UNet, codes: NoiseCodes | None, pairs: Pairs) -> float:
    """Seconds that an image of a batch takes to clean, mean over noise ids.

    Of each noise id the fastest of a few rounds counts: whatever else the machine does can only
    make one slower.

    Args:
        model: in eval mode.
        codes: noise codes whose mean clean one does the swap; None for a U-Net.
        pairs: images, of which the first 64 are cleaned.
    """
    rows = np.arange(min(SPEED_BATCH, len(pairs)))
    fastest = []
    for noise_id in range(1, len(pairs.noisy) + 1):
        noisy, ids = pairs.take(rows, noise_id), np.full(len(rows), noise_id)
        taken = []
        for _ in range(ROUNDS):
            since = time.perf_counter()
            if isinstance(model, UNet):
                regress(model, noisy, ids)
            else:
                assert codes is not None
                swap(model, noisy, codes.mean(0), noise_ids=ids)
            taken.append(time.perf_counter() - since)  # both end with the images on the host
        fastest.append(min(taken))
    return float(np.mean(fastest)) / len(rows)
