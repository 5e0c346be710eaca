"""The objective: triplet loss, likelihood, what the swap is trained for."""

import dataclasses
from unittest import mock

import numpy as np
import pytest
import torch
from random_models import images, model_of

from snr_ray import configfile as configs
from snr_ray.config import Config, LossConfig
from snr_ray.learning import losses
from snr_ray.learning.batches import Batch, Share, StepNormal
from snr_ray.learning.losses import Likelihood, Objective, Regression, _as_found, code_distances
from snr_ray.network.blocks import Gaussian
from snr_ray.network.unet import UNet


def triplet_loss(codes: torch.Tensor, n_ids: int, form: str, margin: float) -> torch.Tensor:
    return losses.triplet_loss(code_distances(codes, n_ids), form, margin)


def _codes(clean: float, per_id: list[float], spread: float = 0.0) -> torch.Tensor:
    """Noise codes [B (1 + n_ids), 1, 1, 1] of four images: the clean one's, and one per id."""
    rows = [[clean + spread * k, *per_id] for k in range(4)]
    return torch.tensor(rows).flatten()[:, None, None, None]


def test_symmetric_triplet_is_zero_where_ids_are_apart() -> None:
    assert triplet_loss(_codes(0.0, [2.0, 4.0]), 2, "symmetric", 1.0) == 0


def test_symmetric_triplet_pulls_clean_codes_together_and_the_drawn_one_does_not() -> None:
    spread = _codes(-9.0, [2.0, 4.0], spread=0.5)
    assert triplet_loss(spread, 2, "symmetric", 1.0) > 0
    assert triplet_loss(spread, 2, "drawn", 1.0) == 0


def test_collapsed_codes_pay_the_margins() -> None:
    equal = _codes(1.0, [1.0, 1.0])
    assert triplet_loss(equal, 2, "drawn", 0.7) == pytest.approx(0.7)
    assert triplet_loss(equal, 2, "symmetric", 0.7) == pytest.approx(1.4, abs=0.01)


def test_equal_codes_are_pushed_apart_at_once() -> None:
    # A squared distance has no slope where codes are equal; the symmetric form must have one.
    for form, moves in (("drawn", False), ("symmetric", True)):
        codes = _codes(0.0, [1e-4, 2e-4]).requires_grad_()
        (gradient,) = torch.autograd.grad(triplet_loss(codes, 2, form, 1.0), codes)
        assert (gradient.abs().max() > 1e-2) == moves, form


def _objective_and_batch(config: Config) -> tuple[Objective, Batch]:
    n_ids = len(config.noise.n_views)
    model = model_of(config).train()
    objective = (Regression if isinstance(model, UNet) else Objective)(model, config.loss, n_ids)
    clean = torch.from_numpy(images(4))
    offsets = 0.5 * (-1.0) ** torch.arange(n_ids)
    return objective, Batch(clean, clean[:, None] + offsets[:, None, None, None])


def _normal() -> StepNormal:
    return StepNormal(0, 1, Share(), torch.device("cpu"))


@pytest.mark.parametrize("preset", ["seed", "contrastive", "paired", "physics", "unet"])
def test_objective_reaches_every_weight(tiny: Config, preset: str) -> None:
    # A weight without gradient would stop data-parallel training.
    config = configs.load(["smoke", preset])
    objective, batch = _objective_and_batch(config)
    objective(batch, _normal(), 1.0)["loss"].backward()
    for name, p in objective.named_parameters():
        assert not p.requires_grad or (p.grad is not None and p.grad.isfinite().all()), name


