"""Model folders: written, read, refused; what a trained model knows, guesses and injects."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from random_models import images
from safetensors.torch import load_file, save_file

from snr_ray import configfile as configs
from snr_ray.config import Config
from snr_ray.errors import InputError
from snr_ray.learning.batches import Pairs
from snr_ray.learning.checkpoint import (
    BF16_DB,
    TrainedModel,
    TrainedUNet,
    load_any,
    load_model,
    save_model,
    ship,
)
from snr_ray.learning.learner import Learner
from snr_ray.learning.modelfolder import BF16_COSTS, least_metrics, least_of
from snr_ray.learning.validation import donor_codes
from snr_ray.metrics import as_json
from snr_ray.network.swap import swap
from snr_ray.network.viewcount import ViewCountMaker
from snr_ray.noise.operator import NoiseSpec


@pytest.fixture(scope="module")
def ranged(range_folder: Path) -> TrainedModel:
    return load_model(range_folder)


@pytest.fixture(scope="module")
def few(model_folder: Path) -> TrainedModel:
    return load_model(model_folder)


def test_a_model_of_a_range_knows_views_per_pixel_at_any_size(ranged: TrainedModel) -> None:
    assert ranged.views_per_pixel == (0.2, 0.9)
    assert ranged.views is not None
    assert ranged.views.counts(100) == (20, 90)
    assert ranged.geometry(33) == NoiseSpec(33)
    assert ranged.can_be_told


def test_a_model_of_few_counts_knows_these(few: TrainedModel) -> None:
    assert few.views is None
    assert few.views_per_pixel == (6 / 16, 12 / 16)


def test_donors_between_two_counts_are_between_theirs(ranged: TrainedModel) -> None:
    (few_, middle, many) = (ranged.codes.between(np.log([12, 6]), np.log(k)) for k in (5, 8.5, 20))
    for k, level in enumerate(ranged.codes.donors):
        torch.testing.assert_close(few_[k], level[2])
        torch.testing.assert_close(many[k], level[1])
        torch.testing.assert_close(middle[k], level[2].lerp(level[1], float(np.log2(8.5 / 6))))


def test_clean_donors_are_those_of_the_folder(ranged: TrainedModel, few: TrainedModel) -> None:
    for trained in (ranged, few):
        for clean, level in zip(trained.donors(0), trained.codes.donors, strict=True):
            assert torch.equal(clean, level[0])


def test_a_model_of_few_counts_lends_these_alone(few: TrainedModel) -> None:
    for given, level in zip(few.donors(6), few.codes.donors, strict=True):
        assert torch.equal(given, level[2])
    with pytest.raises(InputError, match="9"):
        few.donors(9)


def test_view_counts_are_guessed_from_noise_codes(ranged: TrainedModel) -> None:
    x = torch.from_numpy(images(5, 24, 20))
    features = ranged.model.bottom_up(x.contiguous(memory_format=torch.channels_last))
    codes = [q.mu for q in ranged.model.noise_posteriors(features)]
    maker = ranged.model.noise_maker
    assert isinstance(maker, ViewCountMaker)
    logit, views = maker.read(codes)
    expected = torch.where(logit > 0, (views.exp() * 24).round(), 0.0)
    assert ranged.guess_views(x.numpy()).tolist() == expected.tolist()
    # In RGB, one guess for the image, not one for each channel.
    assert ranged.guess_views(x.repeat(1, 3, 1, 1).numpy()).shape == (5,)


def test_a_model_of_few_counts_guesses_one_of_them(few: TrainedModel) -> None:
    assert set(few.guess_views(images(6)).tolist()) <= {0, 6, 12}


def test_the_card_of_a_range_says_what_it_knows(range_folder: Path) -> None:
    card = (range_folder / "README.md").read_text()
    assert "views per pixel of the longer side: 0.2 to 0.9" in card
    assert "grey images of 16 pixels" in card
    assert "Limits" in card


@pytest.mark.parametrize(
    ("measured", "said"), [({}, False), ({BF16_COSTS: 0.0}, True), ({BF16_COSTS: BF16_DB}, False)]
)
def test_bfloat16_is_for_models_that_were_measured_in_it(
    model_folder: Path, measured: dict[str, float], said: bool, tmp_path: Path
) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "metrics.json").write_text(json.dumps(measured))
    assert load_model(folder).bf16 == said


@pytest.mark.parametrize(
    ("may", "device", "units", "expected"),
    [
        (True, "cuda", True, True),
        (True, "cuda", False, False),  # before Ampere
        (True, "cpu", True, True),
        (True, "cpu", False, False),
        (False, "cpu", True, False),
    ],
)
def test_bfloat16_is_for_devices_that_are_faster_at_it(
    few: TrainedModel, may: bool, device: str, units: bool, expected: bool
) -> None:
    told = {"amx_bf16": units}
    capabilities = mock.patch.object(torch.cpu, "get_capabilities", create=True, return_value=told)
    gpu = mock.patch.object(torch.cuda, "is_bf16_supported", return_value=units)
    model = SimpleNamespace(top=SimpleNamespace(device=torch.device(device)))
    with capabilities, gpu, mock.patch.object(torch, "autocast") as made:
        dataclasses.replace(few, model=model, bf16=may).arithmetic()
    made.assert_called_once_with(device, torch.bfloat16, enabled=expected)


@pytest.mark.parametrize(
    "text",
    ["[]", "null", "3", "{", '{"least_explained_x": 3}', '{"least_explained_0.5": "a"}',
     '{"least_explained_0.5": [20]}', '{"least_explained_0.5": true}', '{"bf16_costs_psnr": "a"}',
     '{"bf16_costs_psnr": Infinity}'],
)  # fmt: skip
def test_damaged_metrics_are_one_sentence(model_folder: Path, text: str, tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "metrics.json").write_text(text)
    with pytest.raises(InputError, match=r"metrics\.json must be JSON .* is damaged \(.*; remove"):
        load_model(folder)


def test_numbers_that_were_not_finite_are_missing(model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    metrics = {BF16_COSTS: math.nan, "least_explained_0.5": math.nan, "least_explained_1": 20.0}
    (folder / "metrics.json").write_text(as_json(metrics))
    trained = load_model(folder)
    assert not trained.bf16
    assert trained.least_explained == {1.0: 20.0}


def test_view_counts_are_found_again_to_the_last_digit() -> None:
    least = {views / side: 20.0 for side in (96, 160, 511) for views in range(1, 2 * side)}
    assert least_of(json.loads(as_json(least_metrics(least)))) == least


def test_model_folder_round_trip(tiny: Config, pairs: Pairs, tmp_path: Path) -> None:
    learner = Learner(tiny)
    codes = donor_codes(learner.average, pairs)
    values = {"swap_psnr": 1.0}
    save_model(tmp_path / "model", tiny, learner.average, codes, values, "tests", steps=20)
    back = load_model(tmp_path / "model")
    assert back.config == tiny
    for a, b in zip(learner.average.parameters(), back.model.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(codes.donors, back.codes.donors, strict=True):
        assert torch.equal(a, b)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "16x16 grey" in card
    assert not list((tmp_path / "model").glob("*.p*"))  # nothing to unpickle


def test_the_card_says_how_long_and_on_what_a_model_was_trained(
    tiny: Config, pairs: Pairs, tmp_path: Path
) -> None:
    changes = {"model.decoder": "network", "images.crop": 8}
    learner = Learner(configs.replace(tiny, changes))
    codes = donor_codes(learner.average, pairs)
    for steps, told in ((20, "; 20 steps of 16 images"), (10, "; 10 steps, stopped before its 20")):
        save_model(
            tmp_path / "model", learner.config, learner.average, codes, {}, "tests", steps=steps
        )
        card = (tmp_path / "model" / "README.md").read_text()
        assert told in card
        assert "crops of 8x8 pixels of 16x16 grey images" in card
        assert "`recon_noisy` and `inject`, whose\ntarget is noisy, unclipped" in card


def test_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds model\.safetensors, but .* does not; `snr train`"):
        load_model(tmp_path)


def test_unet_is_no_model_with_codes(unet_folder: Path, model_folder: Path) -> None:
    with pytest.raises(InputError, match=r"holds a supervised U-Net, the baseline; `snr evaluate"):
        load_model(unet_folder)
    assert isinstance(load_any(unet_folder), TrainedUNet)
    assert not isinstance(load_any(model_folder), TrainedUNet)


def test_shipped_copy_gives_the_same_images(model_folder: Path, tmp_path: Path) -> None:
    report = tmp_path / "report"
    report.mkdir()
    (report / "metrics.md").write_text("# scores\n")
    (report / "metrics.json").write_text("{}")
    ship(model_folder, report, tmp_path / "models" / "mine")
    whole, half = load_model(model_folder), load_model(tmp_path / "models" / "mine")
    x = np.random.default_rng(0).random((3, 1, 16, 16), dtype=np.float32)
    answers = [swap(t.model, x, t.codes.mean(0)) for t in (whole, half)]
    np.testing.assert_allclose(*answers, atol=5e-3)
    sizes = [
        (f / "model.safetensors").stat().st_size
        for f in (model_folder, tmp_path / "models" / "mine")
    ]
    assert sizes[1] < 0.6 * sizes[0]
    assert "## scores" in (tmp_path / "models" / "mine" / "README.md").read_text()


def test_run_folder_hints_at_its_model(model_folder: Path) -> None:
    with pytest.raises(InputError, match=r"did you mean .*model"):
        load_model(model_folder.parent)


def test_weights_of_another_shape_are_refused(model_folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(model_folder, tmp_path / "model")
    text = (other / "config.yaml").read_text().replace("stem_channels: 4", "stem_channels: 6")
    (other / "config.yaml").write_text(text)
    with pytest.raises(InputError, match=r"has \[8, 4, .*yaml wants \[8, 6, .*mixes two models"):
        load_model(other)


def test_weights_that_are_not_finite_are_refused(model_folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(model_folder, tmp_path / "model")
    tensors = load_file(other / "model.safetensors")
    tensors["model.top"][:] = float("nan")
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(InputError, match=r"must be finite, but .* in model\.top"):
        load_model(other)


def test_donor_codes_of_another_shape_are_refused(model_folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(model_folder, tmp_path / "model")
    tensors = load_file(other / "model.safetensors")
    tensors["donors.0"] = tensors["donors.0"][:, :, :1].contiguous()
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(InputError, match="noise codes of 3 noise ids at 2 levels"):
        load_model(other)


def test_damaged_weights_are_refused(model_folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(model_folder, tmp_path / "model")
    data = (other / "model.safetensors").read_bytes()
    (other / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read"):
        load_model(other)


def test_models_saved_before_a_key_existed_still_load(
    tiny: Config, pairs: Pairs, tmp_path: Path
) -> None:
    config = configs.replace(tiny, {"model.decoder": "network", "model.upsampling": "nearest"})
    learner, folder = Learner(config), tmp_path / "model"
    codes, metrics = learner.validate(pairs, pairs)
    save_model(folder, config, learner.average, codes, metrics, "tests", steps=20)
    path = folder / "config.yaml"
    text = path.read_text().replace("  decoder: network\n", "")
    path.write_text(text.replace("  upsampling: nearest\n", ""))
    assert "decoder" not in path.read_text()
    assert load_model(folder).config == config
