"""The models that come with snr_ray: small, described, and as good as the day they were shipped."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage import data

from snr_ray.configfile import shipped_models
from snr_ray.images.sources import open_source
from snr_ray.learning.checkpoint import load_model
from snr_ray.learning.modelfolder import model_path
from snr_ray.metrics import psnr
from snr_ray.network.swap import exchange, swap
from snr_ray.network.trust import doubtful
from snr_ray.noise.operator import NoiseSpec, noise_operator, noise_specs

FLOORS = {
    "cifar10": ("photos", (45.7, 38.6, 31.8)),
    "cifar10-rgb": ("photos", (43.1, 37.0, 30.7)),
    "notmnist": ("glyphs", (51.4, 46.2, 42.4)),
    "places64": ("photos", (41.2, 35.3, 29.8)),
    "places64-rgb": ("photos", (39.2, 33.8, 28.1)),
}
"""Images to try a model on that it was not trained on, and PSNR in dB at 40, 20 and 10 views."""
RANGES = {
    "any": {(28, 17): 37.4, (64, 40): 42.0, (64, 13): 31.7, (96, 35): 39.6},
    "ct": {(28, 17): 36.9, (64, 40): 41.6, (64, 13): 30.8, (96, 35): 39.5},
}
"""Models of a range, by size and view count: PSNR in dB of photographs, told the view count."""


def test_every_shipped_model_is_guarded() -> None:
    assert set(FLOORS) | set(RANGES) == set(shipped_models())


@pytest.mark.parametrize("name", [*FLOORS, *RANGES])
def test_shipped_model_is_small_and_described(name: str) -> None:
    folder = model_path(name)
    assert (folder / "model.safetensors").stat().st_size < 10e6
    card = (folder / "README.md").read_text()
    scored = "images of the test split" if name in FLOORS else "never trained on"
    for part in ("trained on", "made by", "config.yaml", "Limits", scored):
        assert part in card, part
    images = json.loads((folder / "metrics.json").read_text())["images"]
    assert images >= (300 if name in FLOORS else 5)


@pytest.mark.parametrize("name", [*FLOORS, *RANGES])
def test_bfloat16_costs_next_to_nothing_where_a_model_may_use_it(name: str) -> None:
    trained = load_model(name)
    size, source = trained.config.images.size, open_source("photos")
    rows = source.select("test")[:12]
    clean = np.stack([source.load(row, trained.config.images) for row in rows])
    noisy = noise_operator(NoiseSpec(20), size, size)(clean)
    scores = []
    for half in (False, trained.bf16):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            made = swap(trained.model, noisy, trained.codes.mean(0), geometry=NoiseSpec(20))
        scores.append(psnr(made, clean).mean())
    assert scores[1] == pytest.approx(scores[0], abs=0.05)


@pytest.mark.parametrize("name", RANGES)
def test_shipped_model_of_a_range_serves_sizes_and_view_counts(name: str) -> None:
    trained = load_model(name)
    source, images = open_source("photos"), trained.config.images
    rows = source.select("test")[:12]
    for (size, n_views), floor in RANGES[name].items():
        its = dataclasses.replace(images, size=size)
        clean = np.stack([source.load(row, its) for row in rows])
        noisy = noise_operator(NoiseSpec(n_views), size, size)(clean)
        assert trained.views is not None
        least, most = trained.views.counts(size)
        assert least <= n_views <= most
        made = exchange(
            trained.model, noisy, trained.codes.mean(0), geometry=NoiseSpec(n_views), explain=True
        )
        assert psnr(made.images, clean).mean() > floor, f"{size} px, {n_views} views"
        assert made.explained is not None
        told = np.full(len(noisy), n_views)
        assert not doubtful(made.explained, told, size, trained.least_explained).any()
        guesses = trained.guess_views(noisy)
        assert np.median(np.abs(np.log(guesses / n_views))) < 0.3
        injected = swap(trained.model, clean, trained.codes.mean(1), wanted=n_views)
        assert psnr(injected, noisy, clip=False).mean() > 42


@pytest.mark.parametrize("name", FLOORS)
def test_shipped_model_keeps_its_psnr(name: str) -> None:
    trained = load_model(name)
    images, floors = FLOORS[name]
    source, size = open_source(images), trained.config.images.size
    rows = source.select("test")[:64]
    clean = np.stack([source.load(row, trained.config.images) for row in rows])
    for spec, floor in zip(noise_specs(trained.config.noise), floors, strict=True):
        noisy = noise_operator(spec, size, size)(clean)
        cleaned = psnr(swap(trained.model, noisy, trained.codes.mean(0)), clean).mean()
        assert cleaned > floor, f"{spec.n_views} views"


def doubts(name: str, images: np.ndarray) -> np.ndarray:
    """What `snr denoise` would say of images [B, C, H, W]: doubtful or not, [B]."""
    trained = load_model(name)
    made = exchange(trained.model, images, trained.codes.mean(0), explain=True)
    assert made.explained is not None
    assert made.n_views is not None
    side = max(images.shape[2:])
    return doubtful(made.explained, made.n_views, side, trained.least_explained)


@pytest.mark.parametrize("name", FLOORS)
def test_good_answers_of_a_shipped_model_are_trusted(name: str) -> None:
    trained = load_model(name)
    source, size = open_source(FLOORS[name][0]), trained.config.images.size
    clean = np.stack([source.load(row, trained.config.images) for row in source.select("val")[:24]])
    known = {n_views / size for n_views in trained.config.noise.n_views}
    assert {round(at, 3) for at in trained.least_explained} == {round(at, 3) for at in known}
    for spec in noise_specs(trained.config.noise):
        noisy = noise_operator(spec, size, size)(clean)
        stored = np.round(noisy.clip(0, 1) * 255).astype(np.float32) / 255
        assert not doubts(name, np.concatenate([noisy, stored])).any()
    assert not doubts(name, clean).any()


@pytest.mark.parametrize("stored", [False, True])
def test_sizes_that_a_shipped_model_ruins_are_doubtful(stored: bool) -> None:
    """256 px of 20 views went in at 15 dB and came out at 7, with nothing said."""
    photo = data.camera().astype(np.float32) / 255
    clean = photo.reshape(256, 2, 256, 2).mean((1, 3))[None, None]
    noisy = noise_operator(NoiseSpec(20), 256, 256)(clean)
    if stored:
        noisy = np.round(noisy.clip(0, 1) * 255).astype(np.float32) / 255
    assert doubts("places64", noisy).all()


def test_a_view_count_that_a_shipped_model_does_not_know_is_doubtful() -> None:
    source = open_source("glyphs")
    images = load_model("notmnist").config.images
    clean = np.stack([source.load(row, images) for row in source.select("val")[:24]])
    assert doubts("notmnist", noise_operator(NoiseSpec(6), 28, 28)(clean)).all()


def test_folder_of_the_same_name_comes_first(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = next(iter(FLOORS))
    assert model_path(name).name == name
    assert model_path(name) != Path(name)
    Path(name).mkdir()
    assert model_path(name) == Path(name)