def test_swap_training_aims_at_the_version_that_the_donor_decides(tiny: Config) -> None:
    # With a model that returns its input, the reconstruction error of swapped images is the
    # distance between clean and noisy ones, 0.5 in each pixel, and that of others zero.
    errors = {}
    for share in (0.0, 1.0):
        changes = {"loss.swap_probability": share, "loss.injection": 1.0}
        changes |= {"loss.grain": 0.0, "loss.stored": 0.0}
        fixed = {"loss.sigma_learned": False, "loss.sigma_own": 1.0}
        config = configs.replace(tiny, changes | fixed)
        objective, batch = _objective_and_batch(config)
        forward = objective.model.forward

        def identity(x, *args, forward=forward, **options):  # type: ignore[no-untyped-def]
            result = forward(x, *args, **options)
            result.image = x
            return result

        objective.model.forward = identity  # type: ignore[method-assign]
        errors[share] = float(objective(batch, _normal(), 1.0)["recon"])
    sigma = tiny.loss.sigma
    floor = np.log(sigma)
    difference = 0.5**2 / (2 * sigma**2)
    assert errors[0.0] == pytest.approx(floor, rel=1e-4)
    assert errors[1.0] == pytest.approx(floor + difference, rel=1e-4)


def test_the_slope_of_an_image_is_that_of_its_psnr(tiny: Config) -> None:
    config = configs.replace(tiny, {"loss.sigma": 0.1, "loss.sigma_own": 5.0})
    likelihood = Likelihood(config.loss, 2)
    target = torch.zeros(4, 1, 8, 8)
    image = target + torch.tensor([0.05, 0.4, 0.005, 4.0]).reshape(4, 1, 1, 1)
    image.requires_grad_()
    ids = torch.zeros(4, dtype=torch.int64)
    likelihood(image, target, ids, ids).sum().backward()
    assert image.grad is not None
    slope = image.grad.sum((1, 2, 3))
    # d/dx of log RMSE is 1 / x; beyond 5 x 0.1 and below 0.1 / 5 sigma goes no further.
    expected = [1 / 0.05, 1 / 0.4, 0.005 / 0.02**2, 4.0 / 0.5**2]
    np.testing.assert_allclose(slope, expected, rtol=1e-4)


