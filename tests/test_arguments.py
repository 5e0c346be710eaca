"""Names and flags of the contract, and what they refuse."""

import pytest

from snr_ray import configfile as configs
from snr_ray.arguments import parser
from snr_ray.cli import main
from snr_ray.learning.checkpoint import load_model
from snr_ray.usage import PURPOSE

FLAGS = {
    "demo": ["--out"],
    "simulate": ["--images", "--out", "--overwrite"],
    "train": ["--images", "--data", "--out", "--batch-size"],
    "sweep": [
        "--images",
        "--data",
        "--out",
        "--trials",
        "--objective",
        "--at-most",
        "--at-least",
        "--storage",
        "--study",
        "--confirm",
    ],
    "denoise": ["--model", "--images", "--out", "--donor", "--samples", "--inject", "--views"],
    "evaluate": ["--model", "--images", "--out", "--baselines", "--limit"],
    "reconstruct": ["--sinogram", "--out", "--flats", "--darks", "--center", "--every", "--bin"],
    "plan": ["--size", "--views", "--model", "--nodes", "--cores", "--gpus", "--rates", "--price"],
    "bench": ["radon", "simulate", "data", "train", "denoise", "sweep", "--out"],
}


@pytest.mark.parametrize("stage", PURPOSE)
def test_help_names_every_flag_and_shows_examples(
    stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([stage, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for flag in FLAGS[stage]:
        assert flag in text
    for flag in ("--config NAME|FILE", "--set KEY=VALUE"):  # where there is a setting to read
        assert (flag in text) == (stage != "reconstruct")
    assert f"examples:\n  snr {stage}" in text


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["polish"],
        ["simulate", "--images", "glyphs"],
        ["train", "--images", "glyphs", "--data", "d", "--out", "o"],
        ["denoise", "--model", "m", "--images", "i", "--out", "o", "--inject", "many"],
        ["denoise", "--model", "m", "--images", "i", "--out", "o", "--views", "many"],
        ["sweep", "--images", "glyphs", "--out", "o"],
    ],
)
def test_wrong_usage_exits_with_two(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "usage: snr" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [["demo"], ["bench", "radon"], ["plan", "--images", "9", "--size", "64", "--views", "9"]],
)
def test_what_cannot_be_in_a_bucket_is_refused_by_name(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*argv, "--out", "s3://key:hush@bucket/x"])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "--out: takes a path on this machine, but got 's3://bucket/x'; copy the result" in said
    assert "hush" not in said


def test_denoise_takes_the_model_for_any_image_by_itself() -> None:
    args = parser().parse_args(["denoise", "--images", "i", "--out", "o"])
    assert args.model in configs.shipped_models()
    trained = load_model(args.model)
    assert trained.views is not None
    for n_views, side in ((20, 64), (100, 512)):
        least, most = trained.views.counts(side)
        assert least <= n_views <= most
