"""The front door for Python: shapes come back, answers are those of the command line's model."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import snr_ray
from snr_ray.config import ImagesConfig
from snr_ray.errors import InputError
from snr_ray.images.sources import open_source
from snr_ray.network.swap import swap
from snr_ray.stages.denoising.fileswap import FileSwapper
from snr_ray.stages.denoising.imagefiles import Stack


@pytest.fixture(scope="module")
def clean() -> np.ndarray:
    return np.random.default_rng(0).random((5, 1, 16, 18), dtype=np.float32)


@pytest.mark.parametrize(
    "shape", [(16, 18), (1, 16, 18), (3, 16, 18), (2, 3, 16, 18), (0, 1, 9, 9)]
)
def test_cleaned_images_have_the_shape_and_range_of_images(
    model_folder: Path, shape: tuple[int, ...]
) -> None:
    images = np.random.default_rng(1).random(shape)
    out = snr_ray.denoise(images, model_folder)
    assert out.shape == shape
    assert out.dtype == np.float32
    assert out.size == 0 or 0 <= out.min() <= out.max() <= 1


@pytest.mark.parametrize("n_views", [None, 7])
def test_arrays_are_cleaned_as_files_are(
    model_folder: Path, clean: np.ndarray, n_views: int | None
) -> None:
    model = snr_ray.load_model(model_folder)
    noisy = snr_ray.add_noise(clean, 7)
    geometry = None if n_views is None else model.geometry(n_views)
    expected = swap(model.model, noisy, model.codes.mean(0), geometry=geometry)
    out = snr_ray.denoise(noisy, model, n_views=n_views)
    np.testing.assert_allclose(out, expected.clip(0, 1), atol=1e-6)


@pytest.mark.parametrize("n_views", [9, 24])
def test_a_model_of_a_range_finds_view_counts_as_it_does_of_files(n_views: int) -> None:
    source, config = open_source("photos"), ImagesConfig(size=48)
    clean = np.stack([source.load(row, config) for row in (3, 900, 2000)])
    noisy, model = snr_ray.add_noise(clean, n_views), snr_ray.load_model("any")
    code = [level.numpy() for level in model.codes.mean(0)]
    answer = FileSwapper(model, code).answer(Stack(noisy, [(k, 0) for k in range(3)], list("abc")))
    assert answer.n_views is not None
    assert answer.n_views.tolist() == [n_views] * 3
    out = snr_ray.denoise(noisy, model)
    np.testing.assert_array_equal(out, answer.images.clip(0, 1))
    np.testing.assert_allclose(out, snr_ray.denoise(noisy, model, n_views=n_views), atol=1e-3)


@pytest.mark.parametrize("name", ["places64", "any"])
@pytest.mark.parametrize("side", [4, 8, 9])
def test_the_smallest_images_are_cleaned_by_models_of_more_views_than_they_hold(
    name: str, side: int
) -> None:
    images = np.random.default_rng(3).random((3, 1, side, side), dtype=np.float32)
    assert snr_ray.denoise(images, name).shape == images.shape


def test_a_stack_too_large_for_one_pass_is_cleaned_as_its_images_are(
    model_folder: Path, clean: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = snr_ray.denoise(clean, model_folder)
    monkeypatch.setattr("snr_ray.notebook.PASS_PIXELS", 2 * 16 * 18)
    np.testing.assert_allclose(snr_ray.denoise(clean, model_folder), whole, atol=1e-5)


def test_a_model_with_physics_detects_or_is_told(physics_folder: Path) -> None:
    model = snr_ray.load_model(physics_folder)
    image = np.random.default_rng(2).random((16, 16), dtype=np.float32)
    views = model.config.noise.n_views[0]
    assert snr_ray.denoise(image, model, n_views=views).shape == image.shape
    assert snr_ray.denoise(image, model).shape == image.shape


def test_images_that_must_not_be_written_to_are_cleaned_without_a_word(
    model_folder: Path, clean: np.ndarray
) -> None:
    """As of a file that is mapped into memory; pytest takes torch's warning for an error."""
    model, noisy = snr_ray.load_model(model_folder), snr_ray.add_noise(clean, 9)
    kept = noisy.copy()
    kept.flags.writeable = False
    torch.set_warn_always(True)  # else once in a process
    try:
        out = snr_ray.denoise(kept, model)
    finally:
        torch.set_warn_always(False)
    np.testing.assert_array_equal(out, snr_ray.denoise(noisy, model))


