"""Doubt: falls with what is explained, never on what validation images reach."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snr_ray.learning.checkpoint import load_model
from snr_ray.metrics import psnr
from snr_ray.network.swap import exchange
from snr_ray.network.trust import ENOUGH, LEAST, MARGIN, doubtful, least_explained
from snr_ray.noise.operator import NoiseSpec, noise_operator

KNOWN = {0.1: 19.0, 0.3: 21.0, 0.6: 22.5}


def doubt(explained: float, n_views: int, side: int = 100) -> bool:
    return bool(doubtful(np.array([explained]), np.array([n_views]), side, KNOWN)[0])


@given(st.integers(0, 400), st.floats(-50, 80), st.floats(0, 30))
def test_what_explains_more_is_never_doubted_sooner(n: int, decibels: float, more: float) -> None:
    assert doubt(decibels, n) or not doubt(decibels + more, n)


def test_each_view_count_has_the_bound_of_the_next_lower_one_measured() -> None:
    for n_views, bound in [(10, 19), (29, 19), (30, 21), (59, 21), (60, 22.5), (400, 22.5)]:
        assert doubt(bound - MARGIN - 0.1, n_views)
        assert not doubt(bound - MARGIN + 0.1, n_views)


def test_fewer_views_than_were_measured_have_the_bound_of_the_fewest() -> None:
    assert doubt(19 - MARGIN - 0.1, 4)
    assert not doubt(19 - MARGIN + 0.1, 4)


def test_an_answer_that_is_no_number_is_doubtful() -> None:
    assert doubt(math.nan, 30)
    assert doubt(-math.inf, 30)


def test_without_measurements_a_sixth_of_the_range_is_no_explanation() -> None:
    at = np.array([LEAST - 0.1, LEAST + 0.1])
    assert doubtful(at, np.array([20, 20]), 64, {}).tolist() == [True, False]


@pytest.mark.parametrize("side", [28, 64, 97, 480])
def test_a_count_that_was_measured_has_its_own_bound_after_its_key_was_rounded(side: int) -> None:
    for n_views in range(2, 3 * side):
        known = {float(f"{n / side:.4g}"): 19.0 + n - n_views for n in (n_views - 1, n_views)}
        bound = np.array([19 - MARGIN - 0.1, 19 - MARGIN + 0.1])
        assert doubtful(bound, np.array([n_views] * 2), side, known).tolist() == [True, False]


def test_the_bound_goes_with_views_per_pixel_not_with_the_size() -> None:
    for side in (50, 100, 500):
        assert doubt(21 - MARGIN - 0.1, 3 * side // 10, side)
        assert not doubt(19 - MARGIN + 0.1, side // 5, side)


def test_good_answers_to_the_images_that_were_measured_are_trusted(model_folder: Path) -> None:
    trained = load_model(model_folder)
    clean = np.random.default_rng(0).random((6, 1, 16, 16), dtype=np.float32)
    noisy, code = noise_operator(NoiseSpec(12), 16, 16)(clean), trained.codes.mean(0)
    target = exchange(trained.model, noisy, code).images  # which answers beat their inputs in
    least = least_explained(trained.model, code, [(12 / 16, noisy, target)])
    assert list(least) == [12 / 16]
    for seen in (noisy, np.round(noisy.clip(0, 1) * 255).astype(np.float32) / 255):
        made = exchange(trained.model, seen, code, explain=True)
        assert made.explained is not None
        good = psnr(made.images, target) > psnr(seen, target)
        assert good.any()
        assert (made.explained[good] >= least[12 / 16] - 1e-4).all()  # of few the least of all


def test_a_little_other_noise_is_no_wrong_answer() -> None:
    exact = {0.6: 60.0}
    at = np.array([ENOUGH - 0.1, ENOUGH + 0.1])
    assert doubtful(at, np.array([60, 60]), 100, exact).tolist() == [True, False]


def test_where_little_was_explained_a_sixth_of_the_range_is_no_explanation_either() -> None:
    at = np.array([LEAST - 0.1, LEAST + 0.1])
    assert doubtful(at, np.array([60, 60]), 100, {0.6: LEAST}).tolist() == [True, False]


def test_an_image_taken_for_clean_need_only_come_back() -> None:
    assert doubt(LEAST - 0.1, 0)
    assert not doubt(LEAST + 0.1, 0)


def test_answers_worse_than_their_input_set_no_bound(model_folder: Path) -> None:
    trained = load_model(model_folder)
    clean = np.random.default_rng(0).random((4, 1, 16, 16), dtype=np.float32)
    assert least_explained(trained.model, trained.codes.mean(0), [(0.5, clean, clean)]) == {}


def test_a_model_of_a_range_is_measured_by_true_view_counts(range_folder: Path) -> None:
    # Its noise codes may read other counts, and what these explain bounds nothing.
    trained = load_model(range_folder)
    clean = np.random.default_rng(0).random((4, 1, 16, 16), dtype=np.float32)
    noisy, code = noise_operator(NoiseSpec(12), 16, 16)(clean), trained.codes.mean(0)
    target = 0.5 * noisy  # what answers are good for does not matter here
    least = least_explained(trained.model, code, [(12 / 16, noisy, target)])
    expected = []
    for seen in (noisy, (np.round(noisy.clip(0, 1) * 255) / 255).astype(np.float32)):
        made = exchange(trained.model, seen, code, geometry=NoiseSpec(12), explain=True)
        assert made.explained is not None
        expected += made.explained[psnr(made.images, target) > psnr(seen, target)].tolist()
    assert least[12 / 16] == pytest.approx(min(expected), abs=0.01)


def test_the_least_is_that_of_exact_and_of_8_bit_images_of_any_shape(range_folder: Path) -> None:
    trained, spec = load_model(range_folder), NoiseSpec(15)
    model, code = trained.model, trained.codes.mean(0)
    clean = 0.4 + 0.2 * np.random.default_rng(0).random((12, 1, 16, 20), dtype=np.float32)
    noisy = noise_operator(spec, 16, 20)(clean)
    rounded = np.round(noisy * 255).astype(np.float32) / np.float32(255)
    good = exchange(model, noisy, code, geometry=spec).images
    exact, stored = (
        exchange(model, seen, code, geometry=spec, explain=True).explained
        for seen in (noisy, rounded)
    )
    assert exact is not None
    assert stored is not None
    for some, lower in ((stored < exact, stored), (exact < stored, exact)):
        least = least_explained(model, code, [(15 / 20, noisy[some], good[some])])
        assert least == {15 / 20: pytest.approx(lower[some].min(), abs=2e-5)}
