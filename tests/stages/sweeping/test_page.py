"""The table, the pictures and the page of a sweep."""

import csv
from pathlib import Path

import optuna
from optuna.trial import TrialState
from PIL import Image

from snr_ray.config import Config
from snr_ray.stages.sweeping.objectives import Goals, read_goals
from snr_ray.stages.sweeping.page import write_page
from snr_ray.stages.sweeping.storage import open_storage
from snr_ray.stages.sweeping.study import FINISHED, GIVEN, MEASURED, open_study, suggest


def written(tiny: Config, out: Path, goals: Goals, fails: str = "") -> str:
    """The page of twelve trials, whose wider content codes clean better and inject worse; the one
    of a folder `fails`."""
    study = open_study(open_storage(out, None), tiny, goals)
    for _ in range(12):
        trial = study.ask()
        trial.set_user_attr("folder", trial.user_attrs.get("folder", f"{trial.number:04d}"))
        suggest(trial, tiny)
        if trial.user_attrs["folder"] == fails:
            study.tell(trial, state=TrialState.FAIL)
            continue
        width = trial.params["content_channels_0"]
        measured = {"swap_psnr": 20.0 + width, "inject_psnr": 40.0 - width, "seconds_per_image": 1}
        trial.set_user_attr(MEASURED, measured)
        for bound in goals.bounds:
            trial.set_constraint(bound.text, bound.excess(measured))
        study.tell(trial, [measured[one.metric] for one in goals.objectives])
    front = _front(study) if len(goals.objectives) > 1 else []
    trials = study.get_trials(states=FINISHED)
    write_page(out, trials, goals, front, tiny.sweep, "optuna-dashboard HERE")
    return (out / "report.html").read_text()


def _front(study: optuna.Study) -> list[int]:
    return [trial.number for trial in study.best_trials]


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "trials.csv").open() as file:
        return list(csv.DictReader(file))


def test_page_of_one_objective_has_no_front(tiny: Config, tmp_path: Path) -> None:
    page = written(tiny, tmp_path, Goals())
    assert page.count("<img") == 2
    assert "Pareto" not in page
    assert "<code>pip install optuna-dashboard;\noptuna-dashboard HERE</code>" in page
    assert {row["on_front"] for row in rows(tmp_path)} == {""}
    assert not (tmp_path / "front.png").exists()


def test_a_given_config_that_failed_is_not_the_best(tiny: Config, tmp_path: Path) -> None:
    page = written(tiny, tmp_path, Goals(), fails=GIVEN)
    assert "The trial of the config as given failed" in page
    assert ", the config as given." not in page


def test_page_of_several_shows_the_front_and_says_what_best_means(
    tiny: Config, tmp_path: Path
) -> None:
    page = written(tiny, tmp_path, read_goals(["inject", "swap"]))
    table = rows(tmp_path)
    assert all(row["on_front"] == "1" for row in table)  # each width is best at its balance
    best = max(table, key=lambda row: float(row["inject_psnr"]))
    assert f"Best by injection PSNR is trial {best['trial']}" in page
    assert "best.yaml is the best by the first objective" in page
    assert page.count("<img") == 3
    with Image.open(tmp_path / "front.png") as image:
        assert image.width > 300


def test_trials_out_of_bounds_are_marked_and_never_the_best(tiny: Config, tmp_path: Path) -> None:
    page = written(tiny, tmp_path, read_goals(at_most=["swap=26"]))
    table = rows(tmp_path)
    assert {row["in_bounds"] for row in table} == {"0", "1"}
    for row in table:
        assert (row["in_bounds"] == "1") == (float(row["swap_psnr"]) <= 26)
    kept = [row for row in table if row["in_bounds"] == "1"]
    best = max(float(row["swap_psnr"]) for row in kept)
    assert f"of those that keep to --at-most swap=26: {best:.2f} dB" in page


def test_where_no_trial_keeps_to_the_bounds_none_is_the_best(tiny: Config, tmp_path: Path) -> None:
    page = written(tiny, tmp_path, read_goals(at_least=["swap=90"]))
    assert "No trial keeps to --at-least swap=90, so none is the best." in page
