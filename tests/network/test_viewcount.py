"""Noise of any view count of a range: read from codes, told, made."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from random_models import images, model_of

from snr_ray import configfile as configs
from snr_ray.config import Config
from snr_ray.network.blocks import NoiseHead
from snr_ray.network.hvae import HVAE
from snr_ray.network.viewcount import ViewCountMaker
from snr_ray.noise.operator import NoiseSpec, noise_operator
from snr_ray.noise.viewrange import ViewRange

VIEWS = ViewRange(0.2, 0.9)


@pytest.fixture(scope="module")
def ranged() -> Config:
    return configs.load(["smoke"], ["noise.views_per_pixel=[0.2,0.9]"])


def maker_of() -> ViewCountMaker:
    """A maker that reads noise from the first channel and octaves from the second."""
    maker = ViewCountMaker(VIEWS, 2)
    with torch.no_grad():
        maker.reading.weight.copy_(torch.tensor([[20.0, 0.0], [0.0, math.log(2)]]))
    return maker


def codes_of(noisy: list[float], octaves: list[float]) -> list[torch.Tensor]:
    return [torch.tensor(values).reshape(-1, 1, 1, 1) for values in (noisy, octaves)]


def test_each_image_gets_the_whole_count_nearest_to_what_its_code_says() -> None:
    maker, clean = maker_of(), torch.from_numpy(images(3, 16, 12))
    octaves = [0.0, math.log2(9.3 / 16 / math.exp(maker.middle)), 0.5]
    shares = maker.shares(codes_of([1.0, 1.0, -1.0], octaves))
    counts = maker.counts(shares, 16).tolist()
    assert counts == [round(16 * math.exp(maker.middle)), 9, 0]
    image = maker.of(shares, 16)(clean).detach().numpy()
    for k, n_views in enumerate(counts[:2]):
        expected = noise_operator(NoiseSpec(n_views), 16, 12)(clean[k].numpy())
        np.testing.assert_allclose(image[k], expected, atol=1e-4)
    np.testing.assert_array_equal(image[2], clean[2])


def test_a_share_of_noise_between_is_kept() -> None:
    maker, clean = maker_of(), torch.from_numpy(images(1, 16, 16))
    shares = maker.shares(codes_of([math.log(3) / 20], [0.0]))
    noisy = noise_operator(NoiseSpec(int(maker.counts(shares, 16))), 16, 16)(clean.numpy())
    expected = 0.25 * clean.numpy() + 0.75 * noisy
    np.testing.assert_allclose(maker.of(shares, 16)(clean).detach().numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("side", [16, 100, 512])
def test_told_counts_are_exact_and_the_rest_is_read(side: int) -> None:
    maker = maker_of()
    counts = torch.arange(1, 2 * side)
    shares = torch.full((len(counts), 2), 0.3)
    assert torch.equal(maker.counts(maker.told(shares, counts, side), side), counts)
    told = maker.told(shares[:3], torch.tensor([0, -1, 7]), side)
    assert maker.counts(told, side)[0] == 0
    assert torch.equal(told[1], shares[1])


def test_reading_learns_view_counts_and_clean_images() -> None:
    maker, generator = ViewCountMaker(VIEWS, 6), torch.manual_seed(0)
    counts = torch.tensor([0, 4, 7, 14])
    codes = [torch.randn(4, 6, 1, 1, generator=generator)]
    optimizer = torch.optim.Adam(maker.parameters(), lr=0.05)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 300)
        entropy, error = maker.loss(codes, counts, 16)
        optimizer.zero_grad()
        (entropy + error).backward()
        optimizer.step()
    assert float(entropy.detach()) < 0.05
    assert maker.counts(maker.shares(codes), 16).tolist() == counts.tolist()


def test_counts_far_beyond_the_range_are_not_made() -> None:
    maker = maker_of()
    shares = maker.shares(codes_of([1.0, 1.0], [-30.0, 30.0]))
    least, most = maker.counts(shares, 100).tolist()
    assert (least, most) == (13, 135)  # half again beyond 20 and 90


def test_noise_has_the_filter_and_the_angles_of_the_range() -> None:
    maker, clean = ViewCountMaker(ViewRange(0.2, 0.9, "hann", 120.0), 2), images(2, 16, 12)
    shares = torch.tensor([[1.0, math.log(9 / 16)]] * 2)
    expected = noise_operator(NoiseSpec(9, "hann", 120.0), 16, 12)(clean)
    noise = maker.of(shares, 16)
    np.testing.assert_allclose(noise(torch.from_numpy(clean)), expected, atol=1e-4)


def test_the_error_of_view_counts_is_the_mean_over_noisy_images() -> None:
    codes, right = codes_of([-1.0, 1.0, 1.0], [9.0, 0.5, -1.5]), 16 * math.exp(maker_of().middle)
    _, error = maker_of().loss(codes, torch.tensor([0, 1, 1]) * round(right), 16)
    offset = math.log(round(right) / right)
    expected = np.abs(np.array([0.5, -1.5]) * math.log(2) - offset).mean()
    assert float(error.detach()) == pytest.approx(expected, rel=1e-4)
    _, error = maker_of().loss(codes, torch.zeros(3, dtype=torch.int64), 16)
    assert float(error.detach()) == 0


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("side", [4, 16, 100])
def test_the_host_knows_bounds_of_the_counts_that_are_made(training: bool, side: int) -> None:
    maker, rng = maker_of().train(training), np.random.default_rng(side)
    for n in (1, 2, 9):
        logits = rng.choice([-4.5, -2, 0, 2, 4.5], n) / 20
        shares = maker.shares(codes_of(logits.tolist(), (4 * rng.standard_normal(n)).tolist()))
        counts = maker.of(shares, side).counts
        made = counts.each[counts.each > 0]
        assert torch.equal(counts.each > 0, shares[:, 0] > 0)
        assert torch.equal(shares[:, 0] == 0, torch.from_numpy(logits < -0.2))
        assert torch.equal(shares[:, 0] == 1, torch.from_numpy(logits > 0.2))
        assert 1 <= counts.least <= counts.most <= math.ceil(0.9 * 1.5 * side)
        assert not len(made) or counts.least <= made.min() <= made.max() <= counts.most


@pytest.mark.parametrize("training", [False, True])
def test_no_more_views_are_read_than_images_can_hold(training: bool) -> None:
    maker = ViewCountMaker(ViewRange(1.0, 4.0), 2).train(training)
    shares = torch.tensor([[1.0, math.log(5.9)], [1.0, math.log(4.0)], [1.0, math.log(0.7)]])
    assert maker.counts(shares, 12).tolist() == [48, 48, 8]
    clean = torch.from_numpy(images(3, 12, 12))
    noisy = maker.of(shares, 12)(clean)
    for image, seen, n_views in zip(noisy, clean, (48, 48, 8), strict=True):
        expected = noise_operator(NoiseSpec(n_views), 12, 12)(seen.numpy())
        np.testing.assert_allclose(image.numpy(), expected, atol=1e-4)


def test_the_solver_takes_what_it_is_told_image_by_image(ranged: Config) -> None:
    model = model_of(ranged)
    x = torch.from_numpy(images(3))
    counts = torch.tensor([5, 0, 12])
    with torch.no_grad():
        together = model(x, told=counts, wanted=counts)
        for k, n_views in enumerate(counts.tolist()):
            alone = model(x[k : k + 1], told=counts[k : k + 1], wanted=counts[k : k + 1])
            torch.testing.assert_close(together.image[k], alone.image[0], atol=1e-4, rtol=1e-4)
            if n_views:
                geometry = model(x[k : k + 1], geometry=NoiseSpec(n_views))
                codes = [geometry.codes.content, alone.codes.content]
                for a, b in zip(*codes, strict=True):
                    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_a_model_of_a_range_begins_where_one_of_few_counts_ends(ranged: Config) -> None:
    head = NoiseHead(8, 3, spatial=False)
    compares = NoiseHead(8, 3, spatial=False, compares=True)
    compares.load_state_dict(head.state_dict(), strict=False)
    h = torch.randn(2, 8, 4, 4, generator=torch.manual_seed(0))
    torch.testing.assert_close(head(h).mu, compares(h).mu)
    few = dataclasses.replace(ranged, noise=dataclasses.replace(ranged.noise, views_per_pixel=None))
    assert isinstance(model_of(few), HVAE)
    missing, unknown = model_of(ranged).load_state_dict(model_of(few).state_dict(), strict=False)
    assert {name.split(".")[0] for name in missing} == {"noise_heads", "noise_maker"}
    assert all(name.startswith("noise_maker.") for name in unknown)