def test_the_sigma_of_a_pair_learns_its_root_mean_square_error(tiny: Config) -> None:
    likelihood = Likelihood(configs.replace(tiny, {"loss.sigma_ratio": 100.0}).loss, 1)
    image, ids = torch.full((4, 1, 8, 8), 0.2), torch.zeros(4, dtype=torch.int64)
    optimizer = torch.optim.Adam(likelihood.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        likelihood(image, torch.zeros_like(image), ids, ids).sum().backward()
        optimizer.step()
    assert likelihood.log_sigma[0, 0].exp().item() == pytest.approx(0.2, rel=0.02)


def test_a_sigma_at_its_floor_rises_again(tiny: Config) -> None:
    likelihood = Likelihood(tiny.loss, 1)
    ids = torch.zeros(4, dtype=torch.int64)
    optimizer = torch.optim.SGD(likelihood.parameters(), lr=0.1)
    for error, expected in ((0.0, losses.SIGMA_FLOOR), (0.2, 0.2)):
        for _ in range(1000):
            optimizer.zero_grad()
            image = torch.full((4, 1, 8, 8), error)
            likelihood(image, torch.zeros_like(image), ids, ids).mean().backward()
            torch.nn.utils.clip_grad_norm_(likelihood.parameters(), 1.0)
            optimizer.step()
            likelihood.keep_in_range()
        assert likelihood.sigma()[0, 0].item() == pytest.approx(expected, rel=1e-3)


def test_injection_weighs_clean_images_that_become_noisy(tiny: Config) -> None:
    recon = {}
    for weight in (0.0, 1.0, 2.0):
        changes = {"loss.injection": weight, "loss.swap_probability": 1.0}
        objective, batch = _objective_and_batch(configs.replace(tiny, changes))
        recon[weight] = float(objective(batch, _normal(), 1.0)["recon"])
    assert recon[2.0] - recon[1.0] == pytest.approx(recon[1.0] - recon[0.0], rel=1e-4)
    assert recon[1.0] != recon[0.0]


@pytest.mark.parametrize("n_ids", [1, 2, 3, 5, 7, 12])
def test_any_number_below_one_is_a_noisy_id(n_ids: int) -> None:
    edge = 1 - 2.0**-24  # the largest that float32 holds
    drawn = torch.tensor([0.0, 0.5 / n_ids, 1 - 0.5 / n_ids, edge])
    assert losses._any_id(drawn, n_ids).tolist() == [1, 1, n_ids, n_ids]


def test_free_bits_only_charge_what_exceeds_them() -> None:
    losses = []
    for free in (0.0, 1e9):
        config = configs.load(["smoke", "network"], [f"loss.free_bits={free}", "loss.triplet=0",
                                                     "loss.content_kl=0"])  # fmt: skip
        objective, batch = _objective_and_batch(config)
        parts = objective(batch, _normal(), 1.0)
        losses.append((parts["loss"].item(), parts["recon"].item()))
    assert losses[1][0] == pytest.approx(losses[1][1])
    assert losses[0][0] > losses[0][1]


def test_sigma_stays_within_its_ratio_of_the_pairs_that_occur(tiny: Config) -> None:
    objective, _ = _objective_and_batch(tiny)
    likelihood = objective.likelihood
    with torch.no_grad():
        likelihood.log_sigma.fill_(-2.0)
        likelihood.log_sigma[0, 0], likelihood.log_sigma[2, 0] = -20.0, 3.0
        likelihood.log_sigma[1, 2] = -30.0  # no image is seen under id 1 and wanted under id 2
    sigma = likelihood.sigma().detach()
    assert sigma[0, 0] == pytest.approx(0.01)
    assert sigma.max() == pytest.approx(0.01 * tiny.loss.sigma_ratio)
    with torch.no_grad():
        likelihood.log_sigma[0, 0] = -3.0
    assert likelihood.sigma()[2, 0].item() == pytest.approx(np.exp(-3.0) * tiny.loss.sigma_ratio)


def test_noisy_targets_keep_the_sigma_of_their_pair(tiny: Config) -> None:
    config = configs.replace(tiny, {"loss.sigma": 0.1, "loss.sigma_own": 5.0})
    likelihood = Likelihood(config.loss, 1)
    image = torch.full((2, 1, 8, 8), 0.05, requires_grad=True)
    wanted = torch.tensor([0, 1])
    likelihood(image, torch.zeros_like(image), torch.zeros_like(wanted), wanted).sum().backward()
    assert image.grad is not None
    np.testing.assert_allclose(image.grad.sum((1, 2, 3)), [1 / 0.05, 0.05 / 0.1**2], rtol=1e-4)


def test_clean_pixels_at_the_bounds_may_be_passed(tiny: Config) -> None:
    target = torch.tensor([0.0, 1.0, 0.5]).reshape(1, 1, 1, 3).repeat(4, 1, 1, 1)
    image = target + torch.tensor([-0.2, 0.2, -0.2, 0.2]).reshape(4, 1, 1, 1)
    image.requires_grad_(True)
    wanted = torch.tensor([0, 0, 1, 1])

    def moved(bounds: bool) -> torch.Tensor:
        config = configs.replace(tiny, {"loss.bounds": bounds})
        likelihood = Likelihood(config.loss, 1)
        loss = likelihood(image, target, torch.zeros_like(wanted), wanted).sum()
        return torch.autograd.grad(loss, image)[0].flatten(1) != 0

    everywhere = torch.ones(4, 3, dtype=torch.bool)
    assert torch.equal(moved(False), everywhere)
    expected = everywhere.clone()
    expected[0, 0] = expected[1, 1] = False  # below 0 and above 1, of images to be clean
    assert torch.equal(moved(True), expected)


def test_noisy_images_are_seen_as_files_hold_them() -> None:
    ids = torch.arange(800) % 4
    x = 2 * torch.from_numpy(images(1)).expand(800, 1, 16, 16) - 0.5
    exact = LossConfig(grain=0.0, stored=0.0)
    assert _as_found(x, ids, exact, _normal()) is x

    grainy = _as_found(x, ids, dataclasses.replace(exact, grain=0.02), _normal())
    sigma = (grainy - x).flatten(1).std(1)
    assert not sigma[ids == 0].any()
    chosen = sigma[(ids > 0) & (sigma > 0)]
    assert len(chosen) == pytest.approx(300, abs=40)
    assert float(chosen.max()) == pytest.approx(0.02, rel=0.2)
    assert float(chosen.mean()) == pytest.approx(0.01, rel=0.15)

    found = _as_found(x, ids, dataclasses.replace(exact, stored=0.5), _normal())
    changed = (found != x).flatten(1).any(1)
    assert not changed[ids == 0].any()
    assert int(changed.sum()) == pytest.approx(300, abs=40)
    levels = 255 * found[changed]
    assert (float(levels.min()), float(levels.max())) == (0, 255)
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)


