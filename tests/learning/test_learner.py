"""The step: workers agree with one, rates, starts from other models, numbers not finite."""

from pathlib import Path

import numpy as np
import pytest
import torch

from snr_ray import configfile as configs
from snr_ray.config import Config
from snr_ray.learning.batches import PairFeed, Pairs, Share
from snr_ray.learning.checkpoint import (
    load_model,
)
from snr_ray.learning.learner import Learner
from snr_ray.learning.losses import SIGMA_FLOOR
from snr_ray.network.blocks import PIXEL_OFFSET
from snr_ray.network.swap import read_views, swap


def _gradients(learner: Learner) -> list[torch.Tensor]:
    return [p.grad.clone() for p in learner.objective.parameters() if p.grad is not None]


def _step(config: Config, pairs: Pairs, share: Share) -> list[torch.Tensor]:
    learner = Learner(config, share=share)
    feed = PairFeed(pairs, config.train.batch_size, seed=config.seed, share=share)
    learner.train_step(feed.batch(0))
    return _gradients(learner)


@pytest.mark.parametrize("preset", ["paired", "seed", "unet", "itnet"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_gradients_of_workers_average_to_those_of_one(
    pairs: Pairs, preset: str, world_size: int
) -> None:
    config = configs.load(["smoke", preset], ["train.grad_clip=1e9", "loss.free_bits=0.5"])
    one = _step(config, pairs, Share())
    many = [_step(config, pairs, Share(rank, world_size)) for rank in range(world_size)]
    for k, gradient in enumerate(one):
        mean = torch.stack([worker[k] for worker in many]).mean(0)
        torch.testing.assert_close(mean, gradient, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("preset", ["paired", "unet", "itnet"])
def test_parts_of_a_batch_give_the_gradient_of_as_many_workers_to_the_last_bit(
    pairs: Pairs, preset: str
) -> None:
    config = configs.load(["smoke", preset], ["train.grad_clip=1e9", "train.parts=2"])
    one = _step(config, pairs, Share())
    two = [_step(config, pairs, Share(rank, 2)) for rank in range(2)]
    for k, gradient in enumerate(one):
        assert torch.equal(two[0][k] / 2 + two[1][k] / 2, gradient)


def test_two_workers_have_the_weights_of_one_after_forty_steps(pairs: Pairs) -> None:
    config = configs.load(["smoke"], ["train.steps=40", "train.parts=2"])
    one, two = Learner(config), [Learner(config, share=Share(rank, 2)) for rank in range(2)]
    size = config.train.batch_size
    feeds = [PairFeed(pairs, size, seed=0, share=learner.share) for learner in (one, *two)]
    for step in range(config.train.steps):
        one.train_step(feeds[0].batch(step))
        for learner, feed in zip(two, feeds[1:], strict=True):
            learner.gradients(feed.batch(step))
        both = zip(*(learner.objective.parameters() for learner in two), strict=True)
        for a, b in both:  # as data-parallel workers share them
            if a.grad is not None and b.grad is not None:
                a.grad = a.grad / 2 + b.grad / 2
                b.grad = a.grad.clone()
        for learner in two:
            learner.update()
            learner.step += 1
    for learner in two:
        weights = zip(learner.average.parameters(), one.average.parameters(), strict=True)
        assert max(float((a - b).abs().max()) for a, b in weights) < 1e-5


@pytest.mark.parametrize(
    ("kind", "steps", "peak"),
    [("hvae", 500, 1.0), ("hvae", 1000, 1.0), ("hvae", 4000, 0.5), ("hvae", 100_000, 0.1),
     ("unet", 4000, 1.0)],
)  # fmt: skip
def test_rate_rises_to_a_peak_that_falls_with_the_length_of_the_run_but_for_a_unet(
    tiny: Config, pairs: Pairs, kind: str, steps: int, peak: float
) -> None:
    batch = PairFeed(pairs, tiny.train.batch_size, seed=0, share=Share()).batch(0)
    changes = {"model.kind": kind, "train.steps": steps, "train.warmup_steps": 50}
    config = configs.replace(tiny, changes)
    learner, rates = Learner(config), []
    for step in (0, 49, 50, (50 + steps) // 2, steps):
        learner.step = step
        learner.train_step(batch)
        rates.append(learner.optimizers[0].param_groups[0]["lr"] / config.train.lr)
    assert rates == pytest.approx([peak / 50, peak, peak, 0.51 * peak, 0.02 * peak], rel=1e-3)


def test_start_gives_the_images_of_the_model_it_is(
    tiny: Config, pairs: Pairs, model_folder: Path
) -> None:
    trained, noisy = load_model(model_folder), pairs.take(np.arange(4), 2)
    expected = swap(trained.model, noisy, trained.codes.mean(0))
    learner = Learner(configs.replace(tiny, {"seed": 5}))
    learner.start_from(trained.model)
    for model in (learner.average, learner.objective.model):
        np.testing.assert_allclose(swap(model, noisy, trained.codes.mean(0)), expected, atol=1e-5)


def test_start_with_view_counts_in_another_order_reads_the_same_counts(
    tiny: Config, pairs: Pairs, model_folder: Path
) -> None:
    trained, noisy = load_model(model_folder).model, pairs.take(np.arange(20), 2)
    assert tiny.noise.n_views == (12, 6)
    learner = Learner(configs.replace(tiny, {"noise.n_views": [5, 11]}))
    learner.start_from(trained)
    seen = read_views(trained, noisy)
    assert set(seen) == {0, 6, 12}
    for model in (learner.average, learner.objective.model):
        expected = [{0: 0, 6: 5, 12: 11}[n_views] for n_views in seen.tolist()]
        assert read_views(model, noisy).tolist() == expected


def test_start_of_another_range_reads_the_same_counts(tiny: Config, range_folder: Path) -> None:
    trained = load_model(range_folder).model
    codes = [torch.ones(1, width, 1, 1) for width in tiny.model.noise_channels]
    learner = Learner(configs.replace(tiny, {"noise.views_per_pixel": [0.1, 0.8], "seed": 5}))
    learner.start_from(trained)
    for model in (learner.average, learner.objective.model):
        for read, before in zip(
            model.noise_maker.read(codes), trained.noise_maker.read(codes), strict=True
        ):
            torch.testing.assert_close(read.detach(), before)


@pytest.mark.parametrize(
    ("decoder", "unrolled"), [("operator", 0), ("operator", 2), ("network", 0)]
)
def test_start_with_physics_begins_with_the_estimate_or_the_model_as_it_was(
    tiny: Config, pairs: Pairs, decoder: str, unrolled: int
) -> None:
    config = configs.replace(tiny, {"model.decoder": decoder, "model.unrolled": unrolled})
    other, noisy = Learner(config).average, torch.from_numpy(pairs.take(np.arange(4), 2))
    learner = Learner(configs.replace(config, {"model.physics": True, "seed": 5}))
    learner.fit_physics(pairs)
    learner.start_from(other)
    model, ids = learner.average, torch.full((4,), 2)
    guesses: list[torch.Tensor] = []
    if unrolled:
        model.levels[0].steps[0].register_forward_hook(lambda *io: guesses.append(io[-1][1]))
    with torch.inference_mode():
        codes = model(noisy, noise_ids=ids).codes
        if decoder == "network":  # the kernels that read the estimate are still zero
            torch.testing.assert_close(model.decode(codes), other(noisy).image)
        else:
            pixels = model.levels[0].pixels(codes.content[0], codes.size) + PIXEL_OFFSET
            first = guesses[0] if unrolled else pixels
            torch.testing.assert_close(first, model.stem.inverse(noisy, ids))


def test_start_with_looks_around_begins_with_the_model_as_it_was(
    tiny: Config, pairs: Pairs, model_folder: Path
) -> None:
    trained, noisy = load_model(model_folder).model, pairs.take(np.arange(4), 2)
    learner = Learner(configs.replace(tiny, {"model.step_channels": [6, 8], "seed": 5}))
    learner.start_from(trained)
    for model in (learner.average, learner.objective.model):
        np.testing.assert_allclose(swap(model, noisy, None), swap(trained, noisy, None), atol=1e-5)
    for step in range(2):  # the first moves what adds, the second what it adds
        learner.train_step(PairFeed(pairs, 16, seed=0, share=Share()).batch(step))
    around = learner.objective.model.levels[0].steps[0].around
    fresh = Learner(learner.config).objective.model.levels[0].steps[0].around
    for mine, untrained in zip(around.parameters(), fresh.parameters(), strict=True):
        if mine.ndim > 1:
            assert (mine != untrained).any()


@pytest.mark.parametrize("kind", ["hvae", "unet"])
def test_what_bfloat16_costs_is_what_its_images_lack(tiny: Config, pairs: Pairs, kind: str) -> None:
    learner = Learner(configs.replace(tiny, {"model.kind": kind}))
    few = Pairs(pairs.ids[:20], [pairs.clean[0][:20]], [[part[0][:20]] for part in pairs.noisy])
    _, whole = learner.validate(few, few)
    better = {name: value + 5 for name, value in whole.items()}
    (costs,) = learner.bf16_costs(few, few, better).values()
    assert costs == pytest.approx(5, abs=0.3)
    assert costs != 5  # it was another arithmetic


def test_what_reads_the_estimate_learns_from_the_start(
    tiny: Config, pairs: Pairs, model_folder: Path
) -> None:
    learner = Learner(configs.replace(tiny, {"model.physics": True}))
    learner.fit_physics(pairs)
    learner.start_from(load_model(model_folder).model)
    learner.train_step(PairFeed(pairs, 16, seed=0, share=Share()).batch(0))
    assert (learner.objective.model.stem.conv.weight[:, 1] != 0).any()


def test_a_step_leaves_no_sigma_below_its_floor(tiny: Config, pairs: Pairs) -> None:
    learner = Learner(tiny)
    log_sigma = learner.objective.likelihood.log_sigma
    with torch.no_grad():
        log_sigma.fill_(-20.0)
    feed = PairFeed(pairs, tiny.train.batch_size, seed=0, share=Share())
    learner.train_step(feed.batch(0))
    low = log_sigma.detach().clone()
    assert (low.exp() > 0.99 * SIGMA_FLOOR).all()
    learner.train_step(feed.batch(1))
    assert (log_sigma > low)[1:, 0].all()  # errors of cleaned images are far above the floor


def test_step_with_bad_numbers_is_skipped(tiny: Config, pairs: Pairs) -> None:
    learner = Learner(tiny)
    batch = PairFeed(pairs, tiny.train.batch_size, seed=0, share=Share()).batch(0)
    batch.noisy[0] = float("nan")
    before = [p.clone() for p in learner.objective.parameters()]
    learner.train_step(batch)
    assert learner.skipped == 1
    for a, b in zip(before, learner.objective.parameters(), strict=True):
        assert torch.equal(a, b)
