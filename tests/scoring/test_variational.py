"""Total variation reconstruction: it finds the least of what it says it minimises."""

import functools

import numpy as np
import pytest

from snr_ray.learning.batches import Pairs
from snr_ray.metrics import psnr
from snr_ray.noise.operator import NoiseSpec, noise_operator
from snr_ray.scoring import baselines
from snr_ray.scoring.baselines import TVREC_WEIGHTS, Fitting, best_tvrec_weight, fit_tvrec
from snr_ray.scoring.cases import Case, as_seen
from snr_ray.scoring.variational import reconstruct

SPEC = NoiseSpec(12)


def _boxes(n: int = 4, channels: int = 1) -> np.ndarray:
    """Piecewise constant images [n, channels, 24, 24]."""
    rng, out = np.random.default_rng(0), np.zeros((n, channels, 24, 24), np.float32)
    for image in out:
        for _ in range(3):
            top, left, high, wide = rng.integers(3, 12, 4)
            image[:, top : top + high, left : left + wide] = rng.random((channels, 1, 1))
    return out


def _objective(x: np.ndarray, y: np.ndarray, weight: float) -> float:
    again = noise_operator(SPEC, 24, 24)(x)
    down, right = np.zeros_like(x), np.zeros_like(x)
    down[:, :, :-1], right[..., :-1] = np.diff(x, axis=2), np.diff(x, axis=3)
    length = np.sqrt((down**2 + right**2).sum(1))
    return float(0.5 * np.square(again - y).sum() + weight * length.sum())


def test_it_is_the_least_among_its_neighbours_and_far_ahead_of_the_noisy_image() -> None:
    clean = _boxes(channels=3)
    y = noise_operator(SPEC, 24, 24)(clean)
    weight = 1e-2
    x = reconstruct(y, SPEC, weight)
    assert x.shape == y.shape
    assert x.min() >= 0
    assert x.max() <= 1
    best = _objective(x, y, weight)
    rng = np.random.default_rng(1)
    for size in (1e-3, 1e-2, 0.1):
        for toward in (clean, y.clip(0, 1), rng.random(x.shape, dtype=np.float32)):
            assert best <= _objective((1 - size) * x + size * toward, y, weight) * (1 + 2e-3)
    assert (psnr(x, clean) > psnr(y, clean) + 10).all()


def test_pixels_that_a_file_cut_are_bounds() -> None:
    clean = _boxes()
    y = noise_operator(SPEC, 24, 24)(clean)
    cut = y.clip(0, 1)
    inside = cut.clip(1e-6, 1 - 1e-6)  # the same values, as if they had been measured
    assert (psnr(reconstruct(cut, SPEC, 1e-3), clean) >
            psnr(reconstruct(inside, SPEC, 1e-3), clean) + 5).all()  # fmt: skip


def test_the_chosen_weight_is_the_best_of_its_neighbours_and_rises_with_the_grain() -> None:
    clean = _boxes(2)
    y = noise_operator(SPEC, 24, 24)(clean)
    grain = 0.05 * np.random.default_rng(0).standard_normal(y.shape, np.float32)
    exact, grainy = (best_tvrec_weight(images, clean, SPEC) for images in (y, y + grain))
    assert exact < grainy
    place = TVREC_WEIGHTS.index(grainy)
    less, it, more = (
        psnr(reconstruct(y + grain, SPEC, weight), clean).mean()
        for weight in TVREC_WEIGHTS[place - 1 : place + 2]
    )
    assert it >= max(less, more)


def test_no_images_are_no_images() -> None:
    assert reconstruct(np.zeros((0, 1, 24, 24), np.float32), SPEC, 1e-3).shape == (0, 1, 24, 24)


def test_each_kind_of_input_is_reconstructed_with_its_own_weight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clean, names = _boxes(2), ["a", "b"]
    noisy = noise_operator(SPEC, 24, 24)(clean)

    def weight_of(seen: np.ndarray, *_: object) -> float:
        return 1e-3 + float(np.abs(seen - noisy).mean())

    monkeypatch.setattr(baselines, "best_tvrec_weight", weight_of)
    monkeypatch.setattr(baselines, "reconstruct", functools.partial(reconstruct, iterations=3))
    pairs = Pairs(names, [clean], [[noisy]])
    restore = fit_tvrec(Fitting([SPEC], lambda: pairs, lambda: pairs), 1)
    for task in baselines.TVREC_TASKS:
        seen = as_seen(task, noisy, names)
        made = restore(Case(task, names, clean, seen, np.ones(2, np.int64), SPEC))
        np.testing.assert_array_equal(made, reconstruct(seen, SPEC, weight_of(seen), iterations=3))
