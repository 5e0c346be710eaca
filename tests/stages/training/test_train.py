"""The train stage on Ray: one and two workers agree, a killed run continues to the same weights."""

import contextlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image
from safetensors.numpy import load_file

from snr_ray import configfile as configs
from snr_ray.address import open_folder
from snr_ray.config import Config
from snr_ray.errors import InputError, NoRoom
from snr_ray.hashing import hash64
from snr_ray.learning.checkpoint import load_model
from snr_ray.learning.learner import Learner
from snr_ray.learning.modelfolder import BF16_COSTS
from snr_ray.learning.restart import newest_checkpoint, save_checkpoint
from snr_ray.lock import locked
from snr_ray.stages.simulation import dataset
from snr_ray.stages.simulation.dataset import Origin
from snr_ray.stages.simulation.simulate import simulate
from snr_ray.stages.training import setup
from snr_ray.stages.training import train as module
from snr_ray.stages.training.runlog import read_metrics
from snr_ray.stages.training.setup import check_images, settle_start, wait_for_room
from snr_ray.stages.training.train import train
from snr_ray.stages.training.worker import interface_of

pytestmark = pytest.mark.ray
GLYPHS = Origin(images="glyphs")


def weights(run: Path) -> np.ndarray:
    tensors = load_file(run / "model" / "model.safetensors")
    return np.concatenate([tensors[k].ravel() for k in sorted(tensors) if k.startswith("model.")])


def test_run_folder_holds_what_was_promised(tiny: Config, unbroken: Path) -> None:
    rows = read_metrics(unbroken / "metrics.jsonl")
    assert [row["step"] for row in rows if "swap_psnr" in row] == [10, 20]
    assert rows[-2]["step"] == 20
    assert rows[-2]["loss"] > 0
    assert list((unbroken / "tensorboard").glob("events*"))
    assert configs.load([unbroken / "config.yaml"]) == tiny
    assert pq.read_table(unbroken / "failures.parquet").num_rows == 0
    assert {path.name for path in (unbroken / "model").iterdir()} == {
        "model.safetensors", "config.yaml", "metrics.json", "README.md"}  # fmt: skip
    metrics = json.loads((unbroken / "model" / "metrics.json").read_text())
    assert -1 < metrics[BF16_COSTS] < 1


@pytest.mark.slow
@pytest.mark.usefixtures("ray_2_cpus")
def test_two_workers_learn_what_one_does(tiny: Config, unbroken: Path, tmp_path: Path) -> None:
    # From a data folder, too: where rows come from must not matter either.
    simulate(tiny, images="glyphs", out=tmp_path / "data")
    # Half a core each leaves Ray Data the other.
    two = configs.replace(tiny, {"train.num_workers": 2, "train.batch_size": 16})
    run = train(two, origin=Origin(data=tmp_path / "data"), out=tmp_path / "run").out
    np.testing.assert_allclose(weights(run), weights(unbroken), atol=2e-4)


@pytest.mark.usefixtures("ray_2_cpus")
def test_finished_run_is_left_alone(tiny: Config, unbroken: Path) -> None:
    stamp = (unbroken / "model" / "model.safetensors").stat().st_mtime_ns
    outcome = train(tiny, origin=GLYPHS, out=unbroken)
    assert outcome.images == 20
    assert (unbroken / "model" / "model.safetensors").stat().st_mtime_ns == stamp


def test_a_finished_run_whose_driver_was_killed_gets_its_page(
    tiny: Config, unbroken: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(unbroken, tmp_path / "run")
    for left in ("", "<p>Interrupted; the same command continues: snr train</p>"):
        (run / "report.html").write_text(left)
        train(tiny, origin=GLYPHS, out=run)
        assert (run / "report.html").read_text() == (unbroken / "report.html").read_text()


def test_the_command_of_a_page_is_one_that_a_shell_takes() -> None:
    command = module._named(Origin(images="my 'scans'/a*.png?x&y"))
    assert shlex.split(command) == ["snr", "train", "--images", "my 'scans'/a*.png?x&y"]


@pytest.mark.usefixtures("ray_2_cpus")
def test_a_damaged_model_is_made_anew(
    tiny: Config, unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(unbroken, tmp_path / "run")
    model = run / "model" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:1000])
    assert train(tiny, origin=GLYPHS, out=run).images == 20
    assert "It is made anew." in capsys.readouterr().err
    np.testing.assert_array_equal(weights(run), weights(unbroken))


def test_a_finished_run_without_its_failures_or_curves_says_so(
    tiny: Config, unbroken: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(unbroken, tmp_path / "run")
    for left in (b"", b"PAR1 is not enough", None):
        if left is None:
            (run / "failures.parquet").unlink()
        else:
            (run / "failures.parquet").write_bytes(left)
        with pytest.raises(InputError, match=r"missing or damaged .*model, can be used without"):
            train(tiny, origin=GLYPHS, out=run)
    shutil.copy(unbroken / "failures.parquet", run)
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match=r"holds none; .*model, can be used without"):
        train(tiny, origin=GLYPHS, out=run)


