"""Batches of many sizes: the same for every number of workers, images never enlarged."""

import numpy as np
import pytest
import torch

from snr_ray import configfile as configs
from snr_ray.config import Config
from snr_ray.errors import InputError
from snr_ray.learning.batches import Share
from snr_ray.learning.learner import Learner
from snr_ray.learning.mixed import MixedFeed, Pictures, batch_size, own_side, resized
from snr_ray.noise.operator import NoiseSpec, noise_operator


@pytest.fixture(scope="module")
def ranged() -> Config:
    return configs.load(
        ["smoke"],
        ["noise.views_per_pixel=[0.2,0.9]", "train.sizes=[8,16,24]", "train.batch_size=8"],
    )


def pictures(*sides: int, n: int = 40) -> Pictures:
    """Images that tell their side: all pixels are a hundredth of it, and one is 1."""
    by_side = {}
    for side in sides:
        image = np.full((1, side, side), side / 100, np.float32)
        image[0, 0, 0] = 1
        by_side[side] = ([f"{side}/{k}" for k in range(n)], [image] * n)
    return Pictures(by_side)


def test_batches_have_one_size_and_images_of_that_size_or_more(ranged: Config) -> None:
    feed = MixedFeed(pictures(8, 16, 24), ranged, Share())
    sizes = set()
    for step in range(40):
        batch = feed.batch(step)
        size = batch.clean.shape[-1]
        sizes.add(size)
        assert len(batch.clean) == batch_size(ranged, size)
        assert (batch.clean[:, 0, -1, -1] * 100 >= size - 0.01).all()
        least, most = feed.views.counts(size)
        assert batch.n_views is not None
        assert batch.n_views.shape == (len(batch.clean), ranged.train.versions)
        assert least <= batch.n_views.min() <= batch.n_views.max() <= most
        assert torch.equal(batch.n_views[::2], batch.n_views[1::2])  # of partners
        pairs = {tuple(counts) for counts in batch.n_views[::2].tolist()}
        assert len(pairs) > 1 or len(batch.clean) < 8
    assert sizes == {8, 16, 24}


def test_sizes_come_as_often_as_they_weigh(ranged: Config) -> None:
    config = configs.replace(ranged, {"train.size_weights": [6, 1, 1]})
    feed = MixedFeed(pictures(24), config, Share())
    sizes = [feed.batch(step).clean.shape[-1] for step in range(200)]
    assert sizes.count(8) == pytest.approx(150, abs=25)


def test_a_batch_is_the_same_on_any_number_of_workers(ranged: Config) -> None:
    config = configs.replace(ranged, {"train.num_workers": 2})
    many = pictures(8, 16, 24)
    for own in many.by_side.values():  # tell images of a side apart
        own[1][:] = [image + 0.001 * k for k, image in enumerate(own[1])]
    whole = MixedFeed(many, config, Share())
    parts = [MixedFeed(many, config, Share(rank, 2)) for rank in range(2)]
    for step in range(10):
        batch, mine = whole.batch(step), [part.batch(step) for part in parts]
        torch.testing.assert_close(torch.cat([part.clean for part in mine]), batch.clean)
        counts = [part.n_views for part in mine if part.n_views is not None]
        torch.testing.assert_close(torch.cat(counts), batch.n_views)


def test_order_of_blocks_does_not_matter(ranged: Config) -> None:
    one = pictures(8, 16)
    other = Pictures(
        {side: (ids[::-1], images[::-1]) for side, (ids, images) in list(one.by_side.items())[::-1]}
    )
    config = configs.replace(ranged, {"train.sizes": [8, 16]})
    feeds = [MixedFeed(of, config, Share()) for of in (one, other)]
    for step in range(5):
        torch.testing.assert_close(*(feed.batch(step).clean for feed in feeds))


def test_batches_of_large_images_hold_fewer(ranged: Config) -> None:
    sizes = [batch_size(ranged, size) for size in (8, 16, 24, 256)]
    assert sizes == [32, 8, 4, 2]
    two = configs.replace(ranged, {"train.num_workers": 2})
    assert batch_size(two, 256) == 4


