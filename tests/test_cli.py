"""The command line as a whole: exit codes, sentences, signals, and the job files."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from snr_ray import cli
from snr_ray.cli import main
from snr_ray.usage import PURPOSE

REPOSITORY = Path(__file__).parent.parent


@pytest.mark.parametrize("stage", PURPOSE)
def test_job_is_the_same_door(stage: str) -> None:
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "jobs" / f"{stage}.py"), "--help"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert f"usage: snr {stage}" in done.stdout


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["simulate", "--images", "nowhere", "--out", "o"], "SRC must be a path that exists"),
        (["simulate", "--images", "empty", "--out", "o"], "holds none"),
        (["simulate", "--images", "glyphs", "--out", "taken.txt"], "but taken.txt is a file"),
        (["simulate", "--images", "glyphs", "--out", "o", "--set", "a.b=1"], "Unknown config"),
        (["simulate", "--images", "glyphs", "--out", "o", "--set", "images.size=-1"],
         "images.size must be from 8"),
        (["simulate", "--images", "glyphs", "--out", "o", "--set", "noise.n_views=[0]"],
         "n_views must be at least 1"),
        (["simulate", "--images", "glyphs", "--out", "o", "--config", "nope"],
         "--config takes a YAML file or one of"),
        (["train", "--data", "empty", "--out", "o"], "simulate first"),
        (["train", "--images", "glyphs", "--out", "o", "--batch-size", "0"], "from 1 to all"),
        (["sweep", "--images", "glyphs", "--out", "o", "--trials", "0"], "at least 1"),
        (["denoise", "--model", "empty", "--images", "glyphs", "--out", "o"], "A model folder"),
        (["evaluate", "--model", "empty", "--images", "glyphs", "--out", "o"], "A model folder"),
    ],
)  # fmt: skip
def test_bad_input_exits_with_two_and_one_sentence(
    argv: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken.txt").write_text("mine")
    assert main(argv) == 2
    text = capsys.readouterr().err
    assert sentence in text
    assert text.count("\n") == 1
    assert text.startswith(f"snr {argv[0]}: ")
    assert not (tmp_path / "o").exists()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_2_cpus")
def test_job_with_failures_exits_with_three(
    model_folder: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (image_folder / "broken.png").write_bytes(b"")
    argv = ["denoise", "--model", str(model_folder), "--images", str(image_folder), "--out",
            str(tmp_path / "out")]  # fmt: skip
    assert main(argv) == 3
    captured = capsys.readouterr()
    assert "24 images" in captured.out
    assert "1 images failed" in captured.err


@pytest.mark.ray
@pytest.mark.usefixtures("ray_2_cpus")
def test_bench_radon_writes_its_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    from snr_ray.stages.measuring import bench

    monkeypatch.setattr(bench, "RADON_SIZES", ((16, 4), (40, 6)))
    assert main(["bench", "radon", "--out", str(tmp_path / "b.json")]) == 0
    rows = json.loads((tmp_path / "b.json").read_text())["results"]
    assert [(row["size"], row["n_views"]) for row in rows] == [(16, 4), (40, 6)]
    for row in rows:
        assert row["max_abs_error"] < 1e-5
        assert row["ratio"] == pytest.approx(row["images_per_s"] / row["skimage_images_per_s"])
    assert "ratio" in capsys.readouterr().out


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(("limit", "counts"), [(400, [100, 400]), (10, [100])])
def test_bench_simulate_measures_a_real_job(
    limit: int,
    counts: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    import json

    from snr_ray.stages.measuring import benchjob

    monkeypatch.setattr(benchjob, "GENERATED_ROWS", 100)
    out = tmp_path / "b.json"
    assert main(["bench", "simulate", "--set", f"images.limit={limit}", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["results"]
    assert [row["images"] for row in rows] == counts
    for row in rows:
        assert row["images_per_s"] == pytest.approx(row["images"] / row["seconds"])
        assert 100 < row["peak_mb"] < 10_000
        assert row["one_core_images_per_s"] > 0 < row["all_cores_images_per_s"]
    assert out.with_suffix(".png").stat().st_size > 5000
    assert "share_of_all_cores" in capfd.readouterr().out


def test_help_comes_without_loading_ray_or_torch() -> None:
    code = ("import sys, snr_ray.cli as c\ntry: c.main(['train', '--help'])\n"
            "except SystemExit: pass\nprint({'ray', 'torch'} & set(sys.modules))")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 1)])
def test_a_stage_that_is_stopped_says_so_whatever_ray_makes_of_the_signal(
    sent: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def wait(*_: object) -> int:
        try:
            os.kill(os.getpid(), sent)
            time.sleep(5)
        except KeyboardInterrupt:  # an exception of Ray's own takes its place
            raise KeyboardInterrupt from None
        return 0

    monkeypatch.setattr(cli, "_run", wait)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored under nohup
    try:
        assert main(["train", "--images", "glyphs", "--out", "o"]) == code
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "\nsnr train: interrupted; the same command continues.\n"


def test_a_signal_that_ray_answers_itself_is_an_interruption(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """While it starts, Ray ends the process by its own handler of SIGTERM."""

    def end(*_: object) -> int:
        sys.exit(signal.SIGTERM)

    monkeypatch.setattr(cli, "_run", end)
    assert cli.main(["simulate", "--images", "glyphs", "--out", "o"]) == 143
    assert capsys.readouterr().err == "snr simulate: interrupted; the same command continues.\n"
