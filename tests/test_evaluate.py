"""The evaluate stage: the metrics contract, numbers that can be checked, tables and pictures."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from snr_ray import radon
from snr_ray.config import Config, InputError
from snr_ray.evaluate import evaluate
from snr_ray.metrics import psnr
from snr_ray.sources import open_source

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_2_cpus")]


@pytest.fixture(scope="module")
def report(
    tiny: Config, model_folder: Path, ray_2_cpus: None, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("evaluate") / "out"
    return evaluate(tiny, model=str(model_folder), images="glyphs", out=out).out


def test_metrics_follow_the_contract(report: Path) -> None:
    metrics = json.loads((report / "metrics.json").read_text())
    assert {"model", "images", "data_range", "results", "donor_std_db", "probes"} <= set(metrics)
    assert set(metrics["probes"]) == {
        "noise_id_from_noise_code", "noise_id_from_content_code", "chance"}  # fmt: skip
    cells = {(r["method"], r["n_views"]) for r in metrics["results"]}
    for method in ("noisy", "recon", "swap", "swap_random", "inject", "no_inject", "tv", "lmmse"):
        assert {(method, 12), (method, 6)} <= cells
    assert ("recon_clean", 0) in cells
    assert set(metrics["donor_std_db"]) == {"12", "6"}
    assert all(np.isfinite([r["psnr"], r["ssim"]]).all() for r in metrics["results"])


def test_noisy_row_is_the_psnr_of_the_simulated_test_images(tiny: Config, report: Path) -> None:
    source = open_source("glyphs")
    rows = source.select("test", tiny.images.limit)
    clean = np.stack([source.load(row, tiny.images) for row in rows])
    metrics = json.loads((report / "metrics.json").read_text())
    assert metrics["images"] == len(rows)
    for spec in radon.specs(tiny.noise):
        expected = psnr(radon.operator(spec, 16, 16)(clean), clean).mean()
        cell = next(r for r in metrics["results"]
                    if (r["method"], r["n_views"]) == ("noisy", spec.n_views))  # fmt: skip
        assert cell["psnr"] == pytest.approx(expected, abs=1e-3)


def test_scores_hold_every_image_method_and_view_count_once(report: Path) -> None:
    table = pq.read_table(report / "scores.parquet").to_pylist()
    keys = [(row["id"], row["method"], row["n_views"]) for row in table]
    assert len(keys) == len(set(keys))
    images = len({row["id"] for row in table})
    assert len(keys) == images * (1 + 2 * 8)


def test_grid_has_seven_pictures_a_row_and_the_table_a_row_a_method(report: Path) -> None:
    with Image.open(report / "grid.png") as image:
        assert image.width > 900
        assert image.height > 900
    text = (report / "metrics.md").read_text()
    assert "| noisy input |" in text
    assert "linear MMSE" in text


def test_finished_evaluation_is_left_alone(tiny: Config, model_folder: Path, report: Path) -> None:
    stamp = (report / "metrics.json").stat().st_mtime_ns
    evaluate(tiny, model=str(model_folder), images="glyphs", out=report)
    assert (report / "metrics.json").stat().st_mtime_ns == stamp


def test_bad_requests_are_refused(tiny: Config, model_folder: Path, tmp_path: Path) -> None:
    def run(**changes: object) -> None:
        options = {"model": str(model_folder), "images": "glyphs", "out": tmp_path / "o"} | changes
        evaluate(tiny, **options)  # type: ignore[arg-type]

    with pytest.raises(InputError, match="--baselines takes tv, lmmse, but got 'bm3d'"):
        run(baselines=("bm3d",))
    with pytest.raises(InputError, match="--limit must be at least 1, but got 0"):
        run(limit=0)
    images = tmp_path / "few"
    images.mkdir()
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(images / "one.png")
    with pytest.raises(InputError, match="The test split must hold images"):
        run(images=str(images))
