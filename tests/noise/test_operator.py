"""The noise operator: equality with scikit-image, linearity, and its matrix form."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from skimage.transform import iradon, radon

from snr_ray.config import FILTERS, NoiseConfig
from snr_ray.errors import InputError
from snr_ray.noise.filters import DENSE_BINS
from snr_ray.noise.operator import (
    NoiseSpec,
    RadonNoise,
    noise_operator,
    noise_specs,
    spec_hash,
    working_bytes,
)


def reference(image: np.ndarray, spec: NoiseSpec) -> np.ndarray:
    """What scikit-image computes for one square image."""
    name = None if spec.filter == "none" else spec.filter
    sinogram = radon(image, spec.theta, circle=False)
    return iradon(sinogram, spec.theta, output_size=len(image), filter_name=name, circle=False)


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(4, 96),
    n_views=st.integers(1, 180),
    name=st.sampled_from(FILTERS),
    angle_range=st.sampled_from([180.0, 180.0, 120.0, 33.3]),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
    seed=st.integers(0, 2**32 - 1),
)
def test_operator_equals_skimage(
    size: int, n_views: int, name: str, angle_range: float, dtype: type, seed: int
) -> None:
    # Sizes and view counts multiply; the whole range of each is covered, not every large pair.
    n_views = min(n_views, 4 * size if size <= 45 else 30)
    image = np.random.default_rng(seed).random((size, size)).astype(dtype)
    spec = NoiseSpec(n_views, name, angle_range)
    noisy = RadonNoise(spec, size, size)(image[None])[0]
    expected = reference(image.astype(np.float64), spec)
    assert noisy.dtype == np.float32
    # Few views of a narrow range add up to many times the range of the image.
    assert np.abs(noisy - expected).max() <= 1e-5 * max(1, np.ptp(expected) / 10)


@pytest.mark.parametrize(
    ("size", "n_views", "bound"),
    [
        (4, 1, 1e-5),
        (4, 16, 1e-5),
        (33, 132, 1e-5),
        (96, 1, 1e-5),
        (256, 1, 2e-5),
        (96, 384, 1e-5),
        (128, 30, 4e-5),
        (256, 60, 4e-5),
    ],
)
@pytest.mark.parametrize("kind", ["noise", "white", "black and white"])
def test_operator_equals_skimage_at_the_corners(
    size: int, n_views: int, bound: float, kind: str
) -> None:
    image = np.random.default_rng(size).random((size, size))
    if kind != "noise":
        image = (image > (0.5 if kind == "black and white" else 0)).astype(float)
    spec = NoiseSpec(n_views)
    noisy = RadonNoise(spec, size, size)(image[None])[0]
    assert np.abs(noisy - reference(image, spec)).max() <= bound


@settings(max_examples=40, deadline=None)
@example(exponent=-1, faint=0, n_views=25, shape=(64, 64))
@example(exponent=-5, faint=0, n_views=2, shape=(20, 20))
@example(exponent=-6, faint=4, n_views=19, shape=(64, 64))
@given(
    exponent=st.integers(-120, 60),
    faint=st.integers(0, 4),
    n_views=st.integers(1, 40),
    shape=st.sampled_from([(20, 20), (32, 17), (64, 64)]),
)
def test_images_of_any_brightness_and_company_have_noise_of_their_own(
    exponent: int, faint: int, n_views: int, shape: tuple[int, int]
) -> None:
    # Powers of two, so that the images themselves are exact.
    x = np.random.default_rng(n_views).uniform(-1, 1, (5, *shape)).astype(np.float32)
    noise = noise_operator(NoiseSpec(n_views), *shape)
    scale = np.ones((5, 1, 1), np.float32)
    scale[faint] = np.float32(2.0) ** exponent
    for call in (noise, noise.times, noise.project):
        error = call(scale * x) / scale - call(x)
        assert np.abs(error).max() <= 2e-6 * max(1, np.abs(call(x)).max())


def test_black_images_stay_black() -> None:
    assert np.abs(noise_operator(NoiseSpec(7), 20, 20)(np.zeros((2, 20, 20)))).max() < 1e-5


@pytest.mark.parametrize("size", [20, 45])
def test_operator_is_linear(size: int) -> None:
    noise = noise_operator(NoiseSpec(7), size, size)
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
    noise = noise_operator(NoiseSpec(5), size, size)
    x = np.random.default_rng(3).random((size, size), dtype=np.float32)
    np.testing.assert_allclose(noise.matrix() @ x.ravel(), noise(x).ravel(), atol=2e-5)


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(4, 50),
    width=st.integers(4, 50),
    n_views=st.integers(1, 40),
    name=st.sampled_from(FILTERS),
    angle_range=st.sampled_from([180.0, 120.0, 33.3]),
    n=st.sampled_from([1, 3, 8, 20, 70]),
    seed=st.integers(0, 2**32 - 1),
)
def test_transposed_is_the_adjoint(
    height: int, width: int, n_views: int, name: str, angle_range: float, n: int, seed: int
) -> None:
    # <A x, y> = <x, A^T y> for every pair of images.
    spec = NoiseSpec(min(n_views, 4 * max(height, width)), name, angle_range)
    noise = RadonNoise(spec, height, width)
    x, y = np.random.default_rng(seed).standard_normal((2, n, height, width)).astype(np.float32)
    there, back = noise.times(x), noise.transposed(y)
    left = (there.astype(np.float64) * y).sum((1, 2))
    right = (x.astype(np.float64) * back).sum((1, 2))
    scale = np.linalg.norm(there, axis=(1, 2)) * np.linalg.norm(y, axis=(1, 2))
    assert np.abs(left - right).max() <= 1e-5 * scale.max()


@pytest.mark.parametrize(("size", "n_views"), [(750, 3), (733, 2)])
def test_large_images_are_filtered_by_their_spectrum(size: int, n_views: int) -> None:
    image = np.random.default_rng(size).random((size, size))
    noise = RadonNoise(NoiseSpec(n_views), size, size)
    assert noise.n_bins > DENSE_BINS
    assert np.abs(noise(image[None])[0] - reference(image, NoiseSpec(n_views))).max() <= 4e-5


def test_an_operator_of_large_images_costs_nothing_to_keep() -> None:
    noise = RadonNoise(NoiseSpec(400), 3000, 4000)
    assert sum(getattr(value, "nbytes", 0) for value in vars(noise).values()) < 10_000
    # One image of 12 million pixels, as it comes in, goes out, and lies in tiles; two sinograms.
    assert 3 * 48e6 < working_bytes(3000, 4000, 400) < 3 * 48e6 + 60e6


def test_threads_do_not_disturb_each_other() -> None:
    x = np.random.default_rng(8).random((12, 40, 40), dtype=np.float32)
    noise = [noise_operator(NoiseSpec(k), 40, 40) for k in range(1, 13)]
    expected = [one(image) for one, image in zip(noise, x, strict=True)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for out, right in zip(
                pool.map(lambda k: noise[k](x[k]), range(12)), expected, strict=True
            ):
                np.testing.assert_array_equal(out, right)


def test_project_equals_skimage_radon() -> None:
    image = np.random.default_rng(4).random((30, 30))
    spec = NoiseSpec(11)
    sinogram = noise_operator(spec, 30, 30).project(image[None])[0]
    np.testing.assert_allclose(sinogram, radon(image, spec.theta, circle=False), atol=1e-5)


def test_channels_and_batches_are_independent() -> None:
    x = np.random.default_rng(5).random((3, 2, 24, 24), dtype=np.float32)
    noise = noise_operator(NoiseSpec(6), 24, 24)
    np.testing.assert_allclose(noise(x)[2, 1], noise(x[2, 1]), atol=1e-5)


@pytest.mark.parametrize("n", [1, 15, 128, 129, 300])
def test_blocks_leave_no_seam(n: int) -> None:
    x = np.random.default_rng(6).random((n, 16, 16), dtype=np.float32)
    noise = noise_operator(NoiseSpec(6), 16, 16)
    one_by_one = np.stack([noise(image[None])[0] for image in x])
    np.testing.assert_allclose(noise(x), one_by_one, atol=1e-6)


def test_empty_batch_stays_empty() -> None:
    assert noise_operator(NoiseSpec(6), 24, 24)(np.zeros((0, 1, 24, 24))).shape == (0, 1, 24, 24)


def test_fewer_views_are_noisier() -> None:
    x = np.zeros((28, 28), np.float32)
    x[8:20, 10:18] = 1
    errors = [
        np.square(noise_operator(NoiseSpec(k), 28, 28)(x) - x).mean() for k in (40, 20, 10, 5)
    ]
    assert errors == sorted(errors)


def test_hash_changes_with_every_setting() -> None:
    variants = [
        spec_hash(noise_specs(NoiseConfig(n_views=(20,))), 28),
        spec_hash(noise_specs(NoiseConfig(n_views=(20, 10))), 28),
        spec_hash(noise_specs(NoiseConfig(n_views=(20,), filter="hann")), 28),
        spec_hash(noise_specs(NoiseConfig(n_views=(20,), angle_range=120.0)), 28),
        spec_hash(noise_specs(NoiseConfig(n_views=(20,), photons=1000)), 28),
        spec_hash(noise_specs(NoiseConfig(n_views=(20,))), 32),
    ]
    assert len(set(variants)) == len(variants)


def test_too_small_images_are_refused() -> None:
    with pytest.raises(InputError, match="at least 4 pixels high and wide, but got 3x8"):
        RadonNoise(NoiseSpec(4), 3, 8)


def test_more_views_than_pixels_can_use_are_refused() -> None:
    with pytest.raises(InputError, match="at most 4 x the image size = 32, but got 33"):
        RadonNoise(NoiseSpec(33), 8, 8)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_pixels_that_are_no_numbers_are_refused(value: float) -> None:
    x = np.zeros((2, 16, 16), np.float32)
    x[1, 3, 4] = value
    with pytest.raises(InputError, match="Images must be finite"):
        noise_operator(NoiseSpec(6), 16, 16)(x)


@pytest.mark.parametrize("value", [3e37, -3e38, 1e300])
def test_pixels_too_large_to_be_summed_are_not_called_infinite(value: float) -> None:
    x = np.full((2, 1, 16, 16), value)
    with pytest.raises(InputError, match=r"white at 1, but some values are near \de\+"):
        noise_operator(NoiseSpec(6), 16, 16)(x)


@pytest.mark.parametrize("value", [-300.0, -0.3, 2.1, 255.0, 1000.0])
def test_photons_of_what_is_no_image_are_not_counted(value: float) -> None:
    x = np.zeros((2, 16, 16), np.float32)
    x[1, 3, 4] = value
    with pytest.raises(InputError, match="black at 0 and white at 1, but got values from"):
        noise_operator(NoiseSpec(6, photons=1000), 16, 16)(x)
    assert np.isfinite(noise_operator(NoiseSpec(6), 16, 16)(x)).all()


def test_the_most_photons_of_all_that_can_be_counted_are() -> None:
    for level in (-0.25, 0.0, 2.0):
        x = np.full((1, 40, 40), level, np.float32)
        assert np.isfinite(noise_operator(NoiseSpec(6, photons=10**18), 40, 40)(x)).all()


def test_integer_images_are_refused() -> None:
    with pytest.raises(InputError, match=r"float in \[0, 1\], but got uint8; divide by"):
        noise_operator(NoiseSpec(6), 16, 16)(np.zeros((1, 16, 16), np.uint8))


def test_photon_noise_is_unbiased_and_falls_with_the_root_of_the_count() -> None:
    image = np.zeros((24, 24), np.float32)
    image[6:18, 8:16] = 0.8
    exact = noise_operator(NoiseSpec(20), 24, 24)(image)
    copies = np.repeat(image[None], 400, axis=0)
    spread = {}
    for photons in (2_000, 200_000):
        noisy = noise_operator(NoiseSpec(20, photons=photons), 24, 24)(copies)
        spread[photons] = noisy.std(0).mean()
        # The logarithm of a Poisson count is off by half its inverse, less than 1/200 here.
        assert np.abs(noisy.mean(0) - exact).max() < 6 * noisy.std(0).max() / 20 + 0.01
    assert spread[2_000] / spread[200_000] == pytest.approx(10, rel=0.05)


def test_photons_are_counted_along_each_ray_and_none_counts_as_one() -> None:
    x = np.random.default_rng(0).random((2, 1, 12, 20)).astype(np.float32)
    exact = noise_operator(NoiseSpec(6), 12, 20).project(x)
    counted = noise_operator(NoiseSpec(6, photons=4), 12, 20).project(x, [3, 4])
    for image, seed in enumerate([3, 4]):
        expected = 4 * np.exp(-4 / 20 * exact[image, 0].T.astype(np.float64))
        counts = np.random.default_rng([seed, 0, 6]).poisson(expected)
        assert not counts.all()
        by_hand = -np.log(np.maximum(counts, 1) / 4) * 20 / 4
        # A draw may turn on the last digit of what is expected.
        assert np.isclose(counted[image, 0].T, by_hand, atol=1e-4).mean() > 0.99


def test_photon_noise_belongs_to_the_image_and_not_to_its_place() -> None:
    x = np.random.default_rng(7).random((5, 2, 16, 16), dtype=np.float32)
    noise = noise_operator(NoiseSpec(6, photons=1000), 16, 16)
    seeds = [11, 12, 13, 14, 15]
    noisy = noise(x, seeds)
    np.testing.assert_allclose(noise(x[3:], seeds[3:]), noisy[3:], atol=1e-6)
    assert np.abs(noise(x, [1, 2, 3, 4, 5]) - noisy).max() > 0.01
    same = noise(np.repeat(x[:1, :1], 2, axis=1), [11])[0]
    assert np.abs(same[0] - same[1]).max() > 0.01  # channels are measured one by one


def test_other_shape_is_refused() -> None:
    with pytest.raises(InputError, match="24x24 images, but got 24x25"):
        noise_operator(NoiseSpec(6), 24, 24)(np.zeros((1, 24, 25)))
    with pytest.raises(InputError, match="24x24 images, but got 24"):
        noise_operator(NoiseSpec(6), 24, 24)(np.zeros(24))


@pytest.mark.parametrize("n_views", [10, 24])
def test_mirroring_at_the_diagonal_mirrors_the_noise(n_views: int) -> None:
    # Of an even number of views; mirroring left to right moves the centre of even sizes.
    x = np.random.default_rng(0).random((1, 20, 20), dtype=np.float32)
    noise = noise_operator(NoiseSpec(n_views), 20, 20)
    np.testing.assert_allclose(noise(x.swapaxes(1, 2)), noise(x).swapaxes(1, 2), atol=2e-3)
    assert np.abs(noise(x[..., ::-1]) - noise(x)[..., ::-1]).max() > 0.1


def test_counted_sinograms_are_those_that_counted_images_are_made_of() -> None:
    images = np.random.default_rng(3).random((3, 2, 30, 30)).astype(np.float32)
    operator, seeds = noise_operator(NoiseSpec(9, photons=2000), 30, 30), [5, 6, 7]
    sinograms, noisy = operator.project(images, seeds), operator(images, seeds)
    assert np.abs(sinograms - noise_operator(NoiseSpec(9), 30, 30).project(images)).mean() > 0.01
    for index in np.ndindex(3, 2):
        made = iradon(
            sinograms[index].astype(float), theta=operator.spec.theta, circle=False, output_size=30
        )
        np.testing.assert_allclose(noisy[index], made, atol=1e-4)
