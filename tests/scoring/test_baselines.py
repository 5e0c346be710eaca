"""SART, against scikit-image's and against the noisy images that it is to beat."""

import numpy as np
import pytest
from skimage.data import shepp_logan_phantom
from skimage.transform import iradon_sart, radon, resize

from snr_ray.learning.batches import Pairs
from snr_ray.metrics import psnr
from snr_ray.noise.operator import NoiseSpec, noise_operator
from snr_ray.noise.spec import photon_seeds
from snr_ray.scoring.baselines import SART_ITERATIONS, SART_RELAXATION, Fitting, fit_sart, sart
from snr_ray.scoring.cases import Case


def _phantom(height: int, width: int) -> np.ndarray:
    image = resize(shepp_logan_phantom(), (height, width), anti_aliasing=True)
    return image.astype(np.float32)[None, None]


def test_sart_is_that_of_scikit_image() -> None:
    clean, spec = _phantom(24, 24), NoiseSpec(9)
    sinogram, image = radon(clean[0, 0].astype(float), spec.theta, circle=False), None
    for _ in range(SART_ITERATIONS):
        image = iradon_sart(sinogram, spec.theta, image=image, relaxation=SART_RELAXATION)
    assert image is not None
    margin = len(sinogram) // 2 - 12
    expected = image[margin : margin + 24, margin : margin + 24]
    np.testing.assert_allclose(sart(clean, noise_operator(spec, 24, 24))[0, 0], expected, atol=1e-4)


@pytest.mark.parametrize("shape", [(32, 32), (33, 33), (24, 40)])
@pytest.mark.parametrize("n_views", [8, 24])
def test_sart_beats_the_noisy_image(shape: tuple[int, int], n_views: int) -> None:
    clean, noise = _phantom(*shape), noise_operator(NoiseSpec(n_views), *shape)
    both = np.concatenate([clean, clean[..., ::-1]], axis=1)  # two channels
    cleaned = sart(both, noise)
    assert cleaned.shape == both.shape
    assert psnr(cleaned, both)[0] > psnr(noise(both), both)[0] + 2


def test_sart_gets_the_photons_that_the_id_of_an_image_draws() -> None:
    spec, names = NoiseSpec(9, photons=500), ["a", "b"]
    noise, clean = noise_operator(spec, 24, 24), _phantom(24, 24).repeat(2, axis=0)

    def unread() -> Pairs:
        raise AssertionError("SART has nothing to fit")

    ids = np.ones(2, np.int64)
    case = Case("remove", names, clean, noise(clean, photon_seeds(names)), ids, spec)
    made = fit_sart(Fitting([spec], unread, unread), 1)(case)
    for k, name in enumerate(names):
        alone = sart(clean[k : k + 1], noise, photon_seeds([name]))
        np.testing.assert_allclose(made[k], alone[0], atol=1e-4)
