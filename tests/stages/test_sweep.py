"""The sweep stage: trials, pruning by the files of a run, resume after a kill, best.yaml."""

from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from PIL import Image

from snr_ray import configfile as configs
from snr_ray.config import Config, InputError
from snr_ray.stages import sweep as module
from snr_ray.stages.dataset import Origin
from snr_ray.stages.sweep import sweep

GLYPHS = Origin(images="glyphs")


def study_of(out: Path) -> optuna.Study:
    storage = JournalStorage(JournalFileBackend(str(out / "study.journal")))
    return optuna.load_study(study_name="sweep", storage=storage)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_2_cpus")
def test_killed_sweep_resumes_its_trial_and_ends_with_a_usable_config(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "sweep"

    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module, "_report", die)  # the driver dies while trial 0 runs
        with pytest.raises(Killed):
            sweep(tiny, origin=GLYPHS, out=out, trials=2)
    assert [t.state for t in study_of(out).trials] == [TrialState.RUNNING]
    outcome = sweep(tiny, origin=GLYPHS, out=out, trials=2)
    assert outcome.images == 2
    trials = study_of(out).trials
    assert [t.state for t in trials].count(TrialState.COMPLETE) >= 1
    # The interrupted trial was asked again with its folder and parameters.
    assert trials[1].user_attrs["folder"] == trials[0].user_attrs["folder"] == "0000"
    assert trials[1].params == trials[0].params
    best = configs.load([out / "best.yaml"])
    assert best.train.steps == tiny.sweep.steps
    for name in ("history.png", "split.png"):
        with Image.open(out / name) as image:
            assert image.width > 300
    assert len((out / "trials.csv").read_text().splitlines()) == 3
    page = (out / "report.html").read_text()
    assert page.count("<img") == 2
    assert "2 trials" in page


def test_zero_trials_are_refused(tiny: Config, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--trials must be at least 1, but got 0"):
        sweep(tiny, origin=GLYPHS, out=tmp_path / "s", trials=0)


def test_unet_has_no_split_to_search(tiny: Config, tmp_path: Path) -> None:
    config = configs.replace(tiny, {"model.kind": "unet"})
    with pytest.raises(InputError, match=r"model\.kind=unet has no codes"):
        sweep(config, origin=GLYPHS, out=tmp_path / "s", trials=1)


def test_start_leaves_no_sizes_to_search(tiny: Config, tmp_path: Path) -> None:
    config = configs.replace(tiny, {"train.start": "notmnist"})
    with pytest.raises(InputError, match=r"train\.start=notmnist fixes them"):
        sweep(config, origin=GLYPHS, out=tmp_path / "s", trials=1)
