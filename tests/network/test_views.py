"""View counts found by themselves: by the spectrum where it is sure, by the solver where not."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from skimage.data import shepp_logan_phantom
from skimage.transform import resize

from snr_ray.config import ImagesConfig
from snr_ray.images.sources import open_source
from snr_ray.learning.checkpoint import load_model
from snr_ray.network.views import explaining, find_views
from snr_ray.noise.likelyviews import likely
from snr_ray.noise.operator import NoiseSpec, noise_operator


def _noisy(name: str, size: int, n_views: int, n: int = 4) -> np.ndarray:
    source, config = open_source(name), ImagesConfig(size=size)
    clean = np.stack([source.load(row, config) for row in source.select("test")[:n]])
    return noise_operator(NoiseSpec(n_views), size, size)(clean)


class Asked:
    """Says that one count explains best, and remembers which it was asked about."""

    def __init__(self, best: int = 0) -> None:
        self.best, self.counts = best, list[int]()

    def __call__(self, rows: np.ndarray, n_views: int) -> np.ndarray:
        self.counts.append(n_views)
        return np.full(len(rows), float(n_views == self.best))


def test_the_solver_is_not_asked_where_the_spectrum_is_sure() -> None:
    asked, noisy = Asked(), _noisy("photos", 64, 20)
    assert all(seen.sure for seen in likely(noisy))
    assert (find_views(noisy, asked) == 20).all()
    assert not asked.counts


def test_small_letters_are_settled_by_what_explains_them() -> None:
    trained = load_model("notmnist")
    noisy = _noisy("glyphs", 28, 19, n=6)
    assert not any(seen.sure for seen in likely(noisy))
    explains = explaining(trained.model, trained.codes.mean(0), noisy, trained.geometry)
    assert (find_views(noisy, explains) == 19).all()
    beside = [explains(np.arange(6), n_views) for n_views in (18, 19, 20)]
    assert (beside[1] > np.maximum(beside[0], beside[2]) + 1).all()


def test_each_image_is_found_by_itself_whatever_its_company() -> None:
    trained = load_model("notmnist")
    noisy = np.concatenate([_noisy("glyphs", 28, k, n=2) for k in (8, 13, 19)])
    explains = explaining(trained.model, trained.codes.mean(0), noisy, trained.geometry)
    together = find_views(noisy, explains)
    alone = [
        find_views(noisy[k : k + 1], lambda rows, n_views, k=k: explains(rows + k, n_views))[0]
        for k in range(6)
    ]
    assert together.tolist() == alone == [8, 8, 13, 13, 19, 19]


@pytest.mark.parametrize("n_views", [20, 40])
def test_edges_of_a_smooth_image_are_not_taken_for_a_few_views(n_views: int) -> None:
    steps = np.random.default_rng(0).standard_normal((64, 64))
    surface = steps.cumsum(0).cumsum(1)
    surface = ((surface - surface.min()) / np.ptp(surface)).astype(np.float32)[None]
    (seen,) = likely(noise_operator(NoiseSpec(n_views), 64, 64)(surface[None]))
    assert seen.best == 4
    assert not seen.sure
    assert n_views in seen.others


def test_a_guess_is_asked_about_and_wins_where_it_explains_best() -> None:
    image = np.random.default_rng(0).random((1, 1, 28, 28), dtype=np.float32)
    (seen,), asked = likely(image), Asked(best=77)
    assert not seen.sure
    assert find_views(image, asked, np.array([77])) == 77
    assert set(asked.counts) == {77, seen.best, *seen.others}


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 40)])
def test_the_smallest_images_have_an_answer(shape: tuple[int, ...]) -> None:
    image = np.random.default_rng(1).random((1, *shape), dtype=np.float32)
    assert find_views(image, Asked()) >= 2


def test_a_guess_beyond_what_an_image_can_hold_is_asked_about_as_the_most_it_can() -> None:
    image, asked = np.random.default_rng(1).random((1, 1, 9, 9), dtype=np.float32), Asked(best=36)
    assert find_views(image, asked, np.array([40])) == 36
    assert max(asked.counts) == 36


@pytest.mark.parametrize("angle_range", [150.0, 120.0])
def test_views_of_a_limited_angle_are_found_where_their_range_is_known(angle_range: float) -> None:
    source, config = open_source("photos"), ImagesConfig(size=64)
    clean = np.stack([source.load(row, config) for row in source.select("test")[:4]])
    noisy = noise_operator(NoiseSpec(20, angle_range=angle_range), 64, 64)(clean)
    assert (find_views(noisy, Asked(), angle_range=angle_range) == 20).all()


def test_counts_far_from_the_guess_are_not_asked_about_where_spectrum_and_guess_agree() -> None:
    image, asked = _noisy("glyphs", 28, 19, n=1), Asked()
    (seen,) = likely(image)
    assert not seen.sure
    assert 2 * seen.best in seen.others
    find_views(image, asked, np.array([seen.best + 1]))
    assert {seen.best, seen.best + 1} <= set(asked.counts)
    assert max(asked.counts) < 2 * seen.best
    asked = Asked()
    find_views(image, asked, np.array([3 * seen.best]))  # they disagree: all are asked about
    assert {seen.best, *seen.others, 3 * seen.best} == set(asked.counts)


@pytest.mark.parametrize("n_views", [160, 320])
def test_the_spectrum_of_a_large_image_is_sure_of_many_views(n_views: int) -> None:
    phantom = resize(shepp_logan_phantom(), (512, 512))  # smooth, as slices are
    image = gaussian_filter(phantom, 1).astype(np.float32)[None, None]
    (seen,) = likely(noise_operator(NoiseSpec(n_views), 512, 512)(image))
    assert (seen.best, seen.sure) == (n_views, True)
