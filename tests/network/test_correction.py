"""The exact last step: nearer to the truth on exact input, and never a step for the worse."""

from unittest import mock

import numpy as np
import pytest
import torch
from random_models import images, model_of

from snr_ray import configfile as configs
from snr_ray.images.sources import open_source
from snr_ray.learning.checkpoint import load_model
from snr_ray.metrics import psnr
from snr_ray.network import correction
from snr_ray.network.correction import corrected
from snr_ray.network.hvae import HVAE
from snr_ray.network.noisemaker import Alike
from snr_ray.network.swap import exchange, swap
from snr_ray.noise.operator import NoiseSpec

SIZE = 32


@pytest.fixture(scope="module")
def letters() -> torch.Tensor:
    source = open_source("glyphs")
    config = configs.load([], [f"images.size={SIZE}"]).images
    return torch.from_numpy(np.stack([source.load(row, config) for row in range(0, 4000, 500)]))


def answers(clean: torch.Tensor, sigma: float) -> torch.Tensor:
    """Answers of some network: the truth and a smooth error."""
    error = torch.randn(len(clean), 1, 8, 8, generator=torch.manual_seed(1))
    return clean + sigma * torch.nn.functional.interpolate(error, size=SIZE, mode="bicubic")


def gain(
    noisy: torch.Tensor,
    clean: torch.Tensor,
    n_views: int,
    iterations: int = 8,
    sigma: float = 0.015,
) -> np.ndarray:
    """PSNR of corrected answers over that of the answers, dB."""
    guess = answers(clean, sigma)
    make = Alike(NoiseSpec(n_views))
    better = corrected(noisy, guess, make, iterations)
    return psnr(better.numpy(), clean.numpy()) - psnr(guess.numpy(), clean.numpy())


@pytest.mark.parametrize(("n_views", "reached"), [(6, 8), (12, 17), (24, 23)])
def test_answers_to_exact_images_get_better(
    letters: torch.Tensor, n_views: int, reached: float
) -> None:
    noisy = Alike(NoiseSpec(n_views))(letters)
    gains = [gain(noisy, letters, n_views, iterations) for iterations in (1, 3, 12)]
    assert gains[0].min() >= 0
    assert gains[1].mean() > gains[0].mean()
    assert gains[2].mean() > max(gains[1].mean(), reached)  # steepest descent ends 3 dB below


@pytest.mark.parametrize(("n_views", "reached"), [(6, 4), (12, 10), (24, 9)])
def test_files_of_8_bits_get_better_by_what_they_hold(
    letters: torch.Tensor, n_views: int, reached: float
) -> None:
    noisy = (Alike(NoiseSpec(n_views))(letters).clamp(0, 1) * 255).round() / 255
    assert gain(noisy, letters, n_views).min() > -0.05
    assert gain(noisy, letters, n_views).mean() > reached  # bounds taken for values: 3 dB less


@pytest.mark.parametrize("n_views", [6, 12, 24])
@pytest.mark.parametrize("sigma", [0.01, 0.03, 0.1])
def test_gaussian_noise_is_not_fitted(letters: torch.Tensor, n_views: int, sigma: float) -> None:
    noise = sigma * torch.randn(letters.shape, generator=torch.manual_seed(2))
    noisy = Alike(NoiseSpec(n_views))(letters) + noise
    assert gain(noisy, letters, n_views, sigma=0.03).min() > -0.5


def test_a_wrong_view_count_does_not_pull(letters: torch.Tensor) -> None:
    assert gain(Alike(NoiseSpec(12))(letters), letters, 13).min() > -0.3


@pytest.mark.parametrize("bound", [0, 1])
def test_air_stays_air(letters: torch.Tensor, bound: int) -> None:
    # Of answers that know where there is nothing, the rest is found from the same views.
    make, clean = Alike(NoiseSpec(6)), (letters - bound).abs()
    knows = torch.where(letters == 0, -0.01, answers(letters, 0.015).clamp(min=1e-3))
    not_so = torch.where(letters == 0, 1e-4, knows)
    if bound:  # and of answers that know where all is full
        knows, not_so = 1 - knows, 1 - not_so
    better = [corrected(make(clean), guess, make, 12) for guess in (knows, not_so)]
    assert (better[0][letters == 0] == bound).all()
    exact, moved = (psnr(image.numpy(), clean.numpy()).mean() for image in better)
    assert exact > moved + 1