def test_what_is_seen_does_not_depend_on_the_number_of_workers() -> None:
    ids, x, config = torch.arange(8) % 4, torch.from_numpy(images(8)), LossConfig()
    parts = [
        _as_found(x[k * 4 : k * 4 + 4], ids[k * 4 : k * 4 + 4], config,
                  StepNormal(0, 1, Share(k, 2), torch.device("cpu")))
        for k in range(2)
    ]  # fmt: skip
    torch.testing.assert_close(torch.cat(parts), _as_found(x, ids, config, _normal()))


@pytest.mark.parametrize("views", [None, [0.2, 0.9]])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0])
def test_the_loss_is_the_weighted_sum_of_its_parts(
    tiny: Config, views: list[float] | None, warmup: float
) -> None:
    weights = {"beta": 0.02, "content_kl": 0.03, "triplet": 0.7}
    changes = {f"loss.{name}": weight for name, weight in weights.items()}
    config = configs.replace(tiny, {"noise.views_per_pixel": views, **changes})
    objective, batch = _objective_and_batch(config)
    if views:
        batch.n_views = torch.tensor([[12, 6], [12, 6], [9, 5], [9, 5]])
    found = objective(batch, _normal(), warmup)
    parts = {name: float(part.detach()) for name, part in found.items()}
    nats = parts["kl_content"] + parts["kl_noise"]
    pixels = warmup * (0.02 * nats + 0.03 * parts["content_kl"]) / 16**2
    reading = 0.1 * parts["noise_id"] + 0.6 * parts.get("views_error", 0.0)
    expected = parts["recon"] + pixels + 0.7 * parts["triplet"] + reading
    assert parts["loss"] == pytest.approx(expected, rel=1e-5)
    assert min(nats, parts["content_kl"], parts["triplet"], parts["noise_id"]) > 0
    assert ("views_error" in parts) == bool(views)


def test_the_content_pull_is_the_mean_of_both_divergences_from_the_clean_version() -> None:
    from torch.distributions import Normal, kl_divergence

    q = Gaussian(*torch.randn(2, 4 * 3, 5, generator=torch.manual_seed(0)))
    each = Normal(q.mu, (q.logvar / 2).exp())
    for place, found in enumerate(losses._symmetric_kl(q, 2)):
        row, version = divmod(place, 2)
        clean, noisy = (
            Normal(each.loc[k], each.scale[k]) for k in (3 * row, 3 * row + 1 + version)
        )
        both = kl_divergence(clean, noisy) + kl_divergence(noisy, clean)
        torch.testing.assert_close(found, both.sum() / 2)


