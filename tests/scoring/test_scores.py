"""Every method on one block, at the model's own noise and elsewhere, without Ray."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from snr_ray import configfile as configs
from snr_ray.config import Config, ImagesConfig, NoiseConfig
from snr_ray.images.sources import open_source
from snr_ray.learning.batches import Pairs
from snr_ray.learning.build import build_model
from snr_ray.learning.checkpoint import TrainedModel, TrainedUNet, load_model
from snr_ray.metrics import psnr
from snr_ray.network.itnet import ItNet
from snr_ray.noise.operator import noise_operator, noise_specs
from snr_ray.scoring.methods import BASELINES, METHODS, QUICK_BASELINES
from snr_ray.scoring.scores import Row, Scorer


@pytest.fixture(scope="module")
def trained(model_folder: Path) -> TrainedModel:
    return load_model(model_folder)


def _pairs(name: str, size: int, noise: NoiseConfig, n: int) -> Pairs:
    source, config = open_source(name), ImagesConfig(size=size)
    rows = source.select("test")[:n]
    clean = np.stack([source.load(row, config) for row in rows])
    noisy = [[noise_operator(spec, size, size)(clean)] for spec in noise_specs(noise)]
    return Pairs([source.ids[row] for row in rows], [clean], noisy)


def test_elsewhere_images_are_cleaned_blind_told_and_found(trained: TrainedModel) -> None:
    noise = NoiseConfig(n_views=(20, 7))
    pairs = _pairs("photos", 32, noise, 3)
    scores = Scorer(trained, {}, {}, pairs, noise).run()
    methods = ("noisy", "swap", "swap_told", "swap_found")
    assert set(scores) == {
        Row(task, method, views)
        for task in ("remove", "remove_grainy", "remove_stored")
        for method in methods
        for views in (20, 7)
    }
    clean = pairs.take(np.arange(3), 0)
    noisy = scores[Row("remove", "noisy", 7)]
    np.testing.assert_allclose(noisy.psnr, psnr(pairs.take(np.arange(3), 2), clean), rtol=1e-6)
    assert noisy.seconds == 0
    found, told = (scores[Row("remove", method, 7)] for method in ("swap_found", "swap_told"))
    assert found.found is not None
    assert found.found.tolist() == [7, 7, 7]
    np.testing.assert_allclose(found.psnr, told.psnr, rtol=1e-4)
    assert told.found is None


def test_at_home_nothing_is_found_or_told_but_of_unseen_view_counts(
    trained: TrainedModel, tiny: Config
) -> None:
    pairs = _pairs("glyphs", 16, tiny.noise, 4)
    scores = Scorer(trained, {}, {}, pairs).run()
    assert {row.n_views for row in scores if row.method == "swap_told"} == {30, 15}
    assert not any(METHODS[row.method].finds for row in scores)
    own = {key for key, method in METHODS.items() if method.own and key != "swap_detected"}
    assert own <= {row.method for row in scores}


def test_a_baseline_with_the_operator_is_told_every_view_count(
    trained: TrainedModel, tiny: Config
) -> None:
    config = configs.replace(tiny, {"model.kind": "itnet"})
    model = build_model(config).eval().requires_grad_(False)
    assert isinstance(model, ItNet)
    model.head.weight.zero_()  # what is left are the exact steps
    model.head.bias.zero_()  # type: ignore[union-attr]
    pairs = _pairs("glyphs", 16, tiny.noise, 4)
    scores = Scorer(trained, {}, {"it": TrainedUNet(config, model)}, pairs).run()
    rows = {row for row in scores if row.model == "it"}
    assert {row.method for row in rows} == {"itnet"}
    assert {row.n_views for row in rows if row.task == "remove_unseen"} == {30, 15}
    for row in rows:
        if row.task in ("remove", "remove_unseen"):
            noisy = scores[Row(row.task, "noisy", row.n_views)]
            assert scores[row].psnr.mean() > noisy.psnr.mean() + 1, row


def test_methods_name_themselves_and_costly_ones_are_asked_for() -> None:
    assert all(key == method.key for key, method in METHODS.items())
    assert set(BASELINES) - set(QUICK_BASELINES) == {"tvrec"}
    row = Row("remove_grainy", "swap", 10, "wide")
    assert row.name == "swap_grainy:wide"
    assert row.text == "model `wide`: " + METHODS["swap"].text


def test_a_baseline_is_run_where_it_was_fitted(trained: TrainedModel, tiny: Config) -> None:
    pairs = _pairs("glyphs", 16, tiny.noise, 4)
    fitted = {"tv": [lambda case: 0 * case.noisy] * len(tiny.noise.n_views)}
    scores = Scorer(trained, fitted, {}, pairs).run()
    rows = {row for row in scores if row.method == "tv"}
    assert {row.task for row in rows} == {"remove", "remove_grainy", "remove_stored"}
    black = psnr(np.zeros((4, 1, 16, 16), np.float32), pairs.take(np.arange(4), 0))
    for row in rows:
        np.testing.assert_allclose(scores[row].psnr, black)
    assert dataclasses.is_dataclass(METHODS["tv"])
