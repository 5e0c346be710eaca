"""What the spectrum is sure of, it is right about."""

import numpy as np
import pytest

from snr_ray.config import ImagesConfig
from snr_ray.images.sources import open_source
from snr_ray.noise.likelyviews import Likely, _likely, likely
from snr_ray.noise.operator import NoiseSpec, noise_operator


def _seen(name: str, size: int, n_views: int, angle_range: float = 180.0) -> list[Likely]:
    source, config = open_source(name), ImagesConfig(size=size)
    clean = np.stack([source.load(row, config) for row in source.select("test")[:8]])
    noise = noise_operator(NoiseSpec(n_views, angle_range=angle_range), size, size)
    return likely(noise(clean), angle_range)


@pytest.mark.parametrize("angle_range", [150.0, 120.0, 33.3])
@pytest.mark.parametrize("n_views", [3, 10, 20, 40])
@pytest.mark.parametrize(("name", "size"), [("glyphs", 28), ("photos", 64)])
def test_no_wrong_count_of_a_limited_angle_is_sure(
    name: str, size: int, n_views: int, angle_range: float
) -> None:
    seen = _seen(name, size, n_views, angle_range)
    assert {one.best for one in seen if one.sure} <= {n_views}


@pytest.mark.parametrize("angle_range", [180.0, 150.0, 120.0])
def test_the_right_count_of_photographs_is(angle_range: float) -> None:
    seen = _seen("photos", 64, 20, angle_range)
    assert all((one.best, one.sure) == (20, True) for one in seen)


@pytest.mark.parametrize("n_views", [1, 2, 3])
@pytest.mark.parametrize(("name", "size"), [("glyphs", 28), ("photos", 32)])
def test_a_multiple_of_so_few_views_that_they_are_not_tried_is_not_sure(
    name: str, size: int, n_views: int
) -> None:
    assert not any(one.sure for one in _seen(name, size, n_views))


@pytest.mark.parametrize(("name", "size"), [("glyphs", 28), ("photos", 32)])
def test_3_views_are_asked_about_where_they_look_like_6(name: str, size: int) -> None:
    seen = _seen(name, size, 3)
    assert all(3 in one.others for one in seen if one.best == 6)
    assert any(one.best == 6 for one in seen)


def test_of_no_images_nothing_is_said() -> None:
    assert likely(np.zeros((0, 1, 16, 16), np.float32)) == []


@pytest.mark.parametrize(
    ("lead", "other", "sure"),
    [(400, 90, True), (400, 110, False), (100, 50, True), (100, 70, False), (50, 0, False)],
)
@pytest.mark.parametrize("floor", [0, 1])
def test_another_count_under_another_floor_makes_unsure_by_its_share_of_the_lead(
    lead: float, other: float, sure: bool, floor: int
) -> None:
    counts = np.arange(4, 31)
    found = np.zeros((2, len(counts)))
    found[floor, counts == 20], found[1 - floor, counts == 10] = lead, other
    its = _likely(found, counts, counts > 4)
    assert (its.best, its.sure) == (20, sure)
    found[1 - floor] = found[floor] / 2  # both say the same
    assert _likely(found, counts, counts > 4).sure == (lead > 60)
    assert not _likely(found, counts, counts > 20).sure  # of so few views none is


def test_the_best_of_each_floor_and_of_many_views_are_asked_about_with_halves_and_doubles() -> None:
    counts, many = np.arange(4, 60), np.arange(4, 60) >= 20
    found = np.random.default_rng(0).standard_normal((2, len(counts)))
    others = set(_likely(found, counts, many).others)
    for row in found:
        best = counts[np.argsort(row)[::-1]].tolist()
        beyond = [n_views for n_views in best if n_views >= 20]
        confused = {best[0] // 2, 2 * best[0]} & set(range(2, 60))
        assert others >= {*best[:4], *beyond[:4], *confused}
    assert len(others) <= 2 * (4 + 4) + 4
