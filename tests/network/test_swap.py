"""One pass over images says all that is known of them: result, explained, view count."""

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from random_models import images

from snr_ray.learning.checkpoint import load_model
from snr_ray.network.swap import exchange, explained, swap
from snr_ray.noise.operator import NoiseSpec


@pytest.mark.parametrize("geometry", [None, NoiseSpec(9)])
@pytest.mark.parametrize("channels", [1, 3])
def test_one_pass_gives_what_swap_and_explained_give(
    model_folder: Path, geometry: NoiseSpec | None, channels: int
) -> None:
    trained, noisy = load_model(model_folder), images(3, channels=channels)
    mean = trained.codes.mean(0)
    with mock.patch.object(trained.model, "bottom_up", wraps=trained.model.bottom_up) as looked:
        found = exchange(trained.model, noisy, mean, geometry=geometry, explain=True)
    assert looked.call_count == 1
    np.testing.assert_array_equal(found.images, swap(trained.model, noisy, mean, geometry=geometry))
    assert found.explained is not None
    if geometry is not None or channels == 1:  # blind, each channel has a noise code of its own
        apart = explained(trained.model, noisy, found.images, geometry)
        np.testing.assert_allclose(found.explained, apart, atol=1e-4)
    assert found.n_views is not None
    assert set(found.n_views) <= {0, 12, 6}


def test_a_decoder_that_learns_noise_has_no_word_on_it(blind_folder: Path) -> None:
    trained = load_model(blind_folder)
    found = exchange(trained.model, images(2), trained.codes.mean(0), explain=True)
    assert (found.explained, found.n_views) == (None, None)
    nothing = exchange(trained.model, images(2)[:0], None, explain=True)
    assert (nothing.images.shape, nothing.explained) == ((0, 1, 16, 16), None)
