"""A forecast: arithmetic that can be followed, honest about where figures are from."""

import dataclasses
import json
import os
import time
from pathlib import Path

import pytest

from snr_ray.cli import main
from snr_ray.config import Config
from snr_ray.errors import InputError
from snr_ray.images.sources import open_source
from snr_ray.stages import plan
from snr_ray.stages.plan import Rates, Stage, forecast_job, read_rates, table

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


def test_forecast_is_start_and_images_over_rate() -> None:
    job = forecast_job(RATES, images=720_000, nodes=5, cores=4, gpus=0, price=2.0)
    assert job.hours == pytest.approx(36 / 3600 + 1.0)
    assert job.price == pytest.approx(2.0 * 5 * job.hours)
    assert job.output_bytes == 720_000 * 20_000
    assert job.node_bytes == 4 * 8e8
    assert job.head_bytes == 1e9
    with_gpus = forecast_job(RATES, images=7_200_000, nodes=5, cores=4, gpus=2, price=None)
    assert with_gpus.hours == pytest.approx(36 / 3600 + 1.0)
    assert with_gpus.price is None


@pytest.mark.parametrize("more", [{"nodes": 10}, {"cores": 8}])
def test_twice_the_cores_take_half_the_time(more: dict[str, int]) -> None:
    rates = dataclasses.replace(RATES, start_s=0.0)
    base = {"images": 10**6, "nodes": 5, "cores": 4, "gpus": 0, "price": None}
    one, two = (forecast_job(rates, **kind) for kind in (base, base | more))
    assert two.hours == pytest.approx(one.hours / 2)


def test_table_says_where_figures_are_from() -> None:
    job = forecast_job(RATES, images=10**6, nodes=5, cores=4, gpus=0, price=2.0)
    said = table(RATES, job, measured=True, cores=4, nodes=5, here=2)
    hours = next(line for line in said.splitlines() if line.startswith("hours"))
    assert hours.endswith("extrapolated: measured here, times 5 x 4 cores")
    assert "20 GB" in said
    assert all(("measured" in line or "given" in line or "reckoned" in line)
               for line in said.splitlines())  # fmt: skip


def test_rates_are_read_back_and_must_fit(tmp_path: Path) -> None:
    file = tmp_path / "rates.json"
    file.write_text(json.dumps({"rates": dataclasses.asdict(RATES)}))
    assert read_rates(file, "denoise", 128, 30, 1, 2) == RATES
    for size, views, channels in ((64, 30, 1), (128, 20, 1), (128, 30, 3)):
        with pytest.raises(InputError, match="must be of the same work"):
            read_rates(file, "denoise", size, views, channels, 0)
    with pytest.raises(InputError, match="has stage denoise where simulate is asked for"):
        read_rates(file, "simulate", 128, 30, 1, 0)
    without = dataclasses.replace(RATES, images_per_s_per_gpu=None)
    file.write_text(json.dumps({"rates": dataclasses.asdict(without)}))
    with pytest.raises(InputError, match="needs images_per_s_per_gpu"):
        read_rates(file, "denoise", 128, 30, 1, 1)
    for text in ("", "{}", '{"rates": {}}', "[1]"):
        file.write_text(text)
        with pytest.raises(InputError, match="must be a file that `snr plan --out` wrote"):
            read_rates(file, "denoise", 128, 30, 1, 0)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--nodes", "0"], "--nodes must be at least 1"),
        (["--size", "0"], "--size must be at least 1"),
        (["--gpus", "1"], "--gpus needs --rates FILE"),
        (["--of", "simulate", "--gpus", "1"], "simulate uses no GPUs"),
        (["--rates", "none.json", "--like", "glyphs"], "--like is for a measurement"),
        (["--rates", "none.json"], "must be a file that `snr plan --out` wrote"),
    ],
)
def test_wrong_numbers_are_told(
    more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--images", "1e6", "--size", "64", "--views", "20", *more]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("stage", ["denoise", "simulate"])
def test_rates_are_measured_by_jobs_as_users_start_them(
    stage: Stage, tiny: Config, model_folder: Path, image_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(plan, "MEASURE_S", 0.0)  # two jobs, of few images
    like = str(image_folder) if stage == "denoise" else None
    rates = plan.measure(tiny, stage=stage, model=str(model_folder), size=16, n_views=6, like=like)
    assert rates.stage == stage
    assert rates.images_per_s_per_core > 0
    assert rates.start_s >= 0
    assert 100 < rates.output_bytes < 5000
    assert rates.driver_bytes > 10**8


def test_images_of_ones_own_are_taken_over_and_over(image_folder: Path, tmp_path: Path) -> None:
    plan._copy_images(open_source(str(image_folder)), tmp_path / "in", 30)
    copies = sorted((tmp_path / "in").iterdir())
    assert [path.name for path in copies[:2]] == ["000000-00.png", "000001-02.png"]
    assert len(copies) == 30
    assert copies[24].read_bytes() == (image_folder / "a" / "00.png").read_bytes()


def test_a_measurement_that_is_refused_says_why(tiny: Config) -> None:
    memory = plan._Memory()
    with pytest.raises(InputError, match=r"ended with 2: snr denoise: .*nowhere"):
        plan._run(["denoise", "--model", "notmnist", "--images", "nowhere", "--out", "o"], memory)


@pytest.mark.parametrize(
    ("values", "first", "more"), [(64**2, 512, 4 * 256), (256**2, 32, 4 * 16), (2048**2, 2, 4)]
)
def test_what_is_measured_has_the_blocks_of_a_long_job(values: int, first: int, more: int) -> None:
    assert plan._counts("denoise", values, cores=2) == (first, more)
    assert plan._counts("simulate", values, cores=2) == (8, 56)


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("model", "size", "n_views", "count"), [("places64", 64, 20, 3000), ("ct", 256, 80, 120)]
)
def test_a_forecast_is_what_a_real_job_takes(
    model: str, size: int, n_views: int, count: int, tmp_path: Path
) -> None:
    config = Config()
    rates = plan.measure(config, stage="denoise", model=model, size=size, n_views=n_views)
    cores = os.cpu_count() or 1
    job = forecast_job(rates, images=count, nodes=1, cores=cores, gpus=0, price=None)
    images, out, memory = tmp_path / "in", tmp_path / "out", plan._Memory()
    plan._write_images(images, count, size, n_views, config.images.channels)
    since = time.perf_counter()
    words = ["denoise", "--model", model, "--images", str(images), "--out", str(out)]
    plan._run([*words, "--views", str(n_views)], memory)
    took = time.perf_counter() - since
    written = sum(path.stat().st_size for path in out.rglob("*.png"))
    held = cores * memory.worker + memory.shared
    for name, said, was in (("seconds", 3600 * job.hours, took),
                            ("output", job.output_bytes, written),
                            ("head", job.head_bytes, memory.driver),
                            ("workers", job.node_bytes, held)):  # fmt: skip
        print(f"{name}: forecast {said:,.0f}, was {was:,.0f} ({said / was - 1:+.0%})", flush=True)
    assert 3600 * job.hours == pytest.approx(took, rel=0.5)  # others may be on the machine
    assert job.output_bytes == pytest.approx(written, rel=0.1)
    assert job.head_bytes == pytest.approx(memory.driver, rel=0.2)
    assert job.node_bytes == pytest.approx(held, rel=0.2)
