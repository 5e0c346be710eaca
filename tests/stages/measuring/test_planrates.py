"""Rates of an image: measured by jobs as users start them, told where refused, read back."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from snr_ray.config import Config
from snr_ray.errors import InputError
from snr_ray.hashing import fingerprint
from snr_ray.images.sources import open_source
from snr_ray.learning.modelfolder import read_model
from snr_ray.stages.measuring import planrates
from snr_ray.stages.measuring.planrates import Rates, Stage, read_rates

RATES = Rates(
    size=128,
    n_views=30,
    channels=1,
    images_per_s_per_core=10.0,
    start_s=36.0,
    output_bytes=20_000.0,
    driver_bytes=1e9,
    worker_bytes=8e8,
    images_per_s_per_gpu=1000.0,
)


def test_rates_are_read_back_and_must_fit(tmp_path: Path) -> None:
    file = tmp_path / "rates.json"
    file.write_text(json.dumps({"rates": dataclasses.asdict(RATES)}))
    assert read_rates(file, "denoise", 128, 30, 1, 2, "places64") == RATES
    for size, views, channels in ((64, 30, 1), (128, 20, 1), (128, 30, 3)):
        with pytest.raises(InputError, match="must be of the same work"):
            read_rates(file, "denoise", size, views, channels, 0, "any")
    with pytest.raises(InputError, match="has stage denoise where simulate is asked for"):
        read_rates(file, "simulate", 128, 30, 1, 0, "")
    without = dataclasses.replace(RATES, images_per_s_per_gpu=None)
    file.write_text(json.dumps({"rates": dataclasses.asdict(without)}))
    with pytest.raises(InputError, match="needs images_per_s_per_gpu"):
        read_rates(file, "denoise", 128, 30, 1, 1, "any")
    odd = [("images_per_s_per_core", rate) for rate in (0, "fast", math.nan, -1.0, True)]
    odd += [("images_per_s_per_gpu", "900"), ("images_per_s_per_gpu", -1), ("shared_bytes", None)]
    odd += [("start_s", -1.0), ("start_s", math.nan), ("start_s", "36")]
    by_hand = [dataclasses.asdict(RATES) | {key: rate} for key, rate in odd]
    edited = [json.dumps({"rates": rates}) for rates in by_hand]
    for text in ("", "{}", '{"rates": {}}', "[1]", *edited):
        file.write_text(text)
        with pytest.raises(InputError, match="must be a file that `snr plan --out` wrote"):
            read_rates(file, "denoise", 128, 30, 1, 0, "any")


def test_rates_of_another_model_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "rates.json"
    its = fingerprint(read_model("any").weights)
    rates = dataclasses.replace(RATES, model=its)
    file.write_text(json.dumps({"rates": dataclasses.asdict(rates)}))
    assert read_rates(file, "denoise", 128, 30, 1, 0, "any") == rates
    with pytest.raises(InputError, match="of another model than places64; measure that"):
        read_rates(file, "denoise", 128, 30, 1, 0, "places64")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("stage", ["denoise", "simulate"])
def test_rates_are_measured_by_jobs_as_users_start_them(
    stage: Stage, tiny: Config, model_folder: Path, image_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(planrates, "MEASURE_S", 0.0)  # two jobs, of few images
    like = str(image_folder) if stage == "denoise" else None
    rates = planrates.measure(
        tiny, stage=stage, model=str(model_folder), size=16, n_views=6, like=like
    )
    assert rates.stage == stage
    assert rates.images_per_s_per_core > 0
    assert rates.start_s >= 0
    assert 100 < rates.output_bytes < 5000
    assert rates.driver_bytes > 10**8


def test_images_of_ones_own_are_taken_over_and_over(image_folder: Path, tmp_path: Path) -> None:
    planrates._copy_images(open_source(str(image_folder)), tmp_path / "in", 30)
    copies = sorted((tmp_path / "in").iterdir())
    assert [path.name for path in copies[:2]] == ["000000-00.png", "000001-02.png"]
    assert len(copies) == 30
    assert copies[24].read_bytes() == (image_folder / "a" / "00.png").read_bytes()


@pytest.mark.slow
@pytest.mark.ray
def test_images_that_fail_are_no_measure(tiny: Config, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.full((16, 16), 900, np.int16))  # needs images.white or .window
    with pytest.raises(
        InputError, match=r"of which none fails, but \d+ of \d+ did: .*images\.white"
    ):
        planrates.measure(
            tiny, stage="denoise", model="notmnist", size=16, n_views=10, like=str(tmp_path)
        )


def test_a_measurement_that_is_refused_says_why(tiny: Config) -> None:
    memory = planrates._Memory()
    with pytest.raises(InputError, match=r"ended with 2: snr denoise: .*nowhere"):
        planrates._run(
            ["denoise", "--model", "notmnist", "--images", "nowhere", "--out", "o"], memory
        )


@pytest.mark.parametrize(
    ("values", "first", "more"), [(64**2, 512, 4 * 256), (256**2, 32, 4 * 16), (2048**2, 2, 4)]
)
def test_what_is_measured_has_the_blocks_of_a_long_job(values: int, first: int, more: int) -> None:
    assert planrates._counts("denoise", values, cores=2) == (first, more)
    assert planrates._counts("simulate", values, cores=2) == (8, 56)
