"""Quality measures and baselines."""

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio

from snr_ray.baselines import Lmmse, best_tv_weight, tv
from snr_ray.config import InputError
from snr_ray.metrics import psnr, ssim
from snr_ray.radon import NoiseSpec, operator
from snr_ray.sources import open_source

RNG = np.random.default_rng(0)


def glyphs(n: int, split: str = "train", size: int = 16) -> np.ndarray:
    from snr_ray.config import ImagesConfig

    source = open_source("glyphs")
    return np.stack([source.load(i, ImagesConfig(size=size)) for i in source.select(split)[:n]])


def test_psnr_equals_skimage_per_image() -> None:
    a, b = RNG.random((2, 4, 3, 9, 9), dtype=np.float32)
    expected = [peak_signal_noise_ratio(y, x, data_range=1) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(psnr(a, b), expected, rtol=1e-5)


def test_psnr_clips_unless_told_not_to() -> None:
    truth = np.ones((1, 1, 8, 8), np.float32)
    assert psnr(truth * 3, truth)[0] == np.inf
    assert psnr(truth * 3, truth, clip=False)[0] == pytest.approx(-6.02, abs=0.01)


def test_equal_images_have_ssim_one() -> None:
    x = RNG.random((2, 3, 12, 12), dtype=np.float32)
    np.testing.assert_allclose(ssim(x, x), 1)
    assert (ssim(1 - x, x) < 0.5).all()


def test_tv_smooths_and_weight_is_chosen_by_psnr() -> None:
    clean = glyphs(6)
    noisy = (clean + RNG.normal(0, 0.15, clean.shape)).astype(np.float32)
    weight = best_tv_weight(noisy, clean)
    assert psnr(tv(noisy, weight), clean).mean() > psnr(noisy, clean).mean() + 1


def test_lmmse_is_the_best_linear_estimate_on_its_own_images() -> None:
    # Optimal among linear maps of this regularisation: beats doing nothing and least squares alike.
    clean = glyphs(300)
    noise = operator(NoiseSpec(6), 16, 16)
    noisy = noise(clean)
    estimate = Lmmse(clean, noise)(noisy)
    a = noise.matrix().astype(np.float64)
    ridge = np.linalg.solve(a.T @ a + 1e-6 * np.eye(256), a.T)
    least_squares = (noisy.reshape(-1, 256) @ ridge.T).reshape(noisy.shape).astype(np.float32)
    error = np.square(estimate - clean).mean()
    assert error < np.square(noisy - clean).mean() / 3
    assert error < np.square(least_squares - clean).mean()


def test_lmmse_refuses_large_images() -> None:
    with pytest.raises(InputError, match="at most 4096 pixels per image, but got 65x65"):
        Lmmse(np.zeros((2, 1, 65, 65), np.float32), operator(NoiseSpec(2), 65, 65))
