"""What of a recipe depends on how long a run is, and on how many images a step sees.

Recipes are chosen with batches of 8, as processors take them; a GPU is busy with 64 and more.
"""

import dataclasses
import math

from snr_ray.config import Config
from snr_ray.errors import InputError

LR_STEPS = 1000
"""Steps of the run that train.lr was chosen for. It is too high for a HVAE in longer ones: at 3500
steps half of it cleaned 0.3 dB better. A U-Net keeps it: at 14000 steps a quarter of it cost half a
dB on notMNIST (shipped/choices.md)."""
RATE_POWER = 5 / 6
"""How the highest rate of a HVAE grows with the batch: 5.7 times for 64 images in place of 8."""


def peak_share(config: Config) -> float:
    """Highest rate of a run, as a share of train.lr."""
    if config.model.kind != "hvae":
        return 1.0
    return math.sqrt(min(1.0, LR_STEPS / config.train.steps))


def rate_share(config: Config, step: int) -> float:
    """Rate of a step, as a share of train.lr: linear warm-up to the peak of the run, then cosine to
    2 % of it."""
    train, peak = config.train, peak_share(config)
    if step < train.warmup_steps:
        return peak * (step + 1) / train.warmup_steps
    done = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def with_batch_size(config: Config, batch_size: int) -> Config:
    """The recipe for batches of another size: as many images seen, in fewer steps.

    Of batches r times as large there are r times fewer, but LR_STEPS where the run has them: with
    fewer a HVAE does not get far, however many images each sees. Warm-up, checkpoints and the
    moving average keep their share of the run. Steps of Adam and Muon are of the same length
    whatever the gradient's, and their noise falls with the square root of r: by so much the highest
    rate grows, and of a HVAE, which such a run leaves far from its end, by RATE_POWER.

    Source: Malladi et al., On the SDEs and scaling rules for adaptive gradient algorithms (2022).
    What was tried: presets/README.md.

    Raises:
        InputError: if batch_size is not from 1 to all images that the run sees.
    """
    before = config.train
    seen = before.steps * before.batch_size
    if not 1 <= batch_size <= seen:
        raise InputError(
            f"--batch-size must be from 1 to all {seen:,} images that the run sees, but got "
            f"{batch_size}; give more train.steps."
        )
    r = batch_size / before.batch_size
    steps = max(round(before.steps / r), min(before.steps, LR_STEPS))
    share = steps / before.steps
    after = dataclasses.replace(
        before,
        batch_size=batch_size,
        steps=steps,
        warmup_steps=round(before.warmup_steps * share),
        checkpoint_every_steps=max(1, round(before.checkpoint_every_steps * share)),
        ema=before.ema ** (1 / share),
    )
    changed = dataclasses.replace(config, train=after)
    power = RATE_POWER if config.model.kind == "hvae" else 0.5
    rate = before.lr * r**power * peak_share(config) / peak_share(changed)
    return dataclasses.replace(changed, train=dataclasses.replace(after, lr=min(1.0, rate)))
