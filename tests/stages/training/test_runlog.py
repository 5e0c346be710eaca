"""The curves of a run on disk, damaged or not, and the progress line that follows them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from snr_ray import configfile as configs
from snr_ray.address import open_folder
from snr_ray.config import Config
from snr_ray.errors import InputError
from snr_ray.metrics import as_json
from snr_ray.stages.training import runlog
from snr_ray.stages.training.desk import Desk
from snr_ray.stages.training.runlog import RunLog, Watch, metrics_of, read_metrics
from snr_ray.stages.training.tracker import Settings, Tracker

ROWS = [{"step": step, "loss": 1.5 / step} for step in (25, 50, 75)]
TEXT = "".join(as_json(row) + "\n" for row in ROWS)


def test_a_last_line_cut_anywhere_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for n in range(len(TEXT) + 1):
        path.write_text(TEXT[:n])
        rows = read_metrics(path)
        assert rows == ROWS[: len(rows)]
        assert len(rows) >= TEXT[:n].count("\n")


@pytest.mark.parametrize(
    "line", [b"{", b"}", b'{"loss": 1.5}', b"[]", b"3", b'{"step": "a"}', b"\x00\xff}"]
)
def test_a_damaged_line_inside_is_one_sentence(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = TEXT.encode().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], line, *lines[2:]]))
    for read in (lambda: read_metrics(path), lambda: metrics_of(open_folder(tmp_path))):
        with pytest.raises(
            InputError, match=r"metrics\.jsonl must be .* line 2 is damaged .*remove"
        ):
            read()


def test_columns_of_a_picture_are_told_apart(tiny: Config, tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, tiny, Settings({}))
    with RunLog(tmp_path, 0, tracker) as run_log:
        run_log.picture(np.zeros((8, 8, 3), np.float32), ["clean", "noisy, 6 views"], 20)
    with Image.open(tmp_path / "pictures.png") as image:
        assert image.info["Description"].endswith(": clean | noisy, 6 views")


@pytest.mark.parametrize("scored", [True, False])
def test_the_last_line_tells_of_the_last_checkpoint(
    tiny: Config,
    tmp_path: Path,
    scored: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    told: list[str] = []
    monkeypatch.setattr(runlog, "show_training", lambda *_: None)
    monkeypatch.setattr(runlog, "write_page", lambda _, ending: told.append(ending))
    monkeypatch.setattr(Watch, "_follow", lambda _: None)  # what it reads is read below
    desk, path = Desk(open_folder(tmp_path)), tmp_path / "metrics.jsonl"
    watch = Watch(desk, configs.replace(tiny, {"train.steps": 50}), str)

    def wrote(**row: float) -> str:
        with path.open("a") as file:
            file.write(as_json(row) + "\n")
        watch._tell()
        return capsys.readouterr().err

    wrote(step=25, loss=1.0, images_per_s=9.0)
    wrote(step=25, unet_psnr=20.0)
    last = wrote(step=50, loss=0.5, images_per_s=9.0)
    if scored:
        last += wrote(step=50, unet_psnr=30.0)
    watch.stop()
    watch._tell()
    last += capsys.readouterr().err
    assert last.count("50/50") == 1
    assert f"loss 0.500, unet {30 if scored else 20}.0 dB" in last
    assert len(told) == 1 + scored
