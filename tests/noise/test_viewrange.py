"""Ranges of view counts: what is drawn from them."""

import numpy as np
import pytest

from snr_ray.config import NoiseConfig
from snr_ray.errors import InputError
from snr_ray.noise.operator import NoiseSpec
from snr_ray.noise.viewrange import ViewRange


def test_a_range_is_what_the_configuration_says() -> None:
    config = NoiseConfig(views_per_pixel=(0.1, 0.8), filter="hann", angle_range=120.0)
    views = ViewRange.of(config)
    assert views is not None
    assert views.spec(7) == NoiseSpec(7, "hann", 120.0)
    assert ViewRange.of(NoiseConfig()) is None


@pytest.mark.parametrize("views", [(0.8, 0.1), (0.0, 0.5), (0.1, 5.0), (0.3, 0.3)])
def test_a_range_rises_within_what_the_operator_takes(views: tuple[float, float]) -> None:
    with pytest.raises(InputError, match="views_per_pixel"):
        NoiseConfig(views_per_pixel=views)


@pytest.mark.parametrize(("side", "counts"), [(4, (1, 3)), (32, (3, 26)), (128, (13, 102))])
def test_ends_of_a_range_are_the_nearest_whole_counts(side: int, counts: tuple[int, int]) -> None:
    assert ViewRange(0.1, 0.8).counts(side) == counts


@pytest.mark.parametrize("side", [8, 28, 128, 512])
def test_every_count_of_the_range_is_drawn_and_none_beyond_it(side: int) -> None:
    views, rng = ViewRange(0.1, 0.8), np.random.default_rng(0)
    least, most = views.counts(side)
    drawn = views.draw(side, (3000, 3), rng)
    assert (drawn.min(), drawn.max()) == (least, most)
    assert (np.diff(drawn) <= 0).all()
    if side <= 128:
        assert set(drawn.ravel()) == set(range(least, most + 1))
    middle = np.sqrt(least * most)  # of the logarithms
    assert np.mean(drawn > middle) == pytest.approx(0.5, abs=0.08 if side > 8 else 0.3)
