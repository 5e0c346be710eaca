"""The study of a sweep: what is drawn, who goes on, what matters."""

from pathlib import Path

import numpy as np
import optuna
from optuna.trial import TrialState

from snr_ray import configfile as configs
from snr_ray.config import Config
from snr_ray.stages.study import FINISHED, NINTHS, by_rungs, importances, open_study, suggest


def test_first_trial_is_the_given_config(tiny: Config, tmp_path: Path) -> None:
    study = open_study(tmp_path, tiny)
    chosen = suggest(study.ask(), tiny)
    assert chosen == tiny


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
    assert pruned.best_value > whole.best_value - 0.3


def test_what_decides_matters_most(tiny: Config, tmp_path: Path) -> None:
    study = open_study(tmp_path, tiny)
    run(study, tiny, 30, prune=True)
    shares = importances(study.get_trials(states=FINISHED))
    assert max(shares, key=lambda name: shares[name]) == "triplet"
    assert abs(sum(shares.values()) - 1) < 1e-6


def test_of_few_trials_nothing_is_said(tiny: Config, tmp_path: Path) -> None:
    study = open_study(tmp_path, tiny)
    run(study, tiny, 9, prune=False)
    assert importances(study.get_trials()) == {}


def test_trials_have_a_checkpoint_at_every_rung(tiny: Config) -> None:
    for steps in (5, 9, 20, 1800):
        config = by_rungs(configs.replace(tiny, {"sweep.steps": steps}))
        assert config.train.steps == steps
        assert config.train.checkpoint_every_steps * min(steps, NINTHS) <= steps