@pytest.mark.usefixtures("ray_2_cpus")
def test_a_full_disk_ends_a_run_at_once(tiny: Config, unbroken: Path, tmp_path: Path) -> None:
    run = shutil.copytree(unbroken, tmp_path / "run")
    shutil.rmtree(run / "model")
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").symlink_to("/dev/full")  # takes nothing, as a full disk
    with pytest.raises(NoRoom, match=r"No space left on device\); make some, and the same command"):
        train(tiny, origin=GLYPHS, out=run)
    assert not (run / "errors.txt").exists()  # it was not tried again and again
    (run / "metrics.jsonl").unlink()
    train(tiny, origin=GLYPHS, out=run)
    np.testing.assert_array_equal(weights(run), weights(unbroken))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_2_cpus")
def test_a_range_of_views_is_learned_on_several_sizes(
    tiny: Config, image_folder: Path, tmp_path: Path
) -> None:
    # Of images of 18 and 10 pixels, a file that is none, and a run that is continued.
    for k in range(30):
        Image.new("L", (10, 10 + k % 2), 8 * k).save(image_folder / "a" / f"small{k}.png")
    (image_folder / "b" / "none.png").write_bytes(b"no image")
    config = configs.replace(
        tiny,
        {"noise.views_per_pixel": [0.2, 0.9], "train.sizes": [8, 16], "train.batch_size": 2},
    )
    origin, out = Origin(images=str(image_folder)), tmp_path / "run"
    outcome = train(config, origin=origin, out=out)
    trained = load_model(out / "model")
    assert trained.views_per_pixel == (0.2, 0.9)
    assert trained.config.train.sizes == (8, 16)
    rows = read_metrics(out / "metrics.jsonl")
    assert rows[-2]["views_error"] > 0
    assert {"told_psnr", "told_psnr_12", "swap_psnr_6"} <= set(rows[-1])
    with (out / "failures.parquet").open("rb") as file:
        failed = pq.read_table(file)["id"].to_pylist()
    assert failed in (["b/none.png"], [])  # it may lie in the test split
    assert outcome.images == config.train.steps


def test_folder_of_another_run_is_refused(tiny: Config, unbroken: Path) -> None:
    other = configs.replace(tiny, {"train.lr": 0.5})
    difference = rf"another job \(train\.lr: {tiny.train.lr} there, 0\.5 now\)"
    with pytest.raises(InputError, match=difference):
        train(other, origin=GLYPHS, out=unbroken)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_2_cpus")
