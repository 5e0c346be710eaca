"""The evaluate stage: the metrics contract, numbers that can be checked, tables and pictures."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
import tifffile
from PIL import Image

from snr_ray import configfile as configs
from snr_ray.address import open_folder
from snr_ray.config import Config
from snr_ray.errors import InputError
from snr_ray.hashing import hash64
from snr_ray.images.sources import open_source
from snr_ray.metrics import psnr
from snr_ray.noise.operator import NoiseSpec, noise_operator, noise_specs
from snr_ray.scoring.grids import GRID_ROWS
from snr_ray.scoring.methods import SART_EVERY
from snr_ray.scoring.scores import Row
from snr_ray.stages.evaluation.evaluate import evaluate, settle_group
from snr_ray.stages.simulation.dataset import Origin, draw_pairs, open_rows

BLOCK_ROWS = 32
"""Images of 16 pixels that are scored together."""

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_2_cpus")]


@pytest.fixture(scope="module")
def beside(
    model_folder: Path, unet_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, ...]:
    """A U-Net; the model under another seed, which shares its row; the model under its own seed,
    which does not; two seeds of another recipe, which share a row of their own."""
    root = tmp_path_factory.mktemp("beside")
    folders = [str(unet_folder)]
    recipes = {"twin": (1, 1.0), "copy": (0, 1.0), "wide1": (1, 2.0), "wide2": (2, 2.0)}
    for name, (seed, margin) in recipes.items():
        other = shutil.copytree(model_folder, root / name / "model")
        text = (other / "config.yaml").read_text()
        assert "seed: 0" in text
        assert "margin: 1.0" in text
        text = text.replace("seed: 0", f"seed: {seed}").replace("margin: 1.0", f"margin: {margin}")
        (other / "config.yaml").write_text(text)
        folders.append(str(other))
    return tuple(folders)


@pytest.fixture(scope="module")
def report(
    tiny: Config,
    model_folder: Path,
    beside: tuple[str, ...],
    ray_2_cpus: None,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    out = tmp_path_factory.mktemp("evaluate") / "out"
    return evaluate(tiny, model=str(model_folder), images="glyphs", out=out, beside=beside).out


KNOWN_VIEWS = [
    "noisy",
    "tv",
    "sart",
    "lmmse",
    "swap",
    "swap_random",
    "swap_mirror",
    "hdn",
    "unet:unet",
    "swap:copy",
    "swap:wide1",
    "recon",
    "authority",
    "inject",
    "no_inject",
    "authority:copy",
    "authority:wide1",
    "inject:copy",
    "inject:wide1",
    "noisy_grainy",
    "tv_grainy",
    "lmmse_grainy",
    "swap_grainy",
    "unet_grainy:unet",
    "swap_grainy:copy",
    "swap_grainy:wide1",
    "noisy_stored",
    "tv_stored",
    "lmmse_stored",
    "swap_stored",
    "unet_stored:unet",
    "swap_stored:copy",
    "swap_stored:wide1",
]
UNSEEN_VIEWS = [
    "noisy_unseen",
    "swap_unseen",
    "swap_told_unseen",
    "unet_unseen:unet",
    "swap_unseen:copy",
    "swap_unseen:wide1",
]


def test_metrics_follow_the_contract(report: Path) -> None:
    metrics = json.loads((report / "metrics.json").read_text())
    assert {"model", "images", "data_range", "results", "donor_std_db", "probes"} <= set(metrics)
    assert set(metrics["probes"]) == {
        "noise_id", "noise_id_from_noise_code", "noise_id_from_content_code",
        "class_from_noise_code", "class_from_content_code", "chance_of_noise_id",
        "chance_of_class"}  # fmt: skip
    cells = {(r["method"], r["n_views"]): r for r in metrics["results"]}
    expected = {(name, views) for name in KNOWN_VIEWS for views in (12, 6)}
    expected |= {(name, views) for name in UNSEEN_VIEWS for views in (30, 15)}
    assert set(cells) == expected | {("recon_clean", 0)}
    assert len(cells) == len(metrics["results"])
    other, mine = cells["swap:wide1", 12], cells["swap", 12]
    assert (other["seeds"], other["psnr_std"], other["psnr"]) == (2, 0, mine["psnr"])
    assert (mine["seeds"], cells["inject", 12]["seeds"]) == (2, 2)
    assert not {"seeds"} & (set(cells["recon", 12]) | set(cells["swap:copy", 12]))
    for row in ("authority", "authority:copy"):
        assert cells[row, 12]["psnr"] == pytest.approx(cells["recon", 12]["psnr"], abs=1e-3)
    assert {v for u in metrics["uncertainty"].values() for v in u} == {
        "scale", "correlation", "calibration_error", "curve"}  # fmt: skip
    assert all(0.3 <= share <= 1 for share in metrics["injected_or_true"].values())
    assert set(metrics["donor_std_db"]) == {"12", "6"}
    assert all(np.isfinite([r["psnr"], r["ssim"]]).all() for r in metrics["results"])


def test_noisy_row_is_the_psnr_of_the_simulated_test_images(tiny: Config, report: Path) -> None:
    source = open_source("glyphs")
    rows = source.select("test", tiny.images.limit)
    clean = np.stack([source.load(row, tiny.images) for row in rows])
    metrics = json.loads((report / "metrics.json").read_text())
    assert metrics["images"] == len(rows)
    for spec in noise_specs(tiny.noise):
        expected = psnr(noise_operator(spec, 16, 16)(clean), clean).mean()
        cell = next(r for r in metrics["results"]
                    if (r["method"], r["n_views"]) == ("noisy", spec.n_views))  # fmt: skip
        assert cell["psnr"] == pytest.approx(expected, abs=1e-3)


def test_scores_hold_every_image_method_and_view_count_once(report: Path) -> None:
    table = pq.read_table(report / "scores.parquet").to_pylist()
    keys = [tuple(row[name] for name in ("id", *Row._fields)) for row in table]
    assert len(keys) == len(set(keys))
    images = {row["id"] for row in table}
    for row in {key[1:] for key in keys if "sart" not in key}:
        assert {key[0] for key in keys if key[1:] == row} == images


def test_grid_has_seven_pictures_a_row_and_the_table_a_row_a_method(report: Path) -> None:
    with Image.open(report / "grid.png") as image:
        assert image.width > 900
        assert image.height > 900
    text = (report / "metrics.md").read_text()
    assert "| noisy input |" in text
    assert "| linear MMSE, knows the operator and its view count |" in text
    assert "| model `wide1`: **noise removed**, mean clean noise code (2 seeds) |" in text
    assert "± 0.00" in text
    assert "| clean image as it is, against the true noisy image |" in text
    heads = [line for line in text.splitlines() if line.startswith("## ")]
    assert len(heads) == 7
    cleaned, made, grainy, stored, unseen = (
        text[text.index(a) : text.index(b)] for a, b in itertools.pairwise(heads[:6])
    )
    assert "total variation" in cleaned
    assert "injected" not in cleaned
    assert "injected" in made
    assert "total variation" not in made
    assert "Gaussian" in grainy
    assert "8 bits" in stored
    assert "| method | 30 views | 15 views | ms |" in unseen
    assert "| model `wide1`: **noise injected**, against the true noisy" in text
    assert " nan" not in text
    with Image.open(report / "calibration.png") as image:
        assert image.width > 300


def test_finished_evaluation_is_left_alone(
    tiny: Config, model_folder: Path, beside: tuple[str, ...], report: Path
) -> None:
    stamp = (report / "metrics.json").stat().st_mtime_ns
    evaluate(tiny, model=str(model_folder), images="glyphs", out=report, beside=beside)
    assert (report / "metrics.json").stat().st_mtime_ns == stamp


def test_a_damaged_evaluation_is_made_anew(
    tiny: Config, model_folder: Path, beside: tuple[str, ...], report: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(report, copy)
    (copy / "metrics.json").write_text((report / "metrics.json").read_text()[:100])
    evaluate(tiny, model=str(model_folder), images="glyphs", out=copy, beside=beside)
    assert json.loads((copy / "metrics.json").read_text()).keys() >= {"results", "images"}


def test_physics_model_has_a_row_for_detected_view_counts(
    tiny: Config, physics_folder: Path, tmp_path: Path
) -> None:
    out = evaluate(tiny, model=str(physics_folder), images="glyphs", out=tmp_path / "o",
                   baselines=(), limit=12).out  # fmt: skip
    metrics = json.loads((out / "metrics.json").read_text())
    cells = {(r["method"], r["n_views"]) for r in metrics["results"]}
    assert {("swap_detected", 12), ("swap_detected", 6), ("swap_unseen", 30)} <= cells
    assert "The model sees the linear estimate" in (out / "metrics.md").read_text()


def test_grey_model_takes_each_channel_of_rgb(
    tiny: Config, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configs.replace(tiny, {"images.channels": 3})
    out = evaluate(config, model=str(model_folder), images="photos", out=tmp_path / "o",
                   baselines=(), limit=10).out  # fmt: skip
    assert "the images are RGB and the model is grey" in capsys.readouterr().out
    assert "takes each channel of RGB by itself" in (out / "metrics.md").read_text()


def test_other_sizes_and_view_counts_are_scored_blind_told_and_found(
    tiny: Config, model_folder: Path, tmp_path: Path
) -> None:
    out = evaluate(tiny, model=str(model_folder), images="photos", out=tmp_path / "o", limit=6,
                   size=32, n_views=(20, 7), split="all",
                   baselines=("tv", "lmmse")).out  # fmt: skip
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["images"], metrics["size"], metrics["n_views"]) == (6, 32, [20, 7])
    methods = {"noisy", "tv", "swap", "swap_told", "swap_found"}
    cells = {(r["method"], r["n_views"]): r for r in metrics["results"]}
    assert set(cells) == {
        (name + kind, views) for name in methods for kind in ("", "_grainy", "_stored")
        for views in (20, 7)
    }  # fmt: skip
    source, config = open_source("photos"), configs.replace(tiny, {"images.size": 32})
    clean = np.stack([source.load(row, config.images) for row in source.select("all", 6)])
    for views in (20, 7):
        noisy = noise_operator(NoiseSpec(views), 32, 32)(clean)
        assert cells["noisy", views]["psnr"] == pytest.approx(psnr(noisy, clean).mean(), abs=1e-3)
    assert cells["swap_found", 7]["found"] == 1
    assert cells["swap_found", 7]["psnr"] == cells["swap_told", 7]["psnr"]
    scores = pq.read_table(out / "scores.parquet").to_pylist()
    assert {row["found"] for row in scores if row["method"] != "swap_found"} == {None}
    page = (out / "metrics.md").read_text()
    assert "6 images of the source, all of it" in page
    assert "(100% found)" in page
    with Image.open(out / "grid.png") as image:
        assert image.height > 600


@pytest.mark.parametrize("model", configs.shipped_models())
def test_models_that_come_with_snr_ray_can_be_scored_elsewhere(model: str, tmp_path: Path) -> None:
    """Up to the images, which come after all that a model may not be asked."""
    with pytest.raises(InputError, match="SRC must be a path that exists"):
        evaluate(Config(), model=model, images=str(tmp_path / "none"), out=tmp_path / "o",
                 size=40, n_views=(13, 8))  # fmt: skip


@pytest.mark.parametrize(("n_views", "told"), [((4, 32), ""), ((3, 20, 33), "3, 33")])
def test_views_beyond_the_range_of_a_model_are_told(
    n_views: tuple[int, ...], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="SRC must be a path that exists"):
        evaluate(Config(), model="any", images=str(tmp_path / "none"), out=tmp_path / "o",
                 size=40, n_views=n_views)  # fmt: skip
    said = capsys.readouterr().out
    assert ("knows 4 to 32 views of images of 40 pixels, and may fail at" in said) == bool(told)
    assert not told or f"may fail at {told}." in said


def test_slices_are_read_in_the_window_of_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "slices").mkdir()
    slices = np.random.default_rng(0).integers(-1200, 1200, (2, 16, 16), np.int16)
    for k, values in enumerate(slices):
        tifffile.imwrite(tmp_path / "slices" / f"{k}.tif", values)
    out = evaluate(Config(), model="ct", images=str(tmp_path / "slices"), out=tmp_path / "o",
                   baselines=(), size=16, n_views=(6,), split="all").out  # fmt: skip
    assert "read in the model's window, -1000 to 1000 HU" in capsys.readouterr().out
    clean = ((slices[:, None].astype(np.float32) + 1000) / 2000).clip(0, 1)
    noisy = noise_operator(NoiseSpec(6), 16, 16)(clean)
    first = json.loads((out / "metrics.json").read_text())["results"][0]
    assert first["method"] == "noisy"
    assert first["psnr"] == pytest.approx(psnr(noisy, clean).mean(), abs=1e-3)


def test_bad_requests_are_refused(
    tiny: Config, model_folder: Path, unet_folder: Path, tmp_path: Path
) -> None:
    def run(**changes: object) -> None:
        options = {"model": str(model_folder), "images": "glyphs", "out": tmp_path / "o"} | changes
        evaluate(tiny, **options)  # type: ignore[arg-type]

    with pytest.raises(
        InputError, match="--baselines takes tv, tvrec, sart, lmmse, but got 'bm3d'"
    ):
        run(baselines=("bm3d",))
    with pytest.raises(InputError, match="--limit must be at least 1, but got 0"):
        run(limit=0)
    with pytest.raises(InputError, match=r"must be at most 4 x images\.size = 128, but got 129"):
        run(size=32, n_views=(129,))
    with pytest.raises(InputError, match=r"images\.size must be from 8 to 4096 pixels, but got 4"):
        run(size=4)
    with pytest.raises(InputError, match=r"images\.size must be from 8 to 4096 pixels, but got 0"):
        run(size=0)
    with pytest.raises(InputError, match="holds a supervised U-Net, the baseline"):
        run(model=str(unet_folder))
    with pytest.raises(InputError, match="two are called 'unet'"):
        run(beside=(str(unet_folder), str(unet_folder)))
    other = shutil.copytree(model_folder, tmp_path / "other" / "model")
    text = (other / "config.yaml").read_text().replace("filter: ramp", "filter: hann")
    (other / "config.yaml").write_text(text)
    with pytest.raises(InputError, match=r"has noise\.filter=hann where the model has ramp"):
        run(beside=(str(other),))
    images = tmp_path / "few"
    images.mkdir()
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(images / "one.png")
    with pytest.raises(InputError, match="The test split must hold images"):
        run(images=str(images))
    with pytest.raises(InputError, match=r"give more images, or leave out the baselines.*''"):
        run(images=str(images), n_views=(12,), split="all")


def test_images_that_cannot_be_read_are_failures_wherever_they_are(
    tiny: Config, model_folder: Path, tmp_path: Path
) -> None:
    scans = tmp_path / "scans"
    scans.mkdir()
    for k in range(BLOCK_ROWS + 1):  # the last is in a block of its own
        Image.fromarray(np.full((16, 16), 7 * k, np.uint8)).save(scans / f"{k:02d}.png")
    (scans / "10.png").write_bytes(b"broken")
    outcome = evaluate(
        tiny, model=str(model_folder), images=str(scans), out=tmp_path / "out", baselines=(),
        n_views=(12,), split="all",
    )  # fmt: skip
    assert (outcome.images, outcome.failed) == (BLOCK_ROWS, 1)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["failed"] == 1


def test_pictures_are_of_images_that_could_be_read(
    tiny: Config, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("snr_ray.stages.simulation.simulate.STREAM_ROWS", GRID_ROWS)
    (tmp_path / "scans").mkdir()
    names = sorted((f"{k:02d}.png" for k in range(GRID_ROWS + 2)), key=hash64)
    for k, name in enumerate(names):
        image = Image.fromarray(np.full((16, 16), 7 * k, np.uint8))
        image.save(tmp_path / "scans" / name)
        if k < GRID_ROWS:  # all that come first
            (tmp_path / "scans" / name).write_bytes(b"broken")
    outcome = evaluate(
        tiny, model=str(model_folder), images=str(tmp_path / "scans"), out=tmp_path / "out",
        baselines=(), n_views=(12,), split="all",
    )  # fmt: skip
    assert (outcome.images, outcome.failed) == (2, GRID_ROWS)
    assert (tmp_path / "out" / "grid.png").is_file()


def test_a_baseline_of_some_images_that_has_none_is_told(
    tiny: Config, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "scans").mkdir()
    names = [f"{k:02d}.png" for k in range(30)]
    for name in names:
        if hash64(name) % SART_EVERY:
            Image.fromarray(np.full((16, 16), 90, np.uint8)).save(tmp_path / "scans" / name)
    out = evaluate(
        tiny, model=str(model_folder), images=str(tmp_path / "scans"), out=tmp_path / "out",
        baselines=("sart", "tv"), n_views=(12,), split="all", limit=3,
    ).out  # fmt: skip
    methods = {row["method"] for row in json.loads((out / "metrics.json").read_text())["results"]}
    assert "tv" in methods
    assert "sart" not in methods
    assert "sart has no row: it is run on one image in 8" in capsys.readouterr().out


def test_what_is_shown_and_probed_stands_for_a_sorted_table(tiny: Config, tmp_path: Path) -> None:
    files = []
    for k in range(64):
        Image.fromarray(np.full((16, 16), k, np.uint8)).save(tmp_path / "one.png")
        files.append((tmp_path / "one.png").read_bytes())
    table = pa.table({"id": [f"{k:02d}" for k in range(64)], "image": files})
    pq.write_table(table, tmp_path / "sorted.parquet", row_group_size=16)
    origin = Origin(images=str(tmp_path / "sorted.parquet"))
    rows = open_rows(tiny, origin, "all").materialize()
    drawn = draw_pairs(rows, 12, tiny)
    first = [origin.source.ids[int(k)] for k in origin.source.select("all", 12)]
    assert sorted(drawn.ids) == sorted(first)
    truth = [int(name[-2:]) / 255 for name in drawn.names(np.arange(12))]
    assert len({255 * value // 16 for value in truth}) > 1
    np.testing.assert_allclose(drawn.take(np.arange(12), 0).mean((1, 2, 3)), truth, atol=1e-6)


def test_a_report_does_not_lie_among_the_images(
    tiny: Config, model_folder: Path, image_folder: Path
) -> None:
    """Where its pictures would be images, and the same command would be about others."""
    with pytest.raises(InputError, match="--out must lie outside the images"):
        evaluate(tiny, model=str(model_folder), images=str(image_folder),
                 out=image_folder / "report", baselines=(), limit=2)  # fmt: skip
    assert not (image_folder / "report").exists()


def test_model_and_report_may_be_in_a_bucket(
    tiny: Config, model_folder: Path, bucket: tuple[pafs.FileSystem, str]
) -> None:
    place = f"s3://test:test@bucket/{{}}?{bucket[1]}"
    for path in model_folder.iterdir():
        open_folder(place.format("run/model")).write(path.name, path.read_bytes())
    out = place.format("report")
    outcome = evaluate(
        tiny, model=place.format("run/model"), images="glyphs", out=out, baselines=(), limit=2
    )
    written = open_folder(out)
    assert outcome.images == json.loads(written.read("metrics.json"))["images"] == 2
    assert {"grid.png", "metrics.md", "scores.parquet"} <= set(written.list())
    assert b"test:test" not in b"".join(map(written.read, written.list()))
    with pytest.raises(InputError, match=r"holds model.safetensors, but s3://bucket/none\?"):
        evaluate(tiny, model=place.format("none"), images="glyphs", out=out)


def test_images_are_split_as_when_the_model_was_trained(
    tiny: Config, model_folder: Path, image_folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    data = [(image_folder / "a" / "00.png").read_bytes()] * 60
    columns = {
        "patient": [f"p{k % 30}" for k in range(60)],
        "ward": [f"w{k % 20}" for k in range(60)],
    }
    pq.write_table(pa.table({"image": data, **columns}), tmp_path / "t.parquet")
    pq.write_table(pa.table({"image": data}), tmp_path / "plain.parquet")

    def settled(file: str, asked: str | None, remembers: str | None, **how: str) -> str | None:
        trained = configs.replace(tiny, {"images.group": remembers})
        origin = Origin(images=str(tmp_path / file))
        how = {"model": "run", "split": "test"} | how
        return settle_group(origin, asked, trained, **how)

    assert settled("t.parquet", None, "ward") == "ward"
    assert settled("t.parquet", None, "none") == "none"  # of before there were groups
    assert settled("t.parquet", None, None) == "patient"  # trained on images without patients
    assert settled("t.parquet", "patient", "ward") == "patient"
    assert settled("t.parquet", None, "ward", split="all") == "none"
    assert settled("t.parquet", None, "none", model="notmnist") == "patient"
    capsys.readouterr()
    assert settled("plain.parquet", None, "ward") is None
    assert "images split by ward, which these have not" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"images\.group must be"):
        settled("plain.parquet", "ward", None)
    text = (model_folder / "config.yaml").read_text()
    assert "  group: null\n" in text
    old = shutil.copytree(model_folder, tmp_path / "old") / "config.yaml"
    old.write_text(text.replace("  group: null\n", ""))
    assert configs.load_saved(old).images.group == "none"
