"""Recipes for other batch sizes: the same images, in longer steps."""

import pytest

from snr_ray import configfile as configs
from snr_ray.errors import InputError
from snr_ray.learning.recipe import peak_share, rate_share, with_batch_size


@pytest.mark.parametrize(
    ("preset", "power"), [("notmnist", 5 / 6), ("unet", 1 / 2), ("places64", 5 / 6)]
)
@pytest.mark.parametrize("size", [2, 8, 64])
def test_as_many_images_are_seen_at_a_higher_rate(preset: str, power: float, size: int) -> None:
    config = configs.load([preset], ["train.lr=0.001", "train.steps=8192"])
    changed = with_batch_size(config, size)
    before, after = config.train, changed.train
    assert after.steps * after.batch_size == before.steps * before.batch_size
    rates = [c.train.lr * peak_share(c) for c in (config, changed)]
    assert rates[1] == pytest.approx(rates[0] * (size / before.batch_size) ** power)
    # A weight of long ago counts as much when as many images have been seen since.
    assert after.ema ** (1024 / size) == pytest.approx(before.ema ** (1024 / before.batch_size))
    assert after.warmup_steps * size == pytest.approx(before.warmup_steps * 8, abs=size / 2)
    assert with_batch_size(config, before.batch_size) == config


@pytest.mark.parametrize(("steps", "left"), [(9000, 1125), (4000, 1000), (1000, 1000), (600, 600)])
def test_no_run_has_fewer_steps_than_a_model_needs(steps: int, left: int) -> None:
    config = configs.load(["notmnist"], [f"train.steps={steps}"])
    after = with_batch_size(config, 64).train
    assert after.steps == left
    assert after.warmup_steps == pytest.approx(100 * left / steps, abs=0.5)
    assert after.ema**left == pytest.approx(config.train.ema**steps)


def test_the_highest_rate_is_reached_after_warm_up() -> None:
    config = configs.load(["smoke"], ["train.steps=4000", "train.warmup_steps=1"])
    assert rate_share(config, 1) == pytest.approx(peak_share(config)) == pytest.approx(0.5)


@pytest.mark.parametrize("size", [0, -8, 321])
def test_a_size_that_leaves_no_step_is_refused(size: int) -> None:
    with pytest.raises(InputError, match=rf"--batch-size must be from 1 to all 320 .* got {size};"):
        with_batch_size(configs.load(["smoke"], []), size)
