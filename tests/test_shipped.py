"""The models that come with snr_ray: small, described, and as good as the day they were shipped."""

import json
from pathlib import Path

import numpy as np
import pytest

from snr_ray.configfile import shipped_models
from snr_ray.images.sources import open_source
from snr_ray.learning.checkpoint import load_model, model_path
from snr_ray.metrics import psnr
from snr_ray.network.swap import swap
from snr_ray.noise.operator import noise_operator, noise_specs

FLOORS = {
    "cifar10": ("photos", (45.7, 38.6, 31.8)),
    "cifar10-rgb": ("photos", (43.1, 37.0, 30.7)),
    "notmnist": ("glyphs", (51.4, 46.2, 42.4)),
    "places64": ("photos", (41.2, 35.3, 29.8)),
    "places64-rgb": ("photos", (39.2, 33.8, 28.1)),
}
"""Images to try a model on that it was not trained on, and PSNR in dB at 40, 20 and 10 views."""


def test_every_shipped_model_is_guarded() -> None:
    assert set(FLOORS) == set(shipped_models())


@pytest.mark.parametrize("name", FLOORS)
def test_shipped_model_is_small_and_described(name: str) -> None:
    folder = model_path(name)
    assert (folder / "model.safetensors").stat().st_size < 3 * 2**20
    card = (folder / "README.md").read_text()
    for part in ("trained on", "made by", "config.yaml", "Limits", "images of the test split"):
        assert part in card, part
    assert json.loads((folder / "metrics.json").read_text())["images"] >= 300


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


def test_folder_of_the_same_name_comes_first(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = next(iter(FLOORS))
    assert model_path(name).name == name
    assert model_path(name) != Path(name)
    Path(name).mkdir()
    assert model_path(name) == Path(name)
