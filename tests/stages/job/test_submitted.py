"""A submitted job names places that outlive its copy of the working directory."""

import re

import pytest

from snr_ray.cli import main


@pytest.fixture
def in_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")


DENOISE = {"--model": "notmnist", "--images": "/mnt/share/none", "--out": "/mnt/share/out"}
EVALUATE = {"--model": "notmnist", "--images": "glyphs", "--out": "s3:/b/x"}


@pytest.mark.parametrize(
    ("stage", "changes", "name", "use"),
    [
        ("simulate", {"--images": "/nfs/scans", "--out": "data"}, "--out", "/nfs/data"),
        ("simulate", {"--images": "glyphs", "--out": "data"}, "--out", "/mnt/share/data"),
        ("simulate", {"--images": "scans", "--out": "/nfs/d"}, "--images", "/nfs/scans"),
        ("simulate", {"--images": "scans/*.png", "--out": "/d"}, "--images", "*.png"),
        ("simulate", {"--images": "cifar10:c", "--out": "/nfs/d"}, "--images", "/nfs/c"),
        ("train", {"--data": "data", "--out": "/nfs/run"}, "--data", "/nfs/data"),
        (
            "train",
            {"--images": "glyphs", "--out": "/nfs/run", "--set": "train.start=run/model"},
            "train.start",
            "/nfs/model",
        ),
        ("denoise", {**DENOISE, "--model": "run/model"}, "--model", "/mnt/share/model"),
        ("denoise", {**DENOISE, "--donor": "clean.png"}, "--donor", "/mnt/share/clean.png"),
        ("evaluate", {**EVALUATE, "--out": "/nfs/e", "--beside": "u"}, "--beside (1)", "/nfs/u"),
        ("demo", {}, "--out", "/mnt/share/demo"),
        (
            "reconstruct",
            {"--sinogram": "s.npy", "--out": "/nfs/r"},
            "--sinogram",
            "/nfs/s.npy",
        ),
        (
            "plan",
            {"--images": "1e6", "--size": "32", "--views": "10", "--like": "scans"},
            "--like",
            "/mnt/share/scans",
        ),
    ],
)
def test_relative_path_is_refused_with_the_one_to_use(
    stage: str,
    changes: dict[str, str],
    name: str,
    use: str,
    in_a_job: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = [stage, *(word for pair in changes.items() for word in pair)]
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert f"so {name} must be an absolute path" in said
    assert re.search(rf"such as \S*{re.escape(use)}\.\n$", said)


@pytest.mark.parametrize("images", ["/mnt/share/none", "notmnist:/none", "file:///none"])
def test_absolute_paths_and_names_pass(
    images: str, in_a_job: None, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["denoise", "--model", "notmnist", "--images", images, "--out", "/mnt/share/out"]
    assert main(argv) == 2
    assert "absolute" not in capsys.readouterr().err


def test_outside_a_job_paths_are_as_ever(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--images", "nowhere", "--out", "out"]) == 2
    assert "absolute" not in capsys.readouterr().err
