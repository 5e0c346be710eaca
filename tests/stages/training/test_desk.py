"""Runs and sweeps in a bucket: what lies there, and that the same command continues from it."""

import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from snr_ray import configfile as configs
from snr_ray.address import open_folder
from snr_ray.config import Config
from snr_ray.errors import InputError
from snr_ray.folder import Folder
from snr_ray.learning.checkpoint import load_model
from snr_ray.lock import locked
from snr_ray.stages.simulation.dataset import Origin
from snr_ray.stages.sweeping.sweep import sweep
from snr_ray.stages.training import desk as module
from snr_ray.stages.training.desk import Desk
from snr_ray.stages.training.runlog import metrics_of
from snr_ray.stages.training.train import train

GLYPHS = Origin(images="glyphs")


@pytest.fixture
def run(bucket: tuple[pafs.FileSystem, str]) -> Folder:
    """A folder in a bucket."""
    return open_folder(f"s3://test:test@bucket/runs/one?{bucket[1]}")


def test_what_is_kept_is_fetched_and_what_is_dropped_is_gone(run: Folder) -> None:
    here, there = Desk(run), pickle.loads(pickle.dumps(Desk(run)))
    assert here.path.name == there.path.name == "one"
    assert here.path != there.path
    (here.path / "states" / "step-1").mkdir(parents=True)
    for name in ("states/step-1/a", "states/step-1/b", "log"):
        (here.path / name).write_text(name)
    here.keep("log", "states", "none", last="states/step-1/a")
    run.write("states/rays.json", "its own")
    there.fetch("log", "states", "none")
    assert sorted(there.path.rglob("?")) == [there.path / "states/step-1" / x for x in "ab"]
    assert (there.path / "log").read_text() == "log"
    assert not (there.path / "none").exists()
    (here.path / "log").unlink()
    (here.path / "states" / "step-1" / "b").unlink()
    here.drop("log")
    here.drop("states", lambda file: file.startswith("states/step-"))
    assert run.list() == ["states/rays.json", "states/step-1/a"]


def test_the_last_file_tells_that_all_are_there(
    run: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk, written = Desk(run), list[str]()
    (desk.path / "model").mkdir()
    for name in ("README.md", "model.safetensors", "zebra"):
        (desk.path / "model" / name).touch()
    monkeypatch.setattr(type(run), "write", lambda self, name, data: written.append(name))
    desk.keep("model", last="model/model.safetensors")
    assert written == ["model/README.md", "model/zebra", "model/model.safetensors"]


def test_a_folder_is_its_own_desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "log").write_text("here")
    desk = Desk(open_folder(tmp_path))
    assert desk.path == tmp_path
    desk.fetch("log")
    desk.keep("log")
    desk.drop("none")
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
    assert desk.soon("log")
    assert desk.soon("log")


def test_what_grows_is_copied_now_and_then(run: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(run)
    assert desk.soon("log")
    assert not desk.soon("log")
    assert desk.soon("other")
    monkeypatch.setattr(module, "SOON_S", 0.0)
    assert desk.soon("log")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_2_cpus")
def test_a_run_in_a_bucket_is_the_run_of_a_folder(
    tiny: Config, run: Folder, unbroken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = train(tiny, origin=GLYPHS, out=run)
    assert outcome.images == tiny.train.steps
    assert "test:test" not in str(outcome.out)
    # Beside Ray's own.
    names = [re.sub(r"tensorboard/.*", "tensorboard/events", name) for name in run.list()]
    assert {name for name in names if not name.startswith(("checkpoints/c", "checkpoints/."))} == {
        "job.json", "config.yaml", "failures.parquet", "metrics.jsonl", "pictures.png",
        "report.html", "tensorboard/events",
        *(f"checkpoints/step-0000000{step}/{x}" for step in (10, 20)
          for x in ("config.yaml", "state.pt")),
        *(f"model/{x}" for x in ("README.md", "config.yaml", "metrics.json", "model.safetensors")),
    }  # fmt: skip
    assert (
        run.read("model/model.safetensors") == (unbroken / "model/model.safetensors").read_bytes()
    )
    assert b"Done: snr train" in run.read("report.html")
    model = str(run.join("model"))
    assert load_model(model).config.train == tiny.train
    assert train(tiny, origin=GLYPHS, out=run).images == tiny.train.steps  # and nothing is done
    other = configs.replace(tiny, {"train.lr": 0.5})
    with pytest.raises(InputError, match=r"another job \(train\.lr"):
        train(other, origin=GLYPHS, out=run)
    with locked(run, "train"), pytest.raises(InputError, match=r"s3://.* in use by snr train"):
        train(tiny, origin=GLYPHS, out=run)
    # Only the state before is left, as after a kill; the newest is damaged.
    run.remove("model")
    run.write("checkpoints/step-000000020/state.pt", b"cut short")
    train(tiny, origin=GLYPHS, out=run)
    assert re.search(r"damaged: s3://.*step-000000020 .*goes on from", capsys.readouterr().err)
    assert (
        run.read("model/model.safetensors") == (unbroken / "model/model.safetensors").read_bytes()
    )


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_killed_run_continues_from_the_bucket(
    unbroken: Path, bucket: tuple[pafs.FileSystem, str]
) -> None:
    # Driver, Ray and workers all die at once, and with them what this machine knows.
    run = open_folder(f"s3://bucket/run?{bucket[1]}")
    command = [
        sys.executable, "-m", "snr_ray.cli", "train", "--config", "smoke",
        "--set", "images.limit=200", "--images", "glyphs", "--out",
    ]  # fmt: skip
    job = subprocess.Popen([*command, str(run)], start_new_session=True, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 180
    while not run.exists("checkpoints/step-000000010/state.pt"):
        assert job.poll() is None, job.stderr.read().decode() if job.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate()
    done = subprocess.run([*command, str(run)], capture_output=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert [row["step"] for row in metrics_of(run) if "swap_psnr" in row] == [10, 20]
    weights = "model/model.safetensors"
    assert run.read(weights) == (unbroken / weights).read_bytes()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("ray_2_cpus")
def test_a_sweep_in_a_bucket_continues_from_it(
    tiny: Config, run: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(
            "snr_ray.stages.sweeping.sweep._report", die
        )  # the driver dies while trial 0 runs
        with pytest.raises(Killed):
            sweep(tiny, origin=GLYPHS, out=run, trials=2)
    outcome = sweep(tiny, origin=GLYPHS, out=run, trials=2, seeds=2)
    assert outcome.images == 2
    names = run.list()
    assert {"best.yaml", "trials.csv", "history.png", "split.png", "report.html",
            "study.journal", "data/manifest.json"} <= set(names)  # fmt: skip
    trials = {name.split("/")[1] for name in names if name.startswith("trials/")}
    assert trials == {"0000", "0002"}  # trial 1 went on with the folder of trial 0
    assert "trials/0000/model/model.safetensors" in names
    assert len(run.read("trials.csv").decode().splitlines()) == 3
    best = Desk(run)
    best.fetch("best.yaml")
    assert configs.load([best.path / "best.yaml"]).train.steps == tiny.sweep.steps
