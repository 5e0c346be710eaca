"""Doubt: falls with what is explained, never on what validation images reach."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from snr_ray.network.trust import LEAST, MARGIN, doubtful

KNOWN = {0.1: 25.0, 0.3: 34.0, 0.6: 42.0, math.inf: 50.0}


def doubt(explained: float, n_views: int, side: int = 100) -> bool:
    return bool(doubtful(np.array([explained]), np.array([n_views]), side, KNOWN)[0])


@given(st.integers(0, 400), st.floats(-50, 80), st.floats(0, 30))
def test_what_explains_more_is_never_doubted_sooner(n: int, decibels: float, more: float) -> None:
    assert doubt(decibels, n) or not doubt(decibels + more, n)


def test_each_view_count_has_the_bound_of_the_next_lower_one_measured() -> None:
    for n_views, bound in [(10, 25), (29, 25), (30, 34), (59, 34), (60, 42), (400, 42), (0, 50)]:
        assert doubt(bound - MARGIN - 0.1, n_views)
        assert not doubt(bound - MARGIN + 0.1, n_views)


def test_fewer_views_than_were_measured_have_the_bound_of_the_fewest() -> None:
    assert doubt(25 - MARGIN - 0.1, 4)
    assert not doubt(25 - MARGIN + 0.1, 4)


def test_an_answer_that_is_no_number_is_doubtful() -> None:
    assert doubt(math.nan, 30)
    assert doubt(-math.inf, 30)


def test_without_measurements_a_sixth_of_the_range_is_no_explanation() -> None:
    at = np.array([LEAST - 0.1, LEAST + 0.1])
    assert doubtful(at, np.array([20, 20]), 64, {}).tolist() == [True, False]


def test_the_bound_goes_with_views_per_pixel_not_with_the_size() -> None:
    for side in (50, 100, 500):
        assert doubt(34 - MARGIN - 0.1, 3 * side // 10, side)
        assert not doubt(25 - MARGIN + 0.1, side // 5, side)
