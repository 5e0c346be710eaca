"""Every method on one block, at the model's own noise and elsewhere, without Ray."""

import dataclasses
import time
from pathlib import Path

import numpy as np
import pytest

import snr_ray
from snr_ray import configfile as configs
from snr_ray.config import Config, ImagesConfig, NoiseConfig
from snr_ray.images.sources import open_source
from snr_ray.learning.batches import Pairs
from snr_ray.learning.build import build_model
from snr_ray.learning.checkpoint import TrainedModel, TrainedUNet, load_model
from snr_ray.metrics import psnr
from snr_ray.network.itnet import ItNet
from snr_ray.noise.operator import NoiseSpec, noise_operator, noise_specs
from snr_ray.scoring.cases import Case
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


@pytest.mark.parametrize("n_views", [15, 100])
def test_what_is_found_is_what_denoise_finds(n_views: int) -> None:
    """Also of images that noise codes take for clean, as they do where views are many."""
    model, noise = load_model("any"), NoiseConfig(n_views=(n_views,))
    pairs = _pairs("photos", 32, noise, 4)
    scores = Scorer(model, {}, {}, pairs, noise).run()[Row("remove", "swap_found", n_views)]
    rows = np.arange(4)
    cleaned = snr_ray.denoise(pairs.take(rows, 1), model)
    np.testing.assert_allclose(scores.psnr, psnr(cleaned, pairs.take(rows, 0)), atol=0.2)
    assert scores.found is not None
    assert (0 in scores.found) == (n_views == 100)


def test_finding_the_view_count_takes_its_time_in_the_table(
    trained: TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(self: Scorer, noisy: np.ndarray) -> np.ndarray:
        time.sleep(0.3 * len(noisy))
        return np.full(len(noisy), 7)

    monkeypatch.setattr(Scorer, "find", slow)
    noise = NoiseConfig(n_views=(7,))
    scores = Scorer(trained, {}, {}, _pairs("photos", 16, noise, 2), noise).run()
    for row in (row for row in scores if row.method.startswith("swap")):
        assert (scores[row].seconds >= 0.3) == METHODS[row.method].finds, row


def test_at_home_nothing_is_found_or_told_but_of_unseen_view_counts(
    trained: TrainedModel, tiny: Config
) -> None:
    pairs = _pairs("glyphs", 16, tiny.noise, 4)
    scores = Scorer(trained, {}, {}, pairs).run()
    assert {row.n_views for row in scores if row.method == "swap_told"} == {30, 15}
    assert not any(METHODS[row.method].finds for row in scores)
    own = {key for key, method in METHODS.items() if method.own and key != "swap_detected"}
    assert own <= {row.method for row in scores}


@pytest.mark.parametrize("photons", [0, 500])
def test_noise_of_an_image_does_not_depend_on_its_neighbours(
    trained: TrainedModel, tiny: Config, photons: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configs.replace(tiny, {"noise.photons": photons})
    pairs = _pairs("glyphs", 16, tiny.noise, 4)
    monkeypatch.setattr(
        "snr_ray.scoring.scores.detect", lambda model, codes, noisy: np.zeros(len(noisy), int)
    )

    def noises(rows: list[int]) -> dict[tuple[str, int], np.ndarray]:
        names, arange = sorted(pairs.ids), np.array(rows)
        noisy = [[pairs.take(arange, k)] for k in (1, 2)]
        some = Pairs([names[row] for row in rows], [pairs.take(arange, 0)], noisy)
        scorer = Scorer(dataclasses.replace(trained, config=config), {}, {}, some)
        return {
            (case.task, case.n_views): case.noisy[list(case.names).index(names[2])]
            for case in scorer.cases()
        }

    whole = noises([0, 1, 2, 3])
    assert {task for task, _ in whole} >= {"remove_grainy", "remove_unseen"}
    for rows in ([2], [2, 3], [0, 2]):
        for key, image in noises(rows).items():
            np.testing.assert_allclose(image, whole[key], atol=1e-5, err_msg=str(key))


def test_view_counts_of_a_range_are_not_unseen(
    range_folder: Path, tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = load_model(range_folder)  # 0.2 to 0.9 views per pixel
    monkeypatch.setattr("snr_ray.scoring.scores.UNSEEN_VIEWS", (15, 14, 9, 3, 2))
    scorer = Scorer(trained, {}, {}, _pairs("glyphs", 16, trained.config.noise, 2))
    tried = {case.n_views for case in scorer.cases() if case.task == "remove_unseen"}
    assert tried == {15, 2}


@pytest.mark.parametrize(
    ("n_views", "angle_range", "mirrored"),
    [(6, 180.0, True), (12, 180.0, True), (7, 180.0, False), (6, 90.0, False)],
)
def test_images_are_mirrored_where_the_scan_stays_the_same(
    n_views: int, angle_range: float, mirrored: bool
) -> None:
    spec = NoiseSpec(n_views, angle_range=angle_range)
    clean = np.random.default_rng(0).random((1, 1, 16, 16), np.float32)
    noise = noise_operator(spec, 16, 16)
    turned = noise(clean.swapaxes(2, 3)).swapaxes(2, 3)
    assert np.allclose(noise(clean), turned, atol=1e-3) == mirrored
    case = Case("remove", ["a"], clean, clean, np.ones(1, np.int64), spec)
    assert METHODS["swap_mirror"].when(case, None) == mirrored


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
