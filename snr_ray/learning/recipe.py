"""What of a recipe depends on how long a run is, and on how many images a step sees.

Recipes are chosen with batches of 8, as processors take them; a GPU is busy with 64 and more.
"""

import dataclasses
import math

from snr_ray.config import Config, InputError

LR_STEPS = 1000
"""Steps of the run that train.lr was chosen for. It is too high for a HVAE in longer ones: at 3500
steps half of it cleaned 0.3 dB better. A U-Net keeps it: at 14000 steps a quarter of it cost half a
dB on notMNIST (shipped/choices.md)."""


def peak_share(config: Config) -> float:
    """Highest rate of a run, as a share of train.lr."""
    if config.model.kind != "hvae":
        return 1.0
    return math.sqrt(min(1.0, LR_STEPS / config.train.steps))


def with_batch_size(config: Config, batch_size: int) -> Config:
    """The recipe for batches of another size: as many images seen.

    Of batches r times as large there are r times fewer, and so of the steps of the warm-up and
    between checkpoints; the moving average forgets r times as fast, and the highest rate is the
    square root of r times as high, since steps of Adam and Muon are of the same length whatever
    the gradient's, and their noise falls with the square root of r.

    Source: Malladi et al., On the SDEs and scaling rules for adaptive gradient algorithms (2022).
    What it costs: shipped/choices.md.

    Raises:
        InputError: if batch_size is not positive, or fewer than a step would be left.
    """
    before = config.train
    if not 1 <= batch_size <= before.steps * before.batch_size:
        raise InputError(
            f"--batch-size must be from 1 to all {before.steps * before.batch_size:,} images that "
            f"the run sees, but got {batch_size}; give more train.steps."
        )
    r = batch_size / before.batch_size

    def fewer(steps: int) -> int:
        return max(1, round(steps / r))

    after = dataclasses.replace(
        before,
        batch_size=batch_size,
        steps=fewer(before.steps),
        warmup_steps=fewer(before.warmup_steps) if before.warmup_steps else 0,
        checkpoint_every_steps=fewer(before.checkpoint_every_steps),
        ema=before.ema**r,
    )
    changed = dataclasses.replace(config, train=after)
    rate = before.lr * math.sqrt(r) * peak_share(config) / peak_share(changed)
    return dataclasses.replace(changed, train=dataclasses.replace(after, lr=min(1.0, rate)))