def test_arrays_and_files_are_cleaned_in_bfloat16_where_a_model_may(
    model_folder: Path, clean: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("snr_ray.learning.checkpoint.multiplies_bf16", lambda device: True)
    whole, noisy = snr_ray.load_model(model_folder), snr_ray.add_noise(clean, 7)
    half, stack = replace(whole, bf16=True), Stack(noisy, [(k, 0) for k in range(5)], list("abcde"))
    code = [level.numpy() for level in whole.codes.mean(0)]
    with torch.autocast("cpu", torch.bfloat16):
        expected = swap(half.model, noisy, half.codes.mean(0)).clip(0, 1)
    for model in (whole, half):
        for out in (snr_ray.denoise(noisy, model), FileSwapper(model, code).answer(stack).images):
            assert out.dtype == np.float32
            assert np.array_equal(out.clip(0, 1), expected) == (model is half)


def test_noise_is_that_of_the_spec(clean: np.ndarray) -> None:
    by_count = snr_ray.add_noise(clean, 9)
    by_spec = snr_ray.add_noise(clean, snr_ray.NoiseSpec(9))
    np.testing.assert_array_equal(by_count, by_spec)
    limited = snr_ray.add_noise(clean, snr_ray.NoiseSpec(9, angle_range=90))
    assert np.abs(limited - by_count).max() > 0.01


@pytest.mark.parametrize("shape", [(0, 1, 28, 28), (2, 0, 28, 28), (0, 28, 28)])
@pytest.mark.parametrize("photons", [0, 100])
def test_no_images_have_no_noise(shape: tuple[int, ...], photons: int) -> None:
    noisy = snr_ray.add_noise(np.zeros(shape), snr_ray.NoiseSpec(9, photons=photons))
    assert (noisy.shape, noisy.dtype) == (shape, np.float32)


@pytest.mark.parametrize("n_views", [1, 2, 9])
@pytest.mark.parametrize("photons", [0, 1, 5, 100])
@pytest.mark.parametrize("angle_range", [180.0, 30.0])
def test_the_strongest_noise_of_images_is_taken(
    model_folder: Path, clean: np.ndarray, n_views: int, photons: int, angle_range: float
) -> None:
    spec = snr_ray.NoiseSpec(n_views, angle_range=angle_range, photons=photons)
    images = np.concatenate([clean, np.zeros_like(clean[:1]), np.round(clean)])
    snr_ray.denoise(snr_ray.add_noise(images, spec), model_folder)


@pytest.mark.parametrize(
    ("scale", "offset"),
    [(2000, -1000), (40, -60), (100, -49), (255, 0), (1e30, 0), (1e300, 0), (1, -1.5)],
)
def test_one_image_of_other_units_is_refused_whatever_its_company(
    model_folder: Path, clean: np.ndarray, scale: float, offset: float
) -> None:
    images = clean.astype(np.float64)
    images[3] = scale * images[3] + offset
    with pytest.raises(InputError, match=r"but image 3 has a mean of .* scale them first"):
        snr_ray.denoise(images, model_folder)


def test_wrong_input_is_one_sentence(
    model_folder: Path, blind_folder: Path, clean: np.ndarray
) -> None:
    cases = [
        (lambda: snr_ray.denoise(clean[:, 0], model_folder), "a stack of grey images is images"),
        (lambda: snr_ray.denoise((255 * clean).astype(np.uint8), model_folder), "divide by"),
        (lambda: snr_ray.denoise(clean * np.nan, model_folder), "must be finite"),
        (lambda: snr_ray.denoise(clean, blind_folder, n_views=9), "this one is blind"),
        (lambda: snr_ray.denoise(clean, "nosuch"), "come with snr_ray"),
        (
            lambda: snr_ray.denoise(255 * clean, model_folder),
            "black at 0 and white at 1, but image 0",
        ),
        (lambda: snr_ray.denoise(np.zeros((0, 5)), model_folder), r"have pixels, but got \[0, 5\]"),
        (lambda: snr_ray.denoise(np.zeros((1, 1, 0, 0)), model_folder), "must have pixels"),
        (lambda: snr_ray.denoise(np.zeros((1, 1, 28, 0)), model_folder), "must have pixels"),
        (lambda: snr_ray.denoise(np.zeros((1, 0, 28, 28)), model_folder), "1 or 3 channels C"),
        (lambda: snr_ray.denoise(clean.tolist(), model_folder), "a NumPy array, but got list"),
        (lambda: snr_ray.denoise(np.ma.masked_less(clean, 0.5), model_folder), "are masked; give"),
        (lambda: snr_ray.add_noise(np.ma.masked_less(clean, 0.5), 9), "are masked; give"),
        (lambda: snr_ray.denoise(clean, model_folder, n_views=9.5), "whole number .* got 9.5"),
        (lambda: snr_ray.denoise(clean, model_folder, n_views="detect"), "whole number .*'detect'"),
        (lambda: snr_ray.add_noise(clean, True), "whole number .* got True"),
        (lambda: snr_ray.add_noise(clean, [9, 6]), r"whole number .* got \[9, 6\]"),
        (lambda: snr_ray.add_noise(np.zeros((0, 5)), 9), "at least 4 pixels high and wide"),
        (lambda: snr_ray.add_noise(1000 * clean, snr_ray.NoiseSpec(9, photons=99)), "scale them"),
        (lambda: snr_ray.add_noise(clean, 0), "at least 1"),
        (lambda: snr_ray.add_noise(clean[0, 0, 0], 9), r"\[\.\.\., H, W\]"),
    ]
    for call, sentence in cases:
        with pytest.raises(InputError, match=sentence):
            call()


def test_the_door_opens_only_where_it_is_used() -> None:
    code = ("import sys, snr_ray; early = 'torch' in sys.modules; snr_ray.add_noise; "
            "print(early, 'ray' in sys.modules)")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nosuch"):
        snr_ray.nosuch  # noqa: B018