def test_large_set_is_streamed(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "MEMORY_SHARE", 0.0)
    run = train(tiny, origin=GLYPHS, out=tmp_path / "run").out
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row] == [20]
    assert (run / "model" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_killed_run_continues_to_the_same_weights(
    tiny: Config, unbroken: Path, tmp_path: Path
) -> None:
    # Driver, Ray and workers all die at once, after the first checkpoint and before the end.
    run = tmp_path / "run"
    command = [
        sys.executable, "-m", "snr_ray.cli", "train", "--config", "smoke",
        "--set", "images.limit=200", "--images", "glyphs", "--out", str(run),
    ]  # fmt: skip
    job = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 180
    while not any("swap_psnr" in row for row in read_metrics(run / "metrics.jsonl")):
        assert job.poll() is None, job.stderr.read().decode() if job.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate()
    done = subprocess.run(command, capture_output=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr.decode()
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows if "swap_psnr" in row] == [10, 20]
    np.testing.assert_allclose(weights(run), weights(unbroken), atol=1e-6)


@pytest.mark.usefixtures("ray_2_cpus")
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    tiny: Config, unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(unbroken, tmp_path / "run")
    shutil.rmtree(run / "model")
    newest = run / "checkpoints" / "step-000000020" / "state.pt"
    newest.write_bytes(newest.read_bytes()[:5000])
    (run / "checkpoints" / "checkpoint_manager_snapshot.json").write_text('{"ray_version"')
    train(tiny, origin=GLYPHS, out=run)
    told = capsys.readouterr().err
    assert re.search(r"damaged: .*step-000000020 .*goes on from .*step-000000010\.", told)
    np.testing.assert_allclose(weights(run), weights(unbroken), atol=1e-6)


@pytest.mark.usefixtures("ray_2_cpus")
def test_a_run_killed_after_its_last_state_gets_its_model(
    tiny: Config, unbroken: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(unbroken, tmp_path / "run")
    shutil.rmtree(run / "model")
    train(tiny, origin=GLYPHS, out=run)
    assert (weights(run) == weights(unbroken)).all()
    assert read_metrics(run / "metrics.jsonl") == read_metrics(unbroken / "metrics.jsonl")


@pytest.mark.usefixtures("ray_2_cpus")
def test_bad_setups_are_refused_before_any_worker_starts(
    tiny: Config, image_folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    def run(origin: Origin, **changes: object) -> None:
        dotted = {key.replace("__", "."): value for key, value in changes.items()}
        train(configs.replace(tiny, dotted), origin=origin, out=tmp_path / "run")

    with pytest.raises(InputError, match="simulate first, or give the images"):
        run(Origin(data=tmp_path))
    with pytest.raises(InputError, match="either --images SRC or --data DIR"):
        Origin()
    with pytest.raises(InputError, match="at most the cluster's 2 cores, but got 1 x 9"):
        run(GLYPHS, train__cpus_per_worker=9)
    with pytest.raises(InputError, match=r"crops of 12 pixels.* --config network"):
        run(GLYPHS, images__crop=12)
    with pytest.raises(InputError, match=r"crops of 12 pixels.*a train\.start whose decoder"):
        run(GLYPHS, images__crop=12, model__decoder="network", train__start=str(model_folder))
    with pytest.raises(InputError, match="one GPU per worker"):
        train(configs.replace(tiny, {"train.use_gpu": True}), origin=GLYPHS, out=tmp_path / "gpu")
    with pytest.raises(InputError, match=r"batch_size = 32\), but the train split .* holds 19;"):
        train(configs.replace(tiny, {"train.batch_size": 32}),
              origin=Origin(images=str(image_folder)), out=tmp_path / "few")  # fmt: skip
    with pytest.raises(InputError, match="--out must lie outside the images"):
        train(tiny, origin=Origin(images=str(image_folder)), out=image_folder / "run")
    assert not (image_folder / "run").exists()


@pytest.mark.usefixtures("ray_2_cpus")
def test_run_may_start_from_a_model(
    tiny: Config, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A rate of next to nothing leaves the model as it was, whatever its sizes are called here.
    changes = {"train.start": str(model_folder), "train.lr": 1e-9, "train.steps": 2}
    wider = configs.replace(tiny, {**changes, "model.channels": [16, 16]})
    run = train(wider, origin=GLYPHS, out=tmp_path / "run").out
    assert (
        "has model.channels=[8, 8], which is used in place of [16, 16]" in capsys.readouterr().err
    )
    np.testing.assert_allclose(weights(run), weights(model_folder.parent), atol=1e-5)


def test_start_may_lack_what_steps_see_around(tiny: Config, model_folder: Path) -> None:
    config = configs.replace(
        tiny, {"train.start": str(model_folder), "model.step_channels": [6, 8]}
    )
    assert settle_start(config) == config


def test_start_from_another_kind_is_refused(
    tiny: Config, model_folder: Path, unet_folder: Path, range_folder: Path, tmp_path: Path
) -> None:
    def run(start: Path, **changes: object) -> None:
        dotted = {key.replace("__", "."): value for key, value in changes.items()}
        config = configs.replace(tiny, {"train.start": str(start), **dotted})
        train(config, origin=GLYPHS, out=tmp_path / "run")

    with pytest.raises(InputError, match=r"same model\.kind, but .* has unet where .* has hvae"):
        run(unet_folder)
    with pytest.raises(InputError, match=r"same images\.channels, but .* set images\.channels=1"):
        run(model_folder, images__channels=3)
    with pytest.raises(InputError, match="A model folder holds"):
        run(tmp_path)
    with pytest.raises(
        InputError, match=r"has 2 \(\[12, 6\]\) where this run has 3 .*to 2 of them"
    ):
        run(model_folder, noise__n_views=[16, 12, 6])
    with pytest.raises(InputError, match=r"range of view counts, .*trained on \[12, 6\] views"):
        run(model_folder, noise__views_per_pixel=[0.2, 0.9])
    with pytest.raises(InputError, match=r"set noise\.views_per_pixel=\[0\.2,0\.9\], or start"):
        run(range_folder)


def test_start_of_a_range_takes_any_view_counts_to_validate(
    tiny: Config, range_folder: Path
) -> None:
    changes = {"noise.views_per_pixel": [0.2, 0.9], "noise.n_views": [14, 12, 6]}
    config = configs.replace(tiny, {**changes, "train.start": str(range_folder)})
    assert settle_start(config) == config


@pytest.mark.usefixtures("ray_2_cpus")
def test_images_that_cannot_be_read_end_the_run_before_it_starts(
    tiny: Config, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for k in range(40):
        Image.fromarray(np.full((20, 20), 5 * k, np.uint16)).save(images / f"{k:02d}.tif")
    with pytest.raises(InputError, match=r"images\.white"):
        train(tiny, origin=Origin(images=str(images)), out=tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoints*"))  # no worker was started


def test_too_few_images_that_can_be_read_are_a_sentence(tiny: Config, tmp_path: Path) -> None:
    bad = [{"id": f"{k}.tif", "stage": "read", "reason": "It is no image."} for k in range(30)]
    counts, origin = {"train": 30 + tiny.train.batch_size - 1, "val": 4}, Origin(images="scans")
    few = r"one batch of images .* in the train .*30 cannot .*\(0\.tif\) because: It"
    with pytest.raises(InputError, match=few):
        check_images(open_folder(tmp_path), tiny, origin, counts, {"train": bad, "val": []})
    assert pq.read_table(tmp_path / "failures.parquet").num_rows == 30
    with pytest.raises(
        InputError, match="one image to validate on, but of the 4 images in the val"
    ):
        check_images(open_folder(tmp_path), tiny, origin, counts, {"train": [], "val": bad[:4]})
    counts["train"] += 1
    check_images(open_folder(tmp_path), tiny, origin, counts, {"train": bad, "val": bad[:3]})


@pytest.mark.usefixtures("ray_2_cpus")
def test_an_error_of_the_user_in_a_worker_ends_the_run_at_once(
    tiny: Config, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.raises(InputError, match="at most the cluster's 2 cores"):  # claims the folder
        train(configs.replace(tiny, {"train.cpus_per_worker": 9}), origin=GLYPHS, out=run)
    learner = Learner(configs.replace(tiny, {"model.channels": [8, 16]}))
    learner.step = 5
    save_checkpoint(run / "checkpoints", learner)
    with pytest.raises(InputError, match=r"its own network, but .*step-000000005 holds another"):
        train(tiny, origin=GLYPHS, out=run)
    assert newest_checkpoint(run / "checkpoints")[0] is not None


def test_a_folder_in_use_is_refused_and_left_as_it_is(tiny: Config, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with locked(run, "train"):
        before = sorted(run.iterdir())
        with pytest.raises(InputError, match=r"in use by snr train on .*wait until"):
            train(tiny, origin=GLYPHS, out=run, overwrite=True)
        assert sorted(run.iterdir()) == before


@pytest.mark.usefixtures("ray_2_cpus")
def test_processors_that_are_busy_are_waited_for_and_told(
    tiny: Config, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "SOON_S", 0.1)

    def work() -> None:
        time.sleep(4)

    busy = ray.remote(num_cpus=2)(work).remote()
    while ray.available_resources().get("CPU", 0):
        time.sleep(0.1)
    with pytest.raises(InputError, match=r"After --wait 0\.01 minutes .* 1 CPUs, 0 free; wait"):
        wait_for_room(tiny, 0.01, tell=False)
    wait_for_room(tiny, None, tell=True)
    ray.get(busy)
    assert "train: waiting for 1 CPUs, 0 free" in capsys.readouterr().err


def test_workers_find_each_other_by_the_address_of_their_node() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.1") is None


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_training_bears_kills_anywhere(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """Worker, driver or everything at once, at random times: the same weights to the last bit."""
    command = [
        sys.executable, "-m", "snr_ray.cli", "train", "--config", "smoke", "--images", "glyphs",
        "--set", "images.limit=200", "--set", "train.steps=60", "--out",
    ]  # fmt: skip
    since = time.monotonic()
    subprocess.run([*command, tmp_path / "whole"], check=True, stderr=subprocess.DEVNULL)
    whole = time.monotonic() - since
    print(f"unbroken: {whole:.0f} s", flush=True)
    for k in range(pytestconfig.getoption("rounds")):
        draw, run = random.Random(hash64(f"kill training/{k}")), tmp_path / f"{k}"
        victim = draw.choice(["worker", "driver", "everything"])
        since = time.monotonic()
        job = subprocess.Popen([*command, run], start_new_session=True, stderr=subprocess.DEVNULL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.wait(draw.uniform(0.1, 0.95) * whole)
        at = time.monotonic() - since
        steps = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
        if victim == "worker":
            while not (workers := _workers(job)) and job.poll() is None:
                time.sleep(0.05)
            for worker in workers:
                worker.kill()
        elif victim == "driver":
            job.kill()
        elif job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
        if job.wait():
            subprocess.run([*command, run], check=True, stderr=subprocess.DEVNULL)
        took = time.monotonic() - since
        np.testing.assert_array_equal(weights(run), weights(tmp_path / "whole"))
        print(f"{k}: {victim} killed after {at:.0f} s, checkpoints {steps}, ended "
              f"after {took:.0f} s, equal", flush=True)  # fmt: skip
        shutil.rmtree(run)


def _workers(job: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Processes that train."""
    found = []
    with contextlib.suppress(psutil.Error):
        for one in psutil.Process(job.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "ray::RayTrainWorker" in " ".join(one.cmdline()):
                    found.append(one)
    return found
