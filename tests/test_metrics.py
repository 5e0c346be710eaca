"""Quality measures and baselines."""

import json
import math

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio

from snr_ray.images.sources import open_source
from snr_ray.metrics import MOST_DB, as_json, psnr, ssim
from snr_ray.scoring.baselines import best_tv_weight, tv

RNG = np.random.default_rng(0)


def glyphs(n: int, split: str = "train", size: int = 16) -> np.ndarray:
    from snr_ray.config import ImagesConfig

    source = open_source("glyphs")
    return np.stack([source.load(i, ImagesConfig(size=size)) for i in source.select(split)[:n]])


def test_psnr_equals_skimage_per_image() -> None:
    a, b = RNG.random((2, 4, 3, 9, 9), dtype=np.float32)
    expected = [peak_signal_noise_ratio(y, x, data_range=1) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(psnr(a, b), expected, rtol=1e-5)


def test_a_black_image_among_others_leaves_their_mean_a_number() -> None:
    truth = np.zeros((2, 1, 8, 8), np.float32)
    found = truth.copy()
    found[1] += 0.1
    scores = psnr(found, truth)
    np.testing.assert_allclose(scores, [MOST_DB, 20.0], rtol=1e-5)
    assert json.loads(as_json({"swap_psnr": float(scores.mean())}))["swap_psnr"] > 0


def test_json_of_numbers_that_are_not_finite_is_json() -> None:
    value = {
        "curve": [(math.nan, 1.0)],
        "loss": math.nan,
        "rows": [{"psnr": math.inf}, -math.inf, 1.5],
        "name": "x",
    }

    def refuse(name: str) -> None:
        raise AssertionError(name)

    found = json.loads(as_json(value), parse_constant=refuse)
    assert found == {
        "curve": [[None, 1.0]],
        "loss": None,
        "rows": [{"psnr": None}, None, 1.5],
        "name": "x",
    }


def test_psnr_clips_unless_told_not_to() -> None:
    truth = np.ones((1, 1, 8, 8), np.float32)
    assert psnr(truth * 3, truth)[0] == MOST_DB
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
