"""The sweep stage: trials, pruning by the files of a run, resume after a kill, best.yaml."""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
import ray
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from PIL import Image
from stages.sweeping.postgres import free_port

from snr_ray import configfile as configs
from snr_ray.address import open_folder
from snr_ray.config import Config
from snr_ray.errors import InputError, RunError
from snr_ray.stages.simulation.dataset import Origin
from snr_ray.stages.sweeping import sweep as module
from snr_ray.stages.sweeping.confirm import confirm, read_confirmation
from snr_ray.stages.sweeping.objectives import Goals
from snr_ray.stages.sweeping.study import FINISHED, BetterHalf, by_rungs
from snr_ray.stages.sweeping.sweep import sweep

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

    def die(running: Any, *_: object) -> None:
        if running.folder.exists("config.yaml"):
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module, "_report", die)  # the driver dies while trial 0 runs
        with pytest.raises(Killed):
            sweep(tiny, origin=GLYPHS, out=out, trials=2)
    assert [t.state for t in study_of(out).trials] == [TrialState.RUNNING]
    # Ray goes on, as in a notebook, but not the trial: it would write beside the one that resumes.
    assert not [title for title in _titles() if title.startswith("ray::_train_trial")]
    outcome = sweep(tiny, origin=GLYPHS, out=out, trials=2)
    assert outcome.images == 2
    trials = study_of(out).trials
    assert [t.state for t in trials].count(TrialState.COMPLETE) >= 1
    # The interrupted trial was asked again with its folder and parameters.
    assert trials[1].user_attrs["folder"] == trials[0].user_attrs["folder"] == "0000"
    assert trials[1].params == trials[0].params
    best = configs.load([out / "best.yaml"])
    whole = (out / "best.yaml").read_text()
    (out / "best.yaml").write_text(whole[:40] + "{")  # damaged
    sweep(tiny, origin=GLYPHS, out=out, trials=2)
    assert (out / "best.yaml").read_text() == whole
    assert best.train.steps == tiny.sweep.steps
    for name in ("history.png", "split.png"):
        with Image.open(out / name) as image:
            assert image.width > 300
    assert len((out / "trials.csv").read_text().splitlines()) == 3
    page = (out / "report.html").read_text()
    assert page.count("<img") == 2
    assert "2 trials" in page
    for trial in study_of(out).get_trials(states=FINISHED):
        assert trial.user_attrs["measured"]["seconds_per_image"] > 0
    _confirms(by_rungs(tiny), out)


def _titles() -> Iterator[str]:
    """What the processes that this one has started call themselves."""
    for one in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            yield " ".join(one.cmdline())


def _confirms(given: Config, out: Path) -> None:
    """Two configs with two seeds each on the data of a sweep, and again, which trains nothing."""
    other = configs.replace(given, {"model.noise_channels": [1, 1]})
    found = confirm(other, given, Goals(), Origin(data=out / "data"), open_folder(out), 2)
    assert found.seeds == [1, 2]
    assert len({*found.best, *found.given}) == 4
    assert read_confirmation(out) == found
    runs = sorted((out / "confirm").iterdir())
    assert [configs.load([run / "config.yaml"]).seed for run in runs] == [1, 2, 1, 2]
    before = [(run / "metrics.jsonl").stat().st_mtime_ns for run in runs]
    assert confirm(other, given, Goals(), Origin(data=out / "data"), open_folder(out), 2) == found
    assert [(run / "metrics.jsonl").stat().st_mtime_ns for run in runs] == before


@pytest.mark.ray
@pytest.mark.usefixtures("ray_2_cpus")
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"train.use_gpu": True}, r"needs one GPU per worker \(1\), but the cluster has 0"),
        ({"train.num_workers": 4}, r"at most the cluster's 2 cores, but got 4 x 1\."),
    ],
)
def test_trials_that_never_have_room_are_refused(
    changes: dict[str, Any], sentence: str, tiny: Config, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=sentence):
        sweep(configs.replace(tiny, changes), origin=GLYPHS, out=tmp_path / "s", trials=1)
    assert not (tmp_path / "s" / "data").exists()


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


def test_one_seed_confirms_nothing(tiny: Config, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--confirm takes 2 seeds or more.*but got 1"):
        sweep(tiny, origin=GLYPHS, out=tmp_path / "s", trials=1, seeds=1)


def test_a_sweep_does_not_lie_among_the_images(tiny: Config, image_folder: Path) -> None:
    origin = Origin(images=str(image_folder))
    with pytest.raises(InputError, match="--out must lie outside the images"):
        sweep(tiny, origin=origin, out=image_folder / "s", trials=1)
    assert not (image_folder / "s").exists()


def test_a_study_is_named_where_it_is_stored_with_others(tiny: Config, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--study mine without it"):
        sweep(tiny, origin=GLYPHS, out=tmp_path / "s", trials=1, name="mine")


def test_a_storage_that_is_not_there_leaves_the_folder_alone(tiny: Config, tmp_path: Path) -> None:
    url = f"postgresql://me:hush@127.0.0.1:{free_port()}/db"
    with pytest.raises(InputError, match="cannot be reached"):
        sweep(tiny, origin=GLYPHS, out=tmp_path / "s", trials=1, storage=url)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(("steps", "ends"), [(9, True), (3, False)])
def test_a_trial_that_has_run_all_its_steps_is_not_ended(
    tmp_path: Path, steps: int, ends: bool
) -> None:
    study = optuna.create_study(direction="maximize", pruner=BetterHalf())
    for _ in range(3):
        better = study.ask()
        better.report(30.0, 3)
    folder = open_folder(tmp_path)
    folder.write("metrics.jsonl", "".join(
        json.dumps({"step": step, "swap_psnr": 20.0}) + "\n" for step in (1, 2, 3)))  # fmt: skip
    module._report(module._Live(study.ask(), "0004", folder), Goals(), steps)
    assert folder.exists("stop") == ends


@pytest.mark.ray
@pytest.mark.usefixtures("ray_2_cpus")
def test_trials_that_fail_one_after_the_other_end_a_sweep(tiny: Config, tmp_path: Path) -> None:
    """Also where trials have finished before, as where a disk is full by now."""

    @ray.remote
    def fail() -> None:
        raise InputError("No space left on device.")

    study = optuna.create_study()
    study.add_trial(optuna.trial.create_trial(value=40.0))
    driving = module._Sweep(study, None, tiny, Goals(), GLYPHS, None, None)  # type: ignore[arg-type]
    for k in range(module.FAILS_IN_A_ROW):
        ref = fail.remote()
        driving.live[ref] = module._Live(study.ask(), str(k), open_folder(tmp_path))
        if k < module.FAILS_IN_A_ROW - 1:
            assert not driving._end(ref, driving.live[ref])
    with pytest.raises(RunError, match=r"3 in a row did, the last with: .*No space left"):
        driving._end(ref, driving.live[ref])
