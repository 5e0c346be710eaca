"""One pass over images says all that is known of them: result, explained, view count."""

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from random_models import images

from snr_ray.config import ImagesConfig
from snr_ray.images.sources import open_source
from snr_ray.learning.checkpoint import load_model
from snr_ray.network.swap import NoiseCodes, detect, exchange, explained, read_views, swap
from snr_ray.noise.operator import NoiseSpec, noise_operator


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
    apart = explained(trained.model, noisy, found.images, geometry)
    np.testing.assert_allclose(found.explained, apart, atol=1e-4)
    assert found.n_views is not None
    assert set(found.n_views) <= {0, 12, 6}


@pytest.mark.parametrize(("name", "told"), [("cifar10", False), ("any", False), ("any", True)])
@pytest.mark.parametrize("colour", [0, 1, 2])
def test_black_channels_have_no_say_in_the_view_count(name: str, told: bool, colour: int) -> None:
    source, config = open_source("photos"), ImagesConfig(size=32)
    clean = np.stack([source.load(row, config) for row in source.select("test")[:4]])
    grey = noise_operator(NoiseSpec(10), 32, 32)(clean)
    rgb = np.zeros((4, 3, 32, 32), np.float32)
    rgb[:, colour] = grey[:, 0]
    trained, counts = load_model(name), np.full(4, 10) if told else None
    code = trained.codes.mean(0)
    alone, found = (
        exchange(trained.model, x, code, told=counts, explain=True) for x in (grey, rgb)
    )
    assert alone.n_views is not None
    assert found.n_views is not None
    assert (alone.n_views > 0).all()
    np.testing.assert_array_equal(found.n_views, alone.n_views)
    assert found.explained is not None
    np.testing.assert_allclose(
        explained(trained.model, rgb, found.images, told=counts), found.explained, atol=1e-3
    )


def test_flat_images_have_a_view_count_too(model_folder: Path) -> None:
    flat = np.full((2, 3, 16, 16), 0.5, np.float32)
    found, trained = [], load_model(model_folder)
    for images_ in (flat, flat[:, :1]):
        n_views = exchange(trained.model, images_, trained.codes.mean(0)).n_views
        assert n_views is not None
        found.append(n_views)
    np.testing.assert_array_equal(*found)


def test_noise_ids_are_told_apart_by_what_varies_least() -> None:
    rng = np.random.default_rng(0)

    def codes(noise_id: int, n: int) -> torch.Tensor:
        values = rng.standard_normal((n, 2, 1, 1), np.float32)
        values[:, 0] *= 3
        values[:, 1] = noise_id + 0.1 * values[:, 1]
        return torch.from_numpy(values)

    known = NoiseCodes([torch.stack([codes(k, 50) for k in range(3)])])
    for noise_id in range(3):
        np.testing.assert_array_equal(known.detect([codes(noise_id, 40)]), [noise_id] * 40)


def test_a_model_of_rgb_answers_to_grey_images_with_the_mean_of_its_channels() -> None:
    trained, grey = load_model("cifar10-rgb"), images(2)
    code = trained.codes.mean(0)
    rgb = swap(trained.model, grey.repeat(3, axis=1), code)
    assert np.ptp(rgb, axis=1).max() > 0.01
    found = exchange(trained.model, grey, code, explain=True)
    np.testing.assert_allclose(found.images, rgb.mean(1, keepdims=True), rtol=1e-5)
    apart = explained(trained.model, grey, found.images)  # of the answer, not of what it is made of
    np.testing.assert_allclose(found.explained, apart, atol=1e-4)


def test_of_no_images_nothing_is_known(model_folder: Path) -> None:
    trained, nothing = load_model(model_folder), images(2)[:0]
    assert explained(trained.model, nothing, nothing).shape == (0,)
    assert detect(trained.model, trained.codes, nothing).shape == (0,)
    assert read_views(trained.model, nothing).shape == (0,)


def test_a_decoder_that_learns_noise_has_no_word_on_it(blind_folder: Path) -> None:
    trained = load_model(blind_folder)
    found = exchange(trained.model, images(2), trained.codes.mean(0), explain=True)
    assert (found.explained, found.n_views) == (None, None)
    nothing = exchange(trained.model, images(2)[:0], None, explain=True)
    assert (nothing.images.shape, nothing.explained) == ((0, 1, 16, 16), None)
