"""The model: shapes at any size, codes as the only way to the image, the swap."""

from unittest import mock

import numpy as np
import pytest
import torch
from random_models import images, model_of
from torch import nn

from snr_ray import configfile as configs
from snr_ray.config import Config
from snr_ray.errors import InputError
from snr_ray.learning.build import build_model
from snr_ray.network.blocks import (
    PIXEL_OFFSET,
    Around,
    BottomUp,
    Gaussian,
    PixelLevel,
    Up,
    kl,
    standard,
)
from snr_ray.network.hvae import HVAE, Codes
from snr_ray.network.noisemaker import Mixed, NoiseMaker
from snr_ray.network.swap import NoiseCodes, collect, noise_code, swap
from snr_ray.network.unet import UNet, regress
from snr_ray.noise.lmmse import ImagePrior, Lmmse
from snr_ray.noise.operator import NoiseSpec, noise_operator, noise_specs


def only(maker: NoiseMaker, noise_id: int) -> None:
    """Let every noise code stand for one noise id."""
    with torch.no_grad():
        maker.logits.weight.zero_()
        maker.logits.bias.fill_(-100.0)
        maker.logits.bias[noise_id] = 0.0


@pytest.fixture(params=["operator", "operator, around", "network, vector", "network, map"])
def any_code(request: pytest.FixtureRequest, tiny: Config) -> Config:
    decoder, _, code = request.param.partition(", ")
    if code == "around":
        return configs.replace(tiny, {"model.step_channels": [6, 8]})
    return configs.replace(tiny, {"model.decoder": decoder, "model.noise_code": code or "vector"})


@pytest.mark.parametrize("size", [(16, 16), (17, 23), (28, 28), (9, 40), (4, 5)])
def test_any_size_comes_back_at_its_size(any_code: Config, size: tuple[int, int]) -> None:
    x = images(2, *size)
    assert swap(model_of(any_code), x, None).shape == x.shape


@pytest.mark.parametrize("size", [(1, 1), (3, 2)])
def test_images_too_small_for_the_operator_can_be_cleaned(
    any_code: Config, size: tuple[int, int]
) -> None:
    model, x = model_of(any_code), images(2, *size)
    if model.noise_maker is not None:
        only(model.noise_maker, 0)
    assert swap(model, x, None).shape == x.shape


@pytest.mark.parametrize("channels", [1, 3])
def test_no_images_come_back_as_none(any_code: Config, channels: int) -> None:
    x = np.zeros((0, channels, 16, 16), np.float32)
    assert swap(model_of(any_code), x, None).shape == x.shape


def test_rgb_model_takes_three_channels(tiny: Config) -> None:
    config = configs.replace(tiny, {"images.channels": 3})
    x = images(2, 16, 16, channels=3)
    assert swap(model_of(config), x, None).shape == x.shape


def test_decode_of_encode_is_the_reconstruction(any_code: Config) -> None:
    model, x = model_of(any_code), torch.from_numpy(images(3, 15, 18))
    with torch.inference_mode():
        torch.testing.assert_close(model.decode(model.encode(x)), model(x).image)


def test_swap_with_own_code_is_the_reconstruction(any_code: Config) -> None:
    model, x = model_of(any_code), images(1)
    np.testing.assert_allclose(
        swap(model, x, noise_code(model, x)), swap(model, x, None), atol=1e-5
    )


def test_all_codes_of_another_image_give_the_other_image(any_code: Config) -> None:
    # Authority: nothing but codes reaches the decoder, so image i's place cannot matter.
    model, x = model_of(any_code), torch.from_numpy(images(4))
    with torch.inference_mode():
        codes = model.encode(x)
        exchanged = Codes([c.flip(0) for c in codes.content], [c.flip(0) for c in codes.noise],
                          codes.size)  # fmt: skip
        torch.testing.assert_close(model.decode(exchanged), model.decode(codes).flip(0))


def test_each_code_changes_the_image(any_code: Config) -> None:
    model, x = model_of(any_code), torch.from_numpy(images(2))
    with torch.inference_mode():
        codes = model.encode(x)
        image = model.decode(codes)
        for part in ("content", "noise"):
            for level in range(2):
                changed = model.encode(x)
                getattr(changed, part)[level] += 1
                assert (model.decode(changed) - image).abs().max() > 1e-4, (part, level)


