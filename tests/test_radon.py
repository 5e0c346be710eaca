"""The noise operator: equality with scikit-image, linearity, and its matrix form."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.transform import iradon, radon

from snr_ray.config import FILTERS, InputError, NoiseConfig
from snr_ray.radon import NoiseSpec, RadonNoise, operator, spec_hash, specs


def reference(image: np.ndarray, spec: NoiseSpec) -> np.ndarray:
    """What scikit-image computes for one square image."""
    name = None if spec.filter == "none" else spec.filter
    sinogram = radon(image, spec.theta, circle=False)
    return iradon(sinogram, spec.theta, output_size=len(image), filter_name=name, circle=False)


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(8, 96),
    n_views=st.integers(1, 180),
    name=st.sampled_from(FILTERS),
    seed=st.integers(0, 2**32 - 1),
)
def test_operator_equals_skimage(size: int, n_views: int, name: str, seed: int) -> None:
    # Sizes and view counts multiply; the whole range of each is covered, not every large pair.
    n_views = min(n_views, 180 if size <= 40 else 30)
    image = np.random.default_rng(seed).random((size, size))
    spec = NoiseSpec(n_views, name)
    noisy = RadonNoise(spec, size, size)(image[None])[0]
    assert np.abs(noisy - reference(image, spec)).max() <= 1e-5


@pytest.mark.parametrize(("size", "n_views"), [(8, 1), (9, 180), (33, 180), (95, 1), (96, 180)])
def test_operator_equals_skimage_at_the_corners(size: int, n_views: int) -> None:
    image = np.random.default_rng(size).random((size, size))
    spec = NoiseSpec(n_views)
    noisy = RadonNoise(spec, size, size)(image[None])[0]
    assert np.abs(noisy - reference(image, spec)).max() <= 1e-5


@pytest.mark.parametrize("size", [20, 45])
def test_operator_is_linear(size: int) -> None:
    noise = operator(NoiseSpec(7), size, size)
    x, y = np.random.default_rng(1).random((2, size, size), dtype=np.float32)
    np.testing.assert_allclose(noise(2 * x - 3 * y), 2 * noise(x) - 3 * noise(y), atol=2e-5)


@pytest.mark.parametrize(("height", "width"), [(13, 20), (20, 13), (40, 31)])
def test_rectangle_equals_the_padded_square(height: int, width: int) -> None:
    # A rectangle is the same object in a larger field of view: padding must change nothing inside.
    image = np.random.default_rng(2).random((height, width))
    side = max(height, width)
    top, left = side // 2 - height // 2, side // 2 - width // 2
    square = np.zeros((side, side))
    square[top : top + height, left : left + width] = image
    spec = NoiseSpec(9)
    noisy = RadonNoise(spec, height, width)(image[None])[0]
    expected = reference(square, spec)[top : top + height, left : left + width]
    assert np.abs(noisy - expected).max() <= 1e-5


@pytest.mark.parametrize("size", [16, 40])
def test_matrix_is_the_operator(size: int) -> None:
    noise = operator(NoiseSpec(5), size, size)
    x = np.random.default_rng(3).random((size, size), dtype=np.float32)
    np.testing.assert_allclose(noise.matrix() @ x.ravel(), noise(x).ravel(), atol=2e-5)


def test_project_equals_skimage_radon() -> None:
    image = np.random.default_rng(4).random((30, 30))
    spec = NoiseSpec(11)
    sinogram = operator(spec, 30, 30).project(image[None])[0]
    np.testing.assert_allclose(sinogram, radon(image, spec.theta, circle=False), atol=1e-5)


def test_channels_and_batches_are_independent() -> None:
    x = np.random.default_rng(5).random((3, 2, 24, 24), dtype=np.float32)
    noise = operator(NoiseSpec(6), 24, 24)
    np.testing.assert_allclose(noise(x)[2, 1], noise(x[2, 1]), atol=1e-5)


def test_empty_batch_stays_empty() -> None:
    assert operator(NoiseSpec(6), 24, 24)(np.zeros((0, 1, 24, 24))).shape == (0, 1, 24, 24)


def test_fewer_views_are_noisier() -> None:
    x = np.zeros((28, 28), np.float32)
    x[8:20, 10:18] = 1
    errors = [np.square(operator(NoiseSpec(k), 28, 28)(x) - x).mean() for k in (40, 20, 10, 5)]
    assert errors == sorted(errors)


def test_hash_changes_with_every_setting() -> None:
    variants = [
        spec_hash(specs(NoiseConfig(n_views=(20,))), 28),
        spec_hash(specs(NoiseConfig(n_views=(20, 10))), 28),
        spec_hash(specs(NoiseConfig(n_views=(20,), filter="hann")), 28),
        spec_hash(specs(NoiseConfig(n_views=(20,))), 32),
    ]
    assert len(set(variants)) == len(variants)


def test_zero_views_are_refused() -> None:
    with pytest.raises(InputError, match="n_views must be at least 1, but got 0"):
        NoiseSpec(0)


def test_unknown_filter_is_refused() -> None:
    with pytest.raises(InputError, match="filter must be one of ramp"):
        NoiseSpec(4, "box")


def test_other_shape_is_refused() -> None:
    with pytest.raises(InputError, match="24x24 images, but got 24x25"):
        operator(NoiseSpec(6), 24, 24)(np.zeros((1, 24, 25)))