def test_a_size_that_too_few_images_fill_is_an_error(ranged: Config) -> None:
    with pytest.raises(InputError, match="leave 24 out"):
        MixedFeed(pictures(8, 16), ranged, Share())


def test_images_are_kept_at_the_largest_size_that_they_fill(ranged: Config) -> None:
    assert [own_side(*shape, ranged) for shape in ((30, 20), (24, 24), (8, 99), (5, 5))] == [
        16, 24, 8, 8,
    ]  # fmt: skip


def test_pixels_of_smaller_images_are_means() -> None:
    image = np.random.default_rng(0).random((1, 24, 24), np.float32)
    smaller = resized(image, 8).numpy()
    np.testing.assert_allclose(
        smaller[0], image.reshape(1, 8, 3, 8, 3).mean((2, 4)), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(resized(image, 24).numpy()[0], image)


def test_the_step_makes_the_noise_of_the_counts_that_were_drawn(ranged: Config) -> None:
    batch = Learner(ranged).with_noise(MixedFeed(pictures(24), ranged, Share()).batch(3))
    assert batch.noisy is not None
    assert batch.n_views is not None
    for clean, noisy, counts in zip(batch.clean, batch.noisy, batch.n_views, strict=True):
        for version, n_views in zip(noisy, counts.tolist(), strict=True):
            expected = noise_operator(NoiseSpec(n_views), *clean.shape[-2:])(clean.numpy())
            np.testing.assert_allclose(version.numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("world_size", [2])
def test_gradients_of_workers_average_to_those_of_one(ranged: Config, world_size: int) -> None:
    config = configs.replace(
        ranged, {"train.grad_clip": 1e9, "train.num_workers": world_size, "loss.stored": 0.0}
    )

    def gradients(share: Share) -> list[torch.Tensor]:
        learner = Learner(config, share=share)
        learner.train_step(MixedFeed(pictures(24), config, share).batch(1))
        return [p.grad.clone() for p in learner.objective.parameters() if p.grad is not None]

    one = gradients(Share())
    many = [gradients(Share(rank, world_size)) for rank in range(world_size)]
    for k, gradient in enumerate(one):
        mean = torch.stack([worker[k] for worker in many]).mean(0)
        torch.testing.assert_close(mean, gradient, atol=1e-5, rtol=1e-3)


def test_every_weight_learns_from_a_range(ranged: Config) -> None:
    learner = Learner(ranged)
    with torch.no_grad():
        for p in learner.objective.model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.manual_seed(0)))
    parts = learner.train_step(MixedFeed(pictures(24), ranged, Share()).batch(0))
    assert "views_error" in parts
    for name, p in learner.objective.named_parameters():
        assert not p.requires_grad or (p.grad is not None and p.grad.isfinite().all()), name


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"noise.views_per_pixel": None}, "train.sizes needs noise"),
        ({"model.kind": "unet"}, "model.kind=hvae"),
        ({"model.decoder": "network"}, "decoder=operator"),
        ({"noise.photons": 1000}, "photon"),
        ({"loss.triplet_form": "drawn"}, "drawn"),
        ({"noise.n_views": [15]}, "noise.n_views must lie"),
        ({"train.size_weights": [1, 2]}, "one entry"),
        ({"train.sizes": [8, 8, 16]}, "repeat"),
    ],
)
def test_what_does_not_go_with_a_range_is_said(
    ranged: Config, changes: dict[str, object], match: str
) -> None:
    with pytest.raises(InputError, match=match):
        configs.replace(ranged, changes)


def test_counts_beyond_the_range_are_pushed_apart_as_far_as_they_differ() -> None:
    from snr_ray.learning.losses import code_distances, triplet_loss

    equal = code_distances(torch.ones(4 * 3, 1, 1, 1), 2)

    def loss(*counts: int) -> float:
        return float(triplet_loss(equal, "symmetric", 1.0, torch.tensor([counts] * 4)))

    assert loss(10, 10) < loss(14, 10) < loss(20, 10)
    assert loss(20, 10) == pytest.approx(loss(40, 10))
