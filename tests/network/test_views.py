"""View counts found by themselves: by the spectrum where it is sure, by the solver where not."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from skimage.data import shepp_logan_phantom
from skimage.transform import resize

from snr_ray.config import ImagesConfig
from snr_ray.images.sources import open_source
from snr_ray.learning.checkpoint import load_model
from snr_ray.network.views import explaining, find_views, likely
from snr_ray.noise.operator import NoiseSpec, noise_operator


def _noisy(name: str, size: int, n_views: int, n: int = 4) -> np.ndarray:
    source, config = open_source(name), ImagesConfig(size=size)
    clean = np.stack([source.load(row, config) for row in source.select("test")[:n]])
    return noise_operator(NoiseSpec(n_views), size, size)(clean)


def test_the_solver_is_not_asked_where_the_spectrum_is_sure() -> None:
    def never(n_views: int) -> float:
        raise AssertionError(n_views)

    for image in _noisy("photos", 64, 20):
        assert likely([image]).sure
        assert find_views([image], never) == 20


def test_small_letters_are_settled_by_what_explains_them() -> None:
    trained = load_model("notmnist")
    noisy = _noisy("glyphs", 28, 19, n=6)
    assert not any(likely([image]).sure for image in noisy)
    for image in noisy:
        explains = explaining(trained.model, trained.codes.mean(0), image[None], trained.geometry)
        found = find_views([image], explains)
        assert found == 19
        assert explains(19) > max(explains(18), explains(20)) + 1


@pytest.mark.parametrize("n_views", [20, 40])
def test_edges_of_a_smooth_image_are_not_taken_for_a_few_views(n_views: int) -> None:
    steps = np.random.default_rng(0).standard_normal((64, 64))
    surface = steps.cumsum(0).cumsum(1)
    surface = ((surface - surface.min()) / np.ptp(surface)).astype(np.float32)[None]
    seen = likely([noise_operator(NoiseSpec(n_views), 64, 64)(surface)])
    assert seen.best == 4
    assert not seen.sure
    assert n_views in seen.others


def test_a_guess_is_asked_about_and_wins_where_it_explains_best() -> None:
    image = np.random.default_rng(0).random((1, 28, 28), dtype=np.float32)
    seen = likely([image])
    assert not seen.sure
    asked: list[int] = []

    def explains(n_views: int) -> float:
        asked.append(n_views)
        return float(n_views == 77)

    assert find_views([image], explains, guess=77) == 77
    assert set(asked) == {77, seen.best, *seen.others}


def test_several_images_of_one_count_are_surer_than_one() -> None:
    noisy = _noisy("glyphs", 28, 14, n=12)
    alone = [likely([image]).best == 14 for image in noisy]
    assert likely(list(noisy)).best == 14
    assert likely(list(noisy)).sure >= max(likely([image]).sure for image in noisy)
    assert np.mean(alone) >= 0.5


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 40)])
def test_the_smallest_images_have_an_answer(shape: tuple[int, ...]) -> None:
    image = np.random.default_rng(1).random(shape, dtype=np.float32)
    assert find_views([image], lambda n_views: -float(n_views)) >= 4


def test_counts_far_from_the_guess_are_not_asked_about_where_spectrum_and_guess_agree() -> None:
    (image,) = _noisy("glyphs", 28, 19, n=1)
    seen = likely([image])
    assert not seen.sure
    assert 2 * seen.best in seen.others
    asked: list[int] = []

    def explains(n_views: int) -> float:
        asked.append(n_views)
        return 0.0

    find_views([image], explains, guess=seen.best + 1)
    assert {seen.best, seen.best + 1} <= set(asked)
    assert max(asked) < 2 * seen.best
    asked.clear()
    find_views([image], explains, guess=3 * seen.best)  # they disagree: all are asked about
    assert {seen.best, *seen.others, 3 * seen.best} == set(asked)


@pytest.mark.parametrize("n_views", [160, 320])
def test_the_spectrum_of_a_large_image_is_sure_of_many_views(n_views: int) -> None:
    phantom = resize(shepp_logan_phantom(), (512, 512))  # smooth, as slices are
    image = gaussian_filter(phantom, 1).astype(np.float32)[None, None]
    seen = likely(list(noise_operator(NoiseSpec(n_views), 512, 512)(image)))
    assert (seen.best, seen.sure) == (n_views, True)
