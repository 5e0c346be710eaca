"""The study of a sweep: what is drawn, who goes on, what matters."""

from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from snr_ray import configfile as configs
from snr_ray.config import Config
from snr_ray.errors import InputError
from snr_ray.stages.sweeping.objectives import SWAP, Goals, read_goals
from snr_ray.stages.sweeping.storage import open_storage
from snr_ray.stages.sweeping.study import (
    FINISHED,
    GIVEN,
    MEASURED,
    NINTHS,
    BetterHalf,
    best_of,
    by_rungs,
    check_same,
    config_of,
    importances,
    keeps,
    moved,
    requeue,
    suggest,
)
from snr_ray.stages.sweeping.study import open_study as open_in


def open_study(folder: Path, config: Config, goals: Goals | None = None) -> optuna.Study:
    return open_in(open_storage(folder, None), config, goals or Goals())


def test_first_trial_is_the_given_config(tiny: Config, tmp_path: Path) -> None:
    study = open_study(tmp_path, tiny)
    chosen = suggest(study.ask(), tiny)
    assert chosen == tiny


def test_a_given_config_that_failed_is_tried_anew(tiny: Config, tmp_path: Path) -> None:
    for state in (TrialState.FAIL, TrialState.FAIL, TrialState.COMPLETE):
        study = open_study(tmp_path, tiny)
        trial = study.ask()
        assert trial.user_attrs["folder"] == GIVEN
        assert suggest(trial, tiny) == tiny
        study.tell(trial, 1.0 if state == TrialState.COMPLETE else None, state=state)
    assert "folder" not in open_study(tmp_path, tiny).ask().user_attrs


def test_a_given_config_that_is_moved_into_the_ranges_is_told(tiny: Config) -> None:
    assert moved(tiny) == []
    config = configs.replace(tiny, {"sweep.noise_channels": [3, 5], "loss.triplet": 20.0})
    assert moved(config) == [
        "model.noise_channels=[3, 3] in place of [2, 2]", "loss.triplet=10.0 in place of 20.0"
    ]  # fmt: skip


def test_suggestions_stay_in_their_ranges(tiny: Config, tmp_path: Path) -> None:
    config = configs.replace(tiny, {"sweep.noise_channels": [3, 5], "sweep.triplet": [0.5, 2.0]})
    study = open_study(tmp_path, config)
    for _ in range(8):
        chosen = suggest(study.ask(), config)
        assert all(3 <= width <= 5 for width in chosen.model.noise_channels)
        assert 0.5 <= chosen.loss.triplet <= 2.0


def test_resumed_study_does_not_repeat_its_draws(tiny: Config, tmp_path: Path) -> None:
    drawn = []
    for _ in range(3):
        study = open_study(tmp_path, tiny)
        suggest(trial := study.ask(), tiny)
        drawn.append(tuple(trial.params.values()))
        study.tell(trial, 1.0)
    assert len(set(drawn)) == 3


def test_seed_objective_keeps_its_content_pull_off(tmp_path: Path) -> None:
    config = configs.load(["smoke", "seed"])
    study = open_study(tmp_path, config)
    study.ask()
    assert suggest(study.ask(), config).loss.content_kl == 0.0


def curve(params: dict[str, float], rng: np.random.Generator) -> list[float]:
    """PSNR at each ninth of a run that learns: how well, the triplet weight alone decides."""
    end = 30 - 2 * abs(np.log10(params["triplet"]))
    return [end - 6 * np.exp(-k / 2) + rng.normal(0, 0.05) for k in range(1, NINTHS + 1)]


def run(study: optuna.Study, config: Config, trials: int, *, prune: bool) -> int:
    """Ninths of steps that a study of so many trials takes."""
    rng, ran = np.random.default_rng(0), 0
    for _ in range(trials):
        trial = study.ask()
        suggest(trial, config)
        values = curve(trial.params, rng)
        for step, value in enumerate(values, start=1):
            ran += 1
            trial.report(value, step)
            if prune and step < NINTHS and trial.should_prune():
                study.tell(trial, state=TrialState.PRUNED)
                break
        else:
            study.tell(trial, values[-1])
    return ran


