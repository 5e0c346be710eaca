"""Filtered back projection of measured sinograms against scikit-image."""

import numpy as np
import pytest
from skimage.data import shepp_logan_phantom
from skimage.transform import iradon, radon, resize

from snr_ray.errors import InputError
from snr_ray.noise.fbp import back_project, binned, line_integrals
from snr_ray.noise.operator import NoiseSpec, noise_operator

THETA = np.arange(20) * 9.0


def _sinogram(n_bins: int) -> np.ndarray:
    """[A, N] of a phantom."""
    image = np.pad(resize(shepp_logan_phantom(), (n_bins - 12, n_bins - 12)), 6)
    return radon(image, THETA, circle=True).T.astype(np.float32)


@pytest.mark.parametrize("n_bins", [40, 41])
@pytest.mark.parametrize("filter", ["ramp", "hann", "shepp-logan", "none"])
def test_it_equals_scikit_image(n_bins: int, filter: str) -> None:
    sinogram = _sinogram(n_bins)
    for size in (n_bins, 27):
        expected = iradon(sinogram.T, THETA, output_size=size, circle=False,
                          filter_name=None if filter == "none" else filter)  # fmt: skip
        image = back_project(sinogram, THETA, size=size, filter=filter)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(image, expected, atol=2e-6 * scale * len(THETA))


def test_it_makes_of_true_projections_what_the_noise_operator_makes() -> None:
    rng = np.random.default_rng(0)
    clean = rng.random((32, 32), dtype=np.float32)
    operator = noise_operator(NoiseSpec(20), 32, 32)
    image = back_project(operator.project(clean).T, THETA, size=32)
    np.testing.assert_allclose(image, operator(clean), atol=2e-4)


def test_another_centre_is_the_same_image_of_a_shifted_detector() -> None:
    sinogram = np.pad(_sinogram(40), ((0, 0), (10, 10)))
    moved = np.roll(sinogram, 3, axis=1)
    expected = back_project(sinogram, THETA, size=24)
    np.testing.assert_allclose(back_project(moved, THETA, size=24, center=33.0), expected,
                               atol=1e-6)  # fmt: skip


def test_counts_become_line_integrals_and_dead_bins_become_air() -> None:
    integrals = np.array([[[0.5, 1.0, 0.0, 2.0]]], np.float32).repeat(3, 0)
    darks, flats = np.full((2, 1, 4), 10.0, np.float32), np.full((5, 1, 4), 1010.0, np.float32)
    counts = 10 + 1000 * np.exp(-integrals)
    np.testing.assert_allclose(line_integrals(counts, flats, darks), integrals, atol=1e-5)
    flats[..., 1] = 10.0
    dead = line_integrals(counts, flats, darks)
    assert (dead[..., 1] == 0).all()
    nothing = np.zeros_like(counts)
    lone = nothing.copy()
    lone[0, 0, 2] = counts[0, 0, 2]
    assert np.isfinite(line_integrals(lone, flats, darks)).all()
    for none in (nothing, -counts, np.where(flats[:3] == 10.0, counts, 0)):
        with pytest.raises(InputError, match=r"Counts must be brighter than --darks, .* no bin of"):
            line_integrals(none, flats, darks)
    with pytest.raises(InputError, match="--flats must be brighter than --darks"):
        line_integrals(counts, darks, darks)
    with pytest.raises(InputError, match=r"--flats must have the rows and bins .* \[1, 4\], but"):
        line_integrals(counts, flats[..., :3], darks)


def test_bins_are_averaged_and_the_rest_dropped() -> None:
    np.testing.assert_array_equal(binned(np.arange(7, dtype=np.float32)[None], 3), [[1.0, 4.0]])


def test_bad_settings_are_one_sentence() -> None:
    sinogram = np.zeros((20, 40), np.float32)
    with pytest.raises(InputError, match="--center must be a bin of the detector, 0 to 39"):
        back_project(sinogram, THETA, center=40)
    with pytest.raises(InputError, match="there are 3 angles of 20 views"):
        back_project(sinogram, THETA[:3])
    with pytest.raises(InputError, match=r"--filter must be out of ramp, .* but got 'cos'"):
        back_project(sinogram, THETA, filter="cos")
