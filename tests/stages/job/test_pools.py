"""What an autoscaler brings: every stage starts on a cluster of no nodes, and leaves none."""

import time
from pathlib import Path

import pytest
import ray
from autoscaling import from_nothing
from nodes import until

from snr_ray.stages.denoising.cleaning import STAND_IN
from snr_ray.stages.job import pools

pytestmark = pytest.mark.ray


@pytest.mark.usefixtures("ray_2_cpus")
def test_without_an_autoscaler_there_is_what_is_there() -> None:
    assert not pools.has_autoscaler()
    assert pools.brings({"CPU": 1.0}, 2)
    assert pools.brings({"CPU": 1.0}, 0)
    since = time.monotonic()
    assert not pools.brings({"CPU": 1.0}, 3)
    assert not pools.brings({"GPU": 1.0}, 1)
    assert time.monotonic() - since < pools.ANSWER_S
    assert all(group["state"] == "REMOVED" for group in ray.util.placement_group_table().values())


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_each_stage_starts_from_no_nodes(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STAND_IN, "1")  # also for the nodes
    small, run, data = ("--config", "smoke"), tmp_path / "train", tmp_path / "simulate"
    two = ("--set", "train.num_workers=2", "--set", "train.cpus_per_worker=2")
    words = {
        "simulate": (*small, "--images", "glyphs"),
        "train": (*small, *two, "--data", data),
        "sweep": (*small, "--data", data, "--trials", 3),
        "denoise": ("--model", run / "model", "--images", image_folder, "--gpus", 1),
        "evaluate": ("--model", run / "model", "--images", "glyphs", "--limit", 20,
                     "--baselines", ""),
    }  # fmt: skip
    with from_nothing() as nodes:
        for stage, its in words.items():
            assert nodes.alive() == 1
            since, most = time.monotonic(), 1
            job = nodes.start(stage, *its, "--out", tmp_path / stage)
            while job.poll() is None:
                most = max(most, nodes.alive())
                time.sleep(0.5)
            said = job.communicate()[0]
            # Of a model that has learnt next to nothing all results are doubtful.
            assert job.returncode == (3 if stage == "denoise" else 0), said
            took = time.monotonic() - since
            until(lambda: nodes.alive() == 1, nodes.members[0].process)
            gone = time.monotonic() - since - took
            print(f"| `{stage}` | {most - 1} | {took:.0f} | {gone:.0f} |", flush=True)
            assert most > (2 if stage in ("train", "sweep") else 1), said
        # What no pool can ever bring is refused, and soon.
        since = time.monotonic()
        nine = ("--set", "train.num_workers=9", "--set", "train.batch_size=18")
        said = nodes.run("train", *small, *two, *nine, "--data", data,
                         "--out", tmp_path / "never", status=2)  # fmt: skip
        assert "--wait MINUTES waits for more" in said
        said = nodes.run("denoise", *words["denoise"][:-1], 2, "--out", tmp_path / "no", status=2)
        assert "of 2 only 0 are there" in said
        assert nodes.alive() == 1
    assert len(list((tmp_path / "denoise").rglob("*.png"))) >= 24
