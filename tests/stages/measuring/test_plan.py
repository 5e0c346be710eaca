"""What `snr plan` refuses, and how near it comes to a job that is then run."""

import os
import time
from pathlib import Path

import pytest

from snr_ray.cli import main
from snr_ray.config import Config
from snr_ray.stages.measuring import planrates
from snr_ray.stages.measuring.forecast import forecast_job


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--nodes", "0"], "--nodes must be at least 1"),
        (["--size", "0"], "--size must be at least 1"),
        (["--size", "100000"], "--size must be from 8 to 4096 pixels, but got 100000"),
        (["--price", "nan"], "--price must be a number of 0 or more, but got nan"),
        (["--out", "."], "--out must be a file that can be written, but . is a folder"),
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
@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("model", "size", "n_views", "count"), [("places64", 64, 20, 3000), ("ct", 256, 80, 120)]
)
def test_a_forecast_is_what_a_real_job_takes(
    model: str, size: int, n_views: int, count: int, tmp_path: Path
) -> None:
    config = Config()
    rates = planrates.measure(config, stage="denoise", model=model, size=size, n_views=n_views)
    cores = os.cpu_count() or 1
    job = forecast_job(rates, images=count, nodes=1, cores=cores, gpus=0, price=None)
    images, out, memory = tmp_path / "in", tmp_path / "out", planrates._Memory()
    planrates._write_images(images, count, size, n_views, config.images.channels)
    since = time.perf_counter()
    words = ["denoise", "--model", model, "--images", str(images), "--out", str(out)]
    planrates._run([*words, "--views", str(n_views)], memory)
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