def test_an_exact_answer_and_no_iterations_change_nothing(letters: torch.Tensor) -> None:
    make = Alike(NoiseSpec(8))
    assert torch.equal(corrected(make(letters), letters, make, 5), letters)
    guess = answers(letters, 0.015)
    assert torch.equal(corrected(make(letters), guess, make, 0), guess.clamp(0, 1))


def test_images_do_not_depend_on_their_neighbours(letters: torch.Tensor) -> None:
    make = Alike(NoiseSpec(8))
    noisy, guess = make(letters), answers(letters, 0.015)
    noisy[3] += 0.02 * torch.randn(noisy[3].shape, generator=torch.manual_seed(0))
    together = corrected(noisy, guess, make, 6)
    for k in (2, 3, 4):
        alone = corrected(noisy[k : k + 1], guess[k : k + 1], make, 6)
        torch.testing.assert_close(together[k : k + 1], alone, atol=1e-4, rtol=0)


class Blur:
    """Slow to undo, and its own adjoint."""

    made = 0

    def __call__(self, clean: torch.Tensor) -> torch.Tensor:
        self.made += 1
        return self.adjoint(clean)

    def adjoint(self, noisy: torch.Tensor) -> torch.Tensor:
        spread = torch.tensor([0.3, 0.4, 0.3]).reshape(1, 1, 1, 3)
        return torch.nn.functional.conv2d(noisy, spread, padding=(0, 1))


@pytest.mark.parametrize(("side", "most"), [(64, 24), (128, 24), (256, 12), (512, 6), (1024, 4)])
def test_large_images_have_fewer_iterations(side: int, most: int) -> None:
    blur = Blur()
    clean = torch.rand(1, 1, side, 48, generator=torch.manual_seed(0)) * 0.6 + 0.2
    guess = clean + 0.05 * torch.randn(clean.shape, generator=torch.manual_seed(1))
    with mock.patch.object(correction, "WORTH", 1.0), mock.patch.object(correction, "FAR", 9.0):
        corrected(blur(clean), guess, blur, 24)
    assert blur.made == 2 + most


def model(correction: int) -> HVAE:
    config = configs.load(["smoke"], [f"model.correction={correction}"])
    its = model_of(config)
    assert its.noise_maker is not None
    return its


def test_the_swap_corrects_what_it_cleans_and_explains_more(letters: torch.Tensor) -> None:
    trained, clean = load_model("notmnist"), letters[..., 2:-2, 2:-2].numpy()
    noisy = Alike(NoiseSpec(20))(torch.from_numpy(clean)).numpy()
    assert trained.model.correction == 0  # as it was shipped
    for geometry in (None, NoiseSpec(20)):
        made = []
        for iterations in (0, 6):
            trained.model.correction = iterations
            code = trained.codes.mean(0)
            made.append(exchange(trained.model, noisy, code, geometry=geometry, explain=True))
        assert made[0].explained is not None
        assert made[1].explained is not None
        assert (made[1].explained > made[0].explained).all()
        better = psnr(made[1].images, clean) - psnr(made[0].images, clean)
        assert better.min() > -0.05
        assert better.mean() > 0.2
        rgb = swap(trained.model, noisy.repeat(3, axis=1), code, geometry=geometry)
        np.testing.assert_allclose(rgb, made[1].images.repeat(3, axis=1), atol=1e-3)


def test_reconstructions_injections_and_samples_are_not_corrected() -> None:
    plain, exact = model(0), model(6)
    noisy = images(3)
    normal = lambda shape: torch.zeros(shape)  # noqa: E731
    noisy_code = [torch.zeros(1, 2, 1, 1) for _ in range(2)]
    for its in (plain, exact):
        assert its.noise_maker is not None
        its.noise_maker.logits.bias.data.copy_(torch.tensor([0.0, 9.0, 0.0]))
    for options in (
        {"noise": None},
        {"noise": noisy_code},
        {"noise": noisy_code, "normal": normal},
    ):
        results = [swap(its, noisy, **options) for its in (plain, exact)]  # type: ignore[arg-type]
        np.testing.assert_array_equal(*results)


def test_images_taken_for_clean_are_left_as_they_are() -> None:
    plain, exact = model(0), model(6)
    for its in (plain, exact):
        assert its.noise_maker is not None
        its.noise_maker.logits.bias.data.copy_(torch.tensor([9.0, 0.0, 0.0]))
    code = [torch.zeros(1, 2, 1, 1) for _ in range(2)]
    found, expected = (exchange(its, images(3), code) for its in (exact, plain))
    assert found.n_views is not None
    assert not found.n_views.any()
    np.testing.assert_array_equal(found.images, expected.images.clip(0, 1))
