"""Measurements of codes, injection and uncertainty, on cases whose answer is known."""

from pathlib import Path

import numpy as np
import pytest
import torch

from snr_ray.config import Config
from snr_ray.hashing import hash64
from snr_ray.images.sources import open_source
from snr_ray.learning.batches import Pairs
from snr_ray.learning.checkpoint import TrainedModel, load_model
from snr_ray.noise.operator import noise_operator, noise_specs
from snr_ray.scoring import probes


@pytest.fixture(scope="module")
def trained(model_folder: Path) -> TrainedModel:
    return load_model(model_folder)


def _pairs(config: Config, split: str) -> Pairs:
    source = open_source("glyphs")
    rows = source.select(split, 2400)[:200]
    clean = np.stack([source.load(row, config.images) for row in rows])
    noisy = [[noise_operator(spec, 16, 16)(clean)] for spec in noise_specs(config.noise)]
    return Pairs([source.ids[row] for row in rows], [clean], noisy)


@pytest.fixture(scope="module")
def pairs(tiny: Config) -> Pairs:
    return _pairs(tiny, "val")


def test_ridge_probe_reads_what_is_linear() -> None:
    rng = np.random.default_rng(0)
    y, tested = rng.integers(0, 3, 300), rng.integers(0, 3, 100)
    corners = 2 * rng.normal(size=(3, 40))
    x, z = (corners[k] + 0.3 * rng.normal(size=(len(k), 40)) for k in (y, tested))
    assert (probes._ridge(x, y, z, 3) == tested).all()
    assert (probes._ridge(x, rng.permutation(y), z, 3) == tested).mean() < 0.7


def test_classes_are_probed_only_where_there_are_some(trained: TrainedModel, pairs: Pairs) -> None:
    labels = {name: name[0] for name in pairs.ids}
    known = probes.accuracies(trained, pairs, pairs, labels)
    unknown = probes.accuracies(trained, pairs, pairs, {})
    assert set(known) - set(unknown) == {
        "class_from_noise_code", "class_from_content_code", "chance_of_class"}  # fmt: skip
    assert known["noise_id"] == unknown["noise_id"]


def test_images_without_a_class_are_no_class(
    trained: TrainedModel, pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes = {name[:-1]: hash64(name) % 2 for name in pairs.ids}

    def codes(trained: TrainedModel, some: Pairs, *given: object) -> probes.Codes:
        found = real(trained, some, *given)  # with content that tells the class
        truth = np.array([classes[name[:-1]] for name in some.names(some.sample(probes.IMAGES))])
        found["content"] = np.eye(2)[np.tile(truth, 3)].astype(np.float32)
        return found

    real = probes._codes
    monkeypatch.setattr(probes, "_codes", codes)
    some = {
        name: "ab"[classes[name[:-1]]] for k, name in enumerate(sorted(pairs.ids)) if k % 4 == 0
    }
    assert probes.accuracies(trained, pairs, pairs, some)["class_from_content_code"] == 1
    others = Pairs([f"{name[:-1]}?" for name in pairs.ids], pairs.clean, pairs.noisy)
    unknown = some | dict.fromkeys(others.ids, "c")
    assert "class_from_content_code" not in probes.accuracies(trained, pairs, others, unknown)


def test_uncertainty_finds_the_factor(
    trained: TrainedModel, pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)

    def sampled(*_: object) -> tuple[np.ndarray, np.ndarray]:
        deviation = rng.uniform(0.01, 0.1, 40_000)
        return deviation, 2.5 * deviation * rng.standard_normal(40_000)

    monkeypatch.setattr(probes, "_sampled", sampled)
    for found in probes.uncertainty(trained, pairs, pairs).values():
        assert found["scale"] == pytest.approx(2.5, rel=0.02)
        assert found["calibration_error"] < 0.05
        assert found["correlation"] > 0.3


def test_pixels_that_are_surely_black_do_not_spoil_the_calibration(
    trained: TrainedModel, pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)

    def sampled(*_: object) -> tuple[np.ndarray, np.ndarray]:
        deviation = rng.uniform(0.01, 0.1, 40_000) * (np.arange(40_000) % 2)
        return deviation, deviation * rng.standard_normal(40_000) + 1e-4

    monkeypatch.setattr(probes, "_sampled", sampled)
    for found in probes.uncertainty(trained, pairs, pairs).values():
        assert found["calibration_error"] < 0.05


def test_perfect_injection_fools_the_classifier_and_none_does_not(
    trained: TrainedModel, pairs: Pairs, tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = _pairs(tiny, "test")
    every = [p.take(np.arange(len(p)), k) for k in range(3) for p in (pairs, test)]
    clean = torch.from_numpy(np.concatenate(every[:2])).flatten(1)
    noisy = [np.concatenate(every[2 * k : 2 * k + 2]) for k in range(3)]

    def perfect(_: object, images: np.ndarray, code: list[torch.Tensor]) -> np.ndarray:
        rows = [int((clean - x).abs().sum(1).argmin()) for x in torch.from_numpy(images).flatten(1)]
        noise_id = next(k for k in (1, 2) if torch.equal(code[0], trained.codes.mean(k)[0]))
        return noisy[noise_id][rows]

    monkeypatch.setattr(probes, "swap", perfect)
    fooled = probes.injected_or_true(trained, pairs, test)
    assert all(0.35 < accuracy < 0.65 for accuracy in fooled.values()), fooled
    monkeypatch.setattr(probes, "swap", lambda model, images, code: images)
    told = probes.injected_or_true(trained, pairs, test)
    assert all(accuracy > 0.85 for accuracy in told.values()), told
