"""What a trained model says of itself: view counts it knows, guesses and injects."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from random_models import images

from snr_ray.errors import InputError
from snr_ray.learning.checkpoint import BF16_DB, TrainedModel, load_model
from snr_ray.learning.fit import BF16_COSTS
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
    assert ranged.sizes == (16, 16)
    for n_views, known in ((19, False), (20, True), (55, True), (90, True), (91, False)):
        assert ranged.knows(n_views, 100, 70) == known
    assert ranged.geometry(33) == NoiseSpec(33)
    assert ranged.can_be_told


def test_a_model_of_few_counts_knows_these(few: TrainedModel) -> None:
    assert few.views is None
    assert few.views_per_pixel == (6 / 16, 12 / 16)
    assert [few.knows(n_views, 16, 16) for n_views in (12, 9, 6)] == [True, False, True]


def test_donors_of_any_count_inject_that_count(ranged: TrainedModel) -> None:
    clean = images(3, 24, 20)
    for n_views in (5, 9, 14, 21, 30):
        donors = ranged.donors(n_views, 24, 20)
        assert {len(level) for level in donors} == {ranged.codes.n_donors}
        noise = [level.mean(0, keepdim=True) for level in donors]
        injected = swap(ranged.model, clean, noise)
        made = swap(ranged.model, clean, None, geometry=NoiseSpec(n_views))
        assert injected.shape == made.shape
        maker = ranged.model.noise_maker
        assert maker is not None
        assert maker.counts(maker.shares(noise), 24).tolist() == [n_views]


def test_donors_between_two_counts_are_between_theirs(ranged: TrainedModel) -> None:
    (few_, middle, many) = (ranged.codes.between(np.log([12, 6]), np.log(k)) for k in (5, 8.5, 20))
    for k, level in enumerate(ranged.codes.donors):
        torch.testing.assert_close(few_[k], level[2])
        torch.testing.assert_close(many[k], level[1])
        torch.testing.assert_close(middle[k], level[2].lerp(level[1], float(np.log2(8.5 / 6))))


def test_clean_donors_are_those_of_the_folder(ranged: TrainedModel, few: TrainedModel) -> None:
    for trained in (ranged, few):
        for clean, level in zip(trained.donors(0, 30, 30), trained.codes.donors, strict=True):
            assert torch.equal(clean, level[0])


def test_a_model_of_few_counts_lends_these_alone(few: TrainedModel) -> None:
    for given, level in zip(few.donors(6, 99, 99), few.codes.donors, strict=True):
        assert torch.equal(given, level[2])
    with pytest.raises(InputError, match="9"):
        few.donors(9, 16, 16)


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
