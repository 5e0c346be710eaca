"""The spectrum of a noisy image tells how many views it has."""

import numpy as np
import pytest

from snr_ray.config import ImagesConfig
from snr_ray.images.sources import open_source
from snr_ray.noise.operator import NoiseSpec, noise_operator
from snr_ray.noise.spokes import spokes, view_counts


def _photos(n: int, size: int, channels: int = 1) -> np.ndarray:
    source = open_source("photos")
    config = ImagesConfig(size=size, channels=channels)
    return np.stack([source.load(row, config) for row in source.select("test")[:n]])


def _found(noisy: np.ndarray, angle_range: float = 180.0) -> list[int]:
    counts = view_counts(*noisy.shape[2:], angle_range)
    return [int(counts[found.max(0).argmax()]) for found in spokes(noisy, angle_range)]


@pytest.mark.parametrize(("size", "n_views"), [(32, 7), (48, 17), (64, 10), (64, 39), (90, 30)])
def test_photographs_of_any_size_tell_their_view_count(size: int, n_views: int) -> None:
    noisy = noise_operator(NoiseSpec(n_views), size, size)(_photos(6, size))
    assert _found(noisy) == [n_views] * 6


@pytest.mark.parametrize("angle_range", [150.0, 120.0])
@pytest.mark.parametrize(("size", "n_views"), [(48, 13), (64, 20), (64, 30)])
def test_so_do_those_of_a_limited_angle(size: int, n_views: int, angle_range: float) -> None:
    noise = noise_operator(NoiseSpec(n_views, angle_range=angle_range), size, size)
    assert _found(noise(_photos(6, size)), angle_range) == [n_views] * 6


@pytest.mark.parametrize("angle_range", [179.0, 150.0, 33.3])
def test_a_range_is_tried_on_as_dense_spokes_as_a_half_turn(angle_range: float) -> None:
    densest = view_counts(40, 64, angle_range)[-1] / angle_range
    assert densest <= view_counts(40, 64)[-1] / 180 < densest + 1 / angle_range


def test_so_do_those_of_a_file_of_8_bits_colour_and_uneven_sides() -> None:
    clean = _photos(4, 64, channels=3)[:, :, 4:-4]
    noisy = noise_operator(NoiseSpec(22), 56, 64)(clean)
    assert _found(noisy) == [22] * 4
    assert _found(np.round(noisy.clip(0, 1) * 255).astype(np.float32) / 255) == [22] * 4


def test_scale_and_offset_of_the_pixels_change_nothing() -> None:
    noisy = noise_operator(NoiseSpec(13), 48, 48)(_photos(2, 48))
    np.testing.assert_allclose(spokes(noisy), spokes(1000 * noisy + 7), rtol=1e-3, atol=0.02)


@pytest.mark.parametrize("shape", [(20, 33), (64, 64), (240, 200)])
def test_company_changes_nothing(shape: tuple[int, int]) -> None:
    noisy = np.random.default_rng(0).random((3, 2, *shape), dtype=np.float32)
    together = spokes(noisy)
    assert together.shape[::2] == (3, len(view_counts(*shape)))
    for image, expected in zip(noisy, together, strict=True):
        np.testing.assert_allclose(spokes(image[None])[0], expected, rtol=1e-4, atol=0.02)


def test_counts_are_those_that_can_be_told_apart() -> None:
    counts = view_counts(20, 64)
    assert (counts[0], counts[-1]) == (4, 96)
    assert (np.diff(counts) == 1).all()
