"""Noise made by the known operator: shares, gradients, what is not made."""

import numpy as np
import pytest
import torch

from snr_ray.network.noisemaker import Alike, Noise, NoiseMaker
from snr_ray.network.viewcount import ViewCountMaker
from snr_ray.noise.operator import NoiseSpec, noise_operator
from snr_ray.noise.viewrange import ViewRange

SPECS = [NoiseSpec(8, "hann", 120.0), NoiseSpec(5, "hann", 120.0)]


def maker_of(shares: list[float], noise: list[NoiseSpec] = SPECS) -> NoiseMaker:
    """A maker whose shares do not depend on the code."""
    maker = NoiseMaker(noise, 2)
    with torch.no_grad():
        maker.logits.bias.copy_(torch.tensor(shares).clamp(min=1e-30).log())
    return maker


def clean_and_codes(n: int = 3, *size: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    shape = (n, 2, *(size or (12, 15)))
    x = np.random.default_rng(n).random(shape, dtype=np.float32)
    return torch.from_numpy(x), [torch.zeros(n, 1, 1, 1), torch.zeros(n, 1, 4, 4)]


def made(maker: NoiseMaker, clean: torch.Tensor, codes: list[torch.Tensor]) -> torch.Tensor:
    return maker.of(maker.shares(codes), max(clean.shape[2:]))(clean)


def test_the_image_is_the_mix_of_what_each_noise_id_makes() -> None:
    clean, codes = clean_and_codes()
    noisy = [noise_operator(spec, 12, 15)(clean.numpy()) for spec in SPECS]
    expected = 0.5 * clean.numpy() + 0.3 * noisy[0] + 0.2 * noisy[1]
    image = made(maker_of([0.5, 0.3, 0.2]), clean, codes).detach().numpy()
    np.testing.assert_allclose(image, expected, atol=1e-4)


def test_every_image_gets_the_noise_of_its_own_code() -> None:
    clean, _ = clean_and_codes(2)
    maker = NoiseMaker(SPECS, 1)
    with torch.no_grad():
        maker.logits.weight.copy_(torch.tensor([[-30.0], [30.0], [0.0]]))
    codes = [torch.tensor([-1.0, 1.0])[:, None, None, None]]
    image = made(maker, clean, codes).detach().numpy()
    np.testing.assert_allclose(image[0], clean[0].numpy(), atol=1e-6)
    expected = noise_operator(SPECS[0], 12, 15)(clean[1].numpy())
    np.testing.assert_allclose(image[1], expected, atol=1e-4)


def test_negligible_shares_are_not_made() -> None:
    # The operator takes no image below 4 pixels: it would say so if it were asked for.
    clean, codes = clean_and_codes(3, 2, 2)
    maker = maker_of([0.9991, 0.0005, 0.0004])
    torch.testing.assert_close(made(maker, clean, codes), clean)


@pytest.mark.parametrize("side", [4, 5, 7])
def test_small_images_get_the_most_views_that_they_can_hold(side: int) -> None:
    clean, codes = clean_and_codes(2, side, side - 1 if side > 4 else 4)
    maker = maker_of([0.0, 1.0, 0.0], [NoiseSpec(40), NoiseSpec(20)])
    spec = NoiseSpec(min(40, 4 * side))
    expected = noise_operator(spec, *clean.shape[2:])(clean.numpy())
    np.testing.assert_allclose(made(maker, clean, codes).detach().numpy(), expected, atol=1e-4)
    assert maker.counts(maker.shares(codes), side).tolist() == [spec.n_views] * 2


def test_photon_noise_has_its_mean() -> None:
    clean, codes = clean_and_codes()
    maker = maker_of([0.0, 1.0], [NoiseSpec(8, photons=50)])
    noisy = made(maker, clean, codes).detach().numpy()
    np.testing.assert_allclose(
        noisy, noise_operator(NoiseSpec(8), 12, 15)(clean.numpy()), atol=1e-4
    )


@pytest.mark.parametrize("shares", [[0.0, 1.0, 0.0], [0.4, 0.0, 0.6], [0.2, 0.5, 0.3]])
def test_gradients_and_adjoint_are_those_of_the_linear_map(shares: list[float]) -> None:
    clean, codes = clean_and_codes(2)
    clean.requires_grad_()
    maker, way = maker_of(shares), torch.randn(clean.shape, generator=torch.manual_seed(0))
    noise = maker.of(maker.shares(codes).detach(), 15)
    (gradient,) = torch.autograd.grad((noise(clean) * way).sum(), clean)
    step = torch.randn(clean.shape, generator=torch.manual_seed(1))
    with torch.no_grad():  # affine, so a difference is exact
        difference = ((noise(clean + step) - noise(clean)) * way).sum()
    assert float((gradient * step).sum()) == pytest.approx(float(difference), rel=1e-3)
    torch.testing.assert_close(noise.adjoint(way), gradient)


def test_the_adjoint_of_one_geometry_is_that_of_the_operator() -> None:
    noise = Alike(NoiseSpec(12))
    x, y = torch.randn(2, 3, 1, 24, 24, generator=torch.manual_seed(0))
    there, back = (noise(x) * y).sum((1, 2, 3)), (x * noise.adjoint(y)).sum((1, 2, 3))
    torch.testing.assert_close(there, back, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ranged", [False, True])
def test_noise_is_read_and_made_in_float32_where_the_network_is_in_bfloat16(ranged: bool) -> None:
    noise = ViewCountMaker(ViewRange(0.2, 0.9), 6) if ranged else NoiseMaker(SPECS, 6)
    generator = torch.manual_seed(0)
    with torch.no_grad():
        for weights in noise.parameters():
            weights.normal_(generator=generator)
        codes = [torch.randn(4, 3, 1, 1, generator=generator) for _ in range(2)]
        clean = torch.rand(4, 1, 16, 12, generator=generator).bfloat16()
        read = noise.shares(codes)
        expected = [read, *both_ways(noise.of(read, 16), clean.float())]
        with torch.autocast("cpu", torch.bfloat16):
            found = [noise.shares(codes), *both_ways(noise.of(read, 16), clean)]
        expected += both_ways(Alike(NoiseSpec(9)), clean.float())
        with torch.autocast("cpu", torch.bfloat16):
            found += both_ways(Alike(NoiseSpec(9)), clean)
    assert all(
        a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(found, expected, strict=True)
    )


def both_ways(noise: Noise, images: torch.Tensor) -> list[torch.Tensor]:
    return [noise(images), noise.adjoint(images)]
