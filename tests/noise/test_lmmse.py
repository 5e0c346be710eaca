"""The linear MMSE estimate and the covariance behind it."""

import numpy as np
import pytest

from snr_ray.config import ImagesConfig
from snr_ray.errors import InputError
from snr_ray.images.sources import open_source
from snr_ray.metrics import psnr
from snr_ray.noise.lmmse import ImagePrior, Lmmse
from snr_ray.noise.operator import NoiseSpec, noise_operator

RNG = np.random.default_rng(0)


def glyphs(n: int, size: int = 16) -> np.ndarray:
    source = open_source("glyphs")
    rows = source.select("train")[:n]
    return np.stack([source.load(i, ImagesConfig(size=size)) for i in rows])


def textures(n: int, size: int) -> np.ndarray:
    """Images that look the same everywhere: white noise smoothed over 5 x 5 pixels."""
    x = RNG.standard_normal((n, 1, size + 4, size + 4))
    windows = np.lib.stride_tricks.sliding_window_view(x, (5, 5), axis=(2, 3))
    return (0.5 + 0.2 * windows.mean((4, 5))).astype(np.float32)


def test_it_is_the_best_linear_estimate_on_its_own_images() -> None:
    # Optimal among linear maps of this regularisation: beats doing nothing and least squares alike.
    clean = glyphs(300)
    noise = noise_operator(NoiseSpec(6), 16, 16)
    noisy = noise(clean)
    estimate = Lmmse(ImagePrior(clean), noise)(noisy)
    a = noise.matrix().astype(np.float64)
    ridge = np.linalg.solve(a.T @ a + 1e-6 * np.eye(256), a.T)
    least_squares = (noisy.reshape(-1, 256) @ ridge.T).reshape(noisy.shape).astype(np.float32)
    error = np.square(estimate - clean).mean()
    assert error < np.square(noisy - clean).mean() / 3
    assert error < np.square(least_squares - clean).mean()


def test_stationary_images_are_known_by_displacement() -> None:
    # Their true covariance is known: 5 x 5 windows overlap in (5 - |dy|) (5 - |dx|) pixels.
    prior = ImagePrior(textures(400, 12))
    assert prior.weight >= 0.8
    row, column = (index.ravel() for index in np.indices((12, 12)))
    overlap = [np.clip(5 - np.abs(i[:, None] - i), 0, None) for i in (row, column)]
    true = 0.2**2 * overlap[0] * overlap[1] / 25**2
    assert np.abs(prior.covariance - true).max() < 0.1 * true.max()


def test_few_images_clean_others_better_than_by_their_sample_covariance() -> None:
    clean, unseen = textures(300, 16), textures(50, 16)
    noise = noise_operator(NoiseSpec(8), 16, 16)
    prior = ImagePrior(clean)
    shrunk = psnr(Lmmse(prior, noise)(noise(unseen)), unseen).mean()
    prior.covariance = np.cov(clean.reshape(300, -1).astype(np.float64), rowvar=False)
    sample = psnr(Lmmse(prior, noise)(noise(unseen)), unseen).mean()
    assert shrunk > sample + 1


def test_images_that_differ_by_place_keep_their_sample_covariance() -> None:
    brightness = RNG.random((400, 1, 1, 1), np.float32)  # of the upper left quarter alone
    x = 0.01 * RNG.standard_normal((400, 1, 12, 12), np.float32)
    x[:, :, :6, :6] += brightness
    assert ImagePrior(x).weight <= 0.2


@pytest.mark.parametrize("photons", [0, 1000])
@pytest.mark.parametrize("n", [1, 2, 9])
def test_very_few_images_still_give_an_estimate(n: int, photons: int) -> None:
    clean = glyphs(n)
    noise = noise_operator(NoiseSpec(6, photons=photons), 16, 16)
    assert np.isfinite(Lmmse(ImagePrior(clean), noise)(noise(clean))).all()


def test_the_noise_of_photons_is_expected_where_they_are_counted() -> None:
    clean, prior = glyphs(400), ImagePrior(glyphs(400))
    exact, counted = (noise_operator(NoiseSpec(6, photons=n), 16, 16) for n in (0, 300))
    noisy = counted(clean)
    knows, hopes = (psnr(Lmmse(prior, noise)(noisy), clean).mean() for noise in (counted, exact))
    assert knows > hopes + 2


def test_it_refuses_large_images() -> None:
    with pytest.raises(InputError, match="at most 4096 pixels per image, but got 65x65"):
        ImagePrior(np.zeros((2, 1, 65, 65), np.float32))