def test_rungs_save_half_of_the_steps_at_the_same_best(tiny: Config, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    whole, pruned = (open_study(tmp_path / name, tiny) for name in ("a", "b"))
    all_steps = run(whole, tiny, 30, prune=False)
    assert run(pruned, tiny, 30, prune=True) < 0.5 * all_steps
    assert pruned.best_value > whole.best_value - 0.1


@pytest.mark.parametrize("sign", [1, -1])
def test_the_better_half_of_those_that_came_to_a_rung_goes_on(sign: int) -> None:
    direction = "maximize" if sign > 0 else "minimize"
    study = optuna.create_study(direction=direction, pruner=BetterHalf())

    def pruned(*values: float) -> list[bool]:
        trial, ended = study.ask(), []
        for step, value in enumerate(values, start=1):
            trial.report(sign * value, step)
            ended.append(trial.should_prune())
        return ended

    assert pruned(5, 5, 5) == [False, False, False]  # alone
    assert pruned(3) == [True]
    assert pruned(4, 0, 4) == [False, False, True]  # the second of three, then of two
    assert pruned(float("nan")) == [True]
    assert pruned(6, 0, 6, 0) == [False] * 4
    for _ in range(2):  # killed; it comes there again
        study.tell(study.trials[-1].number, state=TrialState.FAIL)
        assert pruned(6, 0, 6, 0) == [False] * 4
    assert pruned(4.5) == [False]  # the third of six


def test_what_decides_matters_most(tiny: Config, tmp_path: Path) -> None:
    study = open_study(tmp_path, tiny)
    run(study, tiny, 30, prune=True)
    shares = importances(study.get_trials(states=FINISHED), Goals(), SWAP)
    assert max(shares, key=lambda name: shares[name]) == "triplet"
    assert abs(sum(shares.values()) - 1) < 1e-6


def test_of_few_trials_nothing_is_said(tiny: Config, tmp_path: Path) -> None:
    study = open_study(tmp_path, tiny)
    run(study, tiny, 9, prune=False)
    assert importances(study.get_trials(), Goals(), SWAP) == {}


def test_trials_have_a_checkpoint_at_every_rung(tiny: Config) -> None:
    for steps in (5, 9, 20, 1800):
        config = by_rungs(configs.replace(tiny, {"sweep.steps": steps}))
        assert config.train.steps == steps
        assert config.train.checkpoint_every_steps * min(steps, NINTHS) <= steps


BOTH = read_goals(["swap", "seconds"])


def run_both(study: optuna.Study, config: Config, goals: Goals, trials: int) -> None:
    """Trials in which wide content codes clean better and take longer."""
    for _ in range(trials):
        trial = study.ask()
        trial.set_user_attr("folder", trial.user_attrs.get("folder", f"{trial.number:04d}"))
        suggest(trial, config)
        width = trial.params["content_channels_0"]
        measured = {"swap_psnr": 20.0 + width, "inject_psnr": 30.0, "seconds_per_image": width**2}
        trial.set_user_attr(MEASURED, measured)
        for bound in goals.bounds:
            trial.set_constraint(bound.text, bound.excess(measured))
        study.tell(trial, [measured[one.metric] for one in goals.objectives])


def test_trials_on_the_front_are_beaten_by_none(tiny: Config, tmp_path: Path) -> None:
    study = open_study(tmp_path, tiny, BOTH)
    run_both(study, tiny, BOTH, 25)
    # Here every width is on the front: none is better in one without being worse in the other.
    widths = {t.params["content_channels_0"] for t in study.trials}
    assert {t.params["content_channels_0"] for t in study.best_trials} == widths
    assert len(widths) > 4
    best = best_of(study.trials, BOTH)
    assert best is not None
    assert best.params["content_channels_0"] == max(widths)


def test_each_objective_has_importances_of_its_own(tiny: Config, tmp_path: Path) -> None:
    study = open_study(tmp_path, tiny, BOTH)
    run_both(study, tiny, BOTH, 40)
    trials = study.get_trials(states=FINISHED)
    for one in BOTH.objectives:
        shares = importances(trials, BOTH, one.metric)
        assert max(shares, key=lambda name: shares[name]) == "content_channels_0"
    assert importances(trials, BOTH, "inject_psnr") == {}  # all the same


def test_bounds_draw_the_search_and_decide_the_best(tiny: Config, tmp_path: Path) -> None:
    goals = read_goals(at_most=["seconds=40"])
    study = open_study(tmp_path, tiny, goals)
    run_both(study, tiny, goals, 40)
    best = best_of(study.trials, goals)
    assert best is not None
    assert best.params["content_channels_0"] == 6  # 6 ** 2 <= 40 < 7 ** 2
    later = study.trials[15:]
    assert sum(keeps(t) for t in later) / len(later) > 3 / 9  # more than chance
    impossible = read_goals(at_most=["seconds=1"])
    other = tmp_path / "other"
    other.mkdir()
    none = open_study(other, tiny, impossible)
    run_both(none, tiny, impossible, 3)
    assert best_of(none.trials, impossible) is None


def test_config_of_a_trial_is_what_it_was_asked_to_train(tiny: Config, tmp_path: Path) -> None:
    study = open_study(tmp_path, tiny)
    for _ in range(4):
        trial = study.ask()
        chosen = suggest(trial, tiny)
        study.tell(trial, 1.0)
        assert config_of(study.trials[-1].params, tiny) == chosen


def test_a_driver_asks_for_its_own_trials_again_and_leaves_those_of_others(
    tiny: Config, tmp_path: Path
) -> None:
    study = open_study(tmp_path, tiny)
    mine, other = study.ask(), study.ask()
    for trial, driver in ((mine, "a"), (other, "b")):
        suggest(trial, tiny)
        trial.set_user_attr("folder", f"{trial.number:04d}")
        trial.set_user_attr("driver", driver)
    requeue(study, "a")
    states = [trial.state for trial in study.trials]
    assert states == [TrialState.FAIL, TrialState.RUNNING, TrialState.WAITING]
    again = study.ask()
    assert again.user_attrs["folder"] == GIVEN
    assert suggest(again, tiny) == tiny


def test_a_study_of_another_sweep_is_refused(tiny: Config, tmp_path: Path) -> None:
    storage = open_storage(tmp_path, None)
    check_same(storage, "s", {"images.size": 16})  # there is none yet
    open_in(storage, tiny, Goals(), name="s", identity={"images.size": 16})
    check_same(storage, "s", {"images.size": 16})
    with pytest.raises(InputError, match=r"images\.size: 16 there, 28 now\); give another --study"):
        check_same(storage, "s", {"images.size": 28})