def test_noise_code_does_not_depend_on_the_other_images(any_code: Config) -> None:
    model, x = model_of(any_code), images(4)
    together = collect(model, [x, x]).donors
    alone = collect(model, [x[2:3], x[2:3]]).donors
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a[0, 2], b[0, 0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_content_is_inferred_as_it_was_in_training(tiny: Config, share: float) -> None:
    changes = {"model.decoder": "network", "loss.swap_probability": share}
    model = model_of(configs.replace(tiny, changes))
    x, donor = images(3), [code + 2 for code in noise_code(model, images(1, 20, 16))]
    with torch.inference_mode():
        seen = torch.from_numpy(x)
        one_pass = model(seen, noise=donor).image
        codes = model.encode(seen)
        codes.noise = donor
        afterwards = model.decode(codes)
    assert (one_pass - afterwards).abs().max() > 1e-3
    expected = one_pass if share else afterwards
    torch.testing.assert_close(torch.from_numpy(swap(model, x, donor)), expected)


def test_a_decoder_with_the_operator_makes_the_noise_of_the_clean_image(tiny: Config) -> None:
    model = model_of(configs.replace(tiny, {"images.channels": 3}))
    assert model.noise_maker is not None
    with torch.inference_mode():
        codes = model.encode(torch.from_numpy(images(3, 17, 20, channels=3)))
        only(model.noise_maker, 0)
        clean = model.decode(codes).numpy()
        for noise_id, spec in enumerate(noise_specs(tiny.noise), start=1):
            only(model.noise_maker, noise_id)
            expected = noise_operator(spec, 17, 20)(clean)
            np.testing.assert_allclose(model.decode(codes).numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("told", [False, True])
def test_the_encoder_sees_what_its_guess_leaves_unexplained(tiny: Config, told: bool) -> None:
    model, clean = model_of(tiny), images(3, 17, 20)
    finest = model.levels[0]
    assert isinstance(finest, PixelLevel)
    assert model.noise_maker is not None
    only(model.noise_maker, 0 if told else 2)
    spec = NoiseSpec(9) if told else noise_specs(tiny.noise)[1]
    noise, seen = noise_operator(spec, 17, 20), list[torch.Tensor]()
    for step in finest.steps:
        step.see.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    swap(model, noise(clean), None, geometry=spec if told else None)
    assert len(seen) == tiny.model.unrolled > 0
    for news in seen:
        guess, unexplained = (part.numpy() for part in news.chunk(2, dim=1))
        expected = noise(clean) - noise(guess + PIXEL_OFFSET)
        np.testing.assert_allclose(unexplained, expected, atol=1e-3)


def test_what_a_step_sees_around_counts_at_full_resolution() -> None:
    around, h = Around(5, [6, 8]), torch.randn(2, 5, 33, 22)
    assert not around(h).any()  # a trained step may be given one
    with torch.no_grad():
        around.up[0].weight.normal_()
        for shape in ((33, 22), (1, 1), (2, 7)):
            assert around(h[..., : shape[0], : shape[1]]).shape[-2:] == shape
        far = h.clone()
        far[:, :, 20, 11] += 1
        reached = (around(far) - around(h)).abs().sum((0, 1)) > 1e-6
    rows, columns = torch.nonzero(reached, as_tuple=True)
    assert int(rows.max() - rows.min()) > 8  # a block at full resolution reaches 5 pixels
    assert int(columns.max() - columns.min()) > 8


def test_noise_is_made_of_guesses_within_the_bounds_of_clean_images(tiny: Config) -> None:
    made: list[torch.Tensor] = []
    make = Mixed.__call__

    def watched(noise: Mixed, clean: torch.Tensor) -> torch.Tensor:
        made.append(clean)
        return make(noise, clean)

    for bounded in (False, True):
        model = model_of(configs.replace(tiny, {"model.bounded": bounded}))
        with mock.patch.object(Mixed, "__call__", watched):
            swap(model, 3 * images(2) - 1, None)
    free, cut = made[: len(made) // 2], made[len(made) // 2 :]
    assert all(guess.min() < 0 and guess.max() > 1 for guess in free)
    for guess in cut[: tiny.model.unrolled]:
        assert (float(guess.min()), float(guess.max())) == (0, 1)
    assert cut[-1].min() < 0  # of the decoder, whose answer may leave them


def test_pixels_that_a_file_has_cut_are_bounds(tiny: Config) -> None:
    model, guesses = model_of(tiny), np.float32([-0.5, 0.5, 1.5])
    image = torch.tensor([0.0, 0.25, 1.0])[:, None, None, None].expand(3, 1, 3, 3)
    seen = BottomUp([], image, image, image, noisy=lambda guess: guess)
    step, given = model.levels[0].steps[0], list[torch.Tensor]()
    step.guess = nn.Conv2d(4, 1, 1)
    nn.init.zeros_(step.guess.weight)
    step.see.register_forward_pre_hook(lambda _, news: given.append(news[0][:, 1]))
    for guess in guesses:
        nn.init.constant_(step.guess.bias, float(guess))
        step(torch.zeros(3, 4, 3, 3), torch.zeros(3, 1, 3, 3), seen)
    left = torch.stack([part[:, 0, 0] for part in given]).detach().numpy()
    np.testing.assert_allclose(left, [[0, 0.75, 1.5], [-0.5, -0.25, 0.5], [-1.5, -1.25, 0]])


def test_content_does_not_depend_on_the_donor_where_the_operator_is_known(tiny: Config) -> None:
    model, x = model_of(tiny), torch.from_numpy(images(3))
    donor = [code + 2 for code in noise_code(model, images(1))]
    with torch.inference_mode():
        own, swapped = model.encode(x), model.encode(x, noise=donor)
    for a, b in zip(own.content, swapped.content, strict=True):
        torch.testing.assert_close(a, b)


def test_pixels_take_a_straight_way_through_the_finest_code(tiny: Config) -> None:
    # What the network adds is zero here, so each pixel comes back from the code alone.
    model, x = build_model(tiny).eval(), torch.from_numpy(images(2, 15, 17))
    assert model.noise_maker is not None
    only(model.noise_maker, 0)
    with torch.inference_mode():
        guesses = [step.guess for step in model.levels[0].steps]
        for weights in (model.levels[0].code, model.head[-1], *guesses):
            weights.weight.zero_()
            weights.bias.zero_()
        torch.testing.assert_close(model(x).image, x)


def test_donor_of_another_size_fits(any_code: Config) -> None:
    model = model_of(any_code)
    donor = noise_code(model, images(1, 30, 25))
    assert swap(model, images(2, 17, 16), donor).shape == (2, 1, 17, 16)


def test_kl_of_equal_gaussians_is_zero_and_others_positive() -> None:
    generator = torch.Generator().manual_seed(0)
    q, p = (Gaussian(*torch.randn(2, 6, 3, 4, 4, generator=generator)) for _ in range(2))
    torch.testing.assert_close(kl(q, q), torch.zeros(6))
    assert (kl(q, p) > 0).all()


def test_kl_equals_torch_distributions() -> None:
    from torch.distributions import Normal, kl_divergence

    generator = torch.Generator().manual_seed(1)
    q = Gaussian(*torch.randn(2, 5, 7, generator=generator))
    expected = kl_divergence(Normal(q.mu, (q.logvar / 2).exp()), Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(kl(q, standard(q)), expected)


def test_finest_content_from_the_prior_does_not_see_the_image(tiny: Config) -> None:
    model, x = model_of(tiny), images(4)
    assert not np.allclose(swap(model, x, None), swap(model, x, None, prior_levels=1))
    every = len(tiny.model.channels)
    code = noise_code(model, x)
    alike = swap(model, x, code, prior_levels=every)
    np.testing.assert_allclose(alike, np.repeat(alike[:1], 4, 0), atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
def test_finest_level_has_the_resolution_that_was_asked_for(tiny: Config, stride: int) -> None:
    model = model_of(configs.replace(tiny, {"model.finest_stride": stride}))
    with torch.inference_mode():
        codes = model.encode(torch.from_numpy(images(2, 16, 24)))
    assert codes.content[0].shape[-2:] == (16 // stride, 24 // stride)


def _with_inverse(config: Config) -> tuple[HVAE, np.ndarray]:
    config = configs.replace(config, {"model.physics": True})
    model, clean = model_of(config), images(300)
    noise = [noise_operator(spec, 16, 16) for spec in noise_specs(config.noise)]
    assert model.stem.inverse is not None
    model.stem.inverse.fit(clean, noise)
    return model, clean


def test_linear_inverse_is_the_baseline_for_every_id(tiny: Config) -> None:
    model, clean = _with_inverse(tiny)
    inverse, ids = model.stem.inverse, np.array([0, 1, 2])
    assert inverse is not None
    noise = [noise_operator(spec, 16, 16) for spec in noise_specs(tiny.noise)]
    x = np.stack([clean[0], *(operator(clean[0]) for operator in noise)])
    estimate = inverse(torch.from_numpy(x), torch.from_numpy(ids)).numpy()
    np.testing.assert_array_equal(estimate[0], clean[0])
    for k, operator in enumerate(noise, start=1):
        expected = Lmmse(ImagePrior(clean), operator)(x[k])
        np.testing.assert_allclose(estimate[k], expected, atol=1e-3)


def test_physics_model_uses_the_id_and_only_codes_reach_the_decoder(tiny: Config) -> None:
    model, clean = _with_inverse(tiny)
    ids = np.array([1, 1, 2, 2])
    x = torch.from_numpy(clean[:4])
    with torch.inference_mode():
        known = model(x, noise_ids=torch.from_numpy(ids))
        assert not torch.allclose(known.image, model(x).image)
        codes = Codes([c.flip(0) for c in known.codes.content],
                      [c.flip(0) for c in known.codes.noise], known.codes.size)  # fmt: skip
        torch.testing.assert_close(model.decode(codes), known.image.flip(0))


def test_physics_model_refuses_other_sizes(tiny: Config) -> None:
    model, _ = _with_inverse(tiny)
    with pytest.raises(InputError, match=r"size it was trained on \(16x16\), but got 20x16"):
        swap(model, images(1, 20, 16), None)


def test_detect_finds_the_class_of_codes() -> None:
    rng = np.random.default_rng(0)
    means = rng.normal(size=(3, 1, 5)) * 3
    donors = torch.from_numpy(means + rng.normal(size=(3, 64, 5))).float()
    codes = NoiseCodes([donors[..., :2, None, None], donors[..., 2:, None, None]])
    ids = rng.integers(0, 3, 200)
    fresh = torch.from_numpy(means[ids, 0] + rng.normal(size=(200, 5))).float()[..., None, None]
    assert (codes.detect([fresh[:, :2], fresh[:, 2:]]) == ids).mean() > 0.95


def test_unet_keeps_the_size_and_corrects_its_input(tiny: Config) -> None:
    unet = build_model(configs.replace(tiny, {"model.kind": "unet"})).eval()
    assert isinstance(unet, UNet)
    x = images(2, 17, 23)
    assert regress(unet, x, np.array([1, 2])).shape == x.shape
    with torch.no_grad():
        unet.head.weight.zero_()
        unet.head.bias.zero_()  # type: ignore[union-attr]
    np.testing.assert_array_equal(regress(unet, x, np.array([1, 2])), x)


@pytest.mark.parametrize("preset", ["notmnist", "cifar10", "places64"])
def test_unet_has_as_many_weights_as_the_hvae(preset: str) -> None:
    def count(*names: str) -> int:
        return sum(p.numel() for p in build_model(configs.load([*names])).parameters())

    assert count(preset, "unet") == pytest.approx(count(preset), rel=0.1)


@pytest.mark.parametrize("upsampling", ["shuffle", "nearest"])
def test_up_gives_the_size_asked_for(upsampling: str) -> None:
    up = Up(6, 4, upsampling)
    for size in ((8, 6), (7, 5), (8, 5)):
        assert up.at(torch.ones(2, 6, 4, 3), torch.Size(size)).shape == (2, 4, *size)
    same = Up(6, 4, upsampling, stride=1)
    assert same.at(torch.ones(2, 6, 4, 3), torch.Size((4, 3))).shape == (2, 4, 4, 3)


def test_shuffle_tells_the_four_finer_pixels_apart() -> None:
    finer = {
        how: Up(6, 4, how).at(torch.ones(1, 6, 1, 1), torch.Size((2, 2))).flatten(2)
        for how in ("shuffle", "nearest")
    }
    assert (finer["nearest"].std(2) == 0).all()
    assert (finer["shuffle"].std(2) > 0.01).all()
