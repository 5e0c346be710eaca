"""What the bench of denoising measures, in small: the idle driver, the loops, what is made."""

import threading
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from snr_ray.stages.measuring import benchdenoise
from snr_ray.stages.measuring.benchdenoise import COLLECTIONS

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_2_cpus")]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    benchdenoise._make(COLLECTIONS[0], tmp_path / "images", 70)
    return tmp_path / "images"


def test_an_idle_driver_writes_a_row_for_every_name(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchdenoise, "LINKS", 300)
    benchdenoise._link(images, tmp_path / "many", 2000)
    found = benchdenoise._idle_driver(tmp_path / "many", tmp_path / "out", None)
    assert found["images_per_s"] > 500
    assert 0 < found["cpu_ms"] < 2
    ids = pq.read_table(tmp_path / "out" / "manifest.parquet")["id"].to_pylist()
    assert len(ids) == len(set(ids)) == 2000


def test_bare_loops_do_the_work_of_a_task(images: Path) -> None:
    small = replace(COLLECTIONS[0], bare=8)
    cpu_s, rate = benchdenoise._bare_loop(small, images, threading.Barrier(1))
    assert 0 < cpu_s < 10
    assert rate > 0
    assert benchdenoise._files_alone(images, 64, threading.Barrier(1)) > rate