@pytest.mark.parametrize("swapped", [0.0, 1.0])
def test_each_image_is_told_its_own_count_and_gets_the_noise_of_its_target(
    tiny: Config, swapped: float
) -> None:
    changes = {"noise.views_per_pixel": [0.2, 0.9], "loss.swap_probability": swapped}
    config = configs.replace(tiny, changes | {"loss.grain": 0.0, "loss.stored": 0.0})
    model = model_of(config)
    objective = Objective(model, config.loss, 2, told=0.7)
    clean = torch.from_numpy(images(60))
    n_views = torch.randint(4, 14, (30, 2), generator=torch.manual_seed(0)).repeat_interleave(2, 0)
    maker = model.noise_maker
    with (
        mock.patch.object(model, "forward", side_effect=model.forward) as forward,
        mock.patch.object(maker, "loss", side_effect=maker.loss) as read,  # type: ignore[union-attr]
    ):
        objective(Batch(clean, clean[:, None].repeat(1, 2, 1, 1, 1), n_views), _normal(), 1.0)
    given = forward.call_args.kwargs
    counts = torch.cat([torch.zeros(60, 1, dtype=torch.int64), n_views], dim=1).flatten()
    told, donors, wanted = given["told"], given["donors"], given["wanted"]
    assert torch.equal(told[told >= 0], counts[told >= 0])
    assert float((told >= 0).float().mean()) == pytest.approx(0.7, abs=0.1)
    rows = torch.arange(180)
    assert torch.equal(counts[donors], wanted)  # partners have the same
    own, used = (call.args[1] for call in read.call_args_list)
    assert torch.equal(own, counts)
    assert torch.equal(used, wanted)
    if not swapped:
        assert torch.equal(donors, rows)
        return
    assert torch.equal(donors // 3, (rows // 3) ^ 1)
    assert not donors[rows % 3 > 0].remainder(3).any()  # noisy ones get clean codes
    assert set((donors[rows % 3 == 0] % 3).tolist()) == {1, 2}


def test_what_knows_the_geometry_is_sometimes_not_told(tiny: Config) -> None:
    config = configs.replace(tiny, {"model.physics": True})
    model, clean = model_of(config), torch.from_numpy(images(100))
    objective = Objective(model, config.loss, 2)
    with mock.patch.object(model, "forward", side_effect=model.forward) as forward:
        objective(Batch(clean, clean[:, None].repeat(1, 2, 1, 1, 1)), _normal(), 1.0)
    ids, known = torch.arange(300) % 3, forward.call_args.kwargs["noise_ids"]
    withheld = (known != ids)[ids > 0]
    assert not known[known != ids].any()
    assert float(withheld.float().mean()) == pytest.approx(0.125, abs=0.06)


def test_distances_are_mean_squares_between_versions_level_by_level() -> None:
    mu = torch.randn(4 * 3, 5, 1, 1, generator=torch.manual_seed(0))
    found, code = code_distances(mu, 2, (2, 3)), mu.reshape(4, 3, 5)
    for level, dims in enumerate((slice(0, 2), slice(2, 5))):
        for image in range(4):
            own, partner = code[image, :, dims], code[image ^ 1, :, dims]
            same, clean = (own - partner).square().mean(1), (own[1:] - own[:1]).square().mean(1)
            torch.testing.assert_close(found.same[level, image], same)
            torch.testing.assert_close(found.clean[level, image], clean)
            noisy = (own[1:] - own[1:].flip(0)).square().mean(1)
            torch.testing.assert_close(found.noisy[level, image], noisy)


def test_the_baseline_sees_files_too_each_with_its_own_id(tiny: Config) -> None:
    changes = {"model.kind": "unet", "loss.grain": 0.05, "loss.stored": 0.5}
    config = configs.replace(tiny, changes)
    objective, batch = _objective_and_batch(config)
    model = objective.model
    with mock.patch.object(model, "forward", side_effect=model.forward) as forward:
        objective(batch, _normal(), 1.0)
    seen, ids = forward.call_args.args
    assert ids.tolist() == [1, 2] * 4
    assert batch.noisy is not None
    expected = _as_found(batch.noisy.flatten(0, 1), ids, config.loss, _normal())
    torch.testing.assert_close(seen, expected, atol=0, rtol=0)
    assert not torch.equal(seen, batch.noisy.flatten(0, 1))
