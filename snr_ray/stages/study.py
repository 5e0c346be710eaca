"""The Optuna study of a sweep: what is searched, how it is drawn, and who goes on."""

import warnings
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from snr_ray import configfile as configs
from snr_ray.config import Config

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
NINTHS = 9
"""Checkpoints of a trial; those at 1/9 and 1/3 of its steps are the rungs of the pruner."""
FEWEST_TRIALS = 10
"""Of fewer trials nothing can be said about what matters."""
GIVEN = "0000"
"""Folder of the trial of the config as given, whatever number a resumed study gives it."""
FIRST_RUNG = 1
"""Number of the checkpoint that every trial comes to."""


def suggest(trial: Trial, config: Config) -> Config:
    """The config of a trial: the base with its split and loss weights replaced."""
    ranges = config.sweep
    changes: dict[str, Any] = {}
    for part in ("noise_channels", "content_channels"):
        low, high = getattr(ranges, part)
        changes[f"model.{part}"] = [
            trial.suggest_int(f"{part}_{level}", low, high)
            for level in range(len(config.model.channels))
        ]
    changes["loss.triplet"] = trial.suggest_float("triplet", *ranges.triplet, log=True)
    if config.loss.content_kl:
        changes["loss.content_kl"] = trial.suggest_float("content_kl", *ranges.content_kl, log=True)
    return configs.replace(config, changes)


def by_rungs(config: Config) -> Config:
    """The config of all trials: so many steps, with a checkpoint at every ninth of them."""
    steps = config.sweep.steps
    every = max(1, steps // NINTHS)
    return configs.replace(config, {"train.steps": steps, "train.checkpoint_every_steps": every})


def open_study(out: Path, config: Config) -> optuna.Study:
    """The study of a folder, new or continued.

    A trial goes on from a rung (1/9, 1/3 of its steps) where it is among the best third of those
    that came there. Source: Li et al., A system for massively parallel hyperparameter tuning, 2020.
    """
    known = (out / "study.journal").is_file()
    study = optuna.create_study(
        study_name="sweep",
        storage=JournalStorage(JournalFileBackend(str(out / "study.journal"))),
        direction="maximize",
        load_if_exists=True,
        pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3),
    )
    # A resumed study must not draw the numbers of its first part again.
    seed = config.seed + len(study.get_trials(deepcopy=False))
    # Sizes of levels are worth something together; trials that still run count as poor, so that
    # those beside them look elsewhere. Said in full, since defaults differ between versions.
    with warnings.catch_warnings():  # two of these were experimental before Optuna 5
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.sampler = optuna.samplers.TPESampler(
            seed=seed, multivariate=True, group=True, constant_liar=True, n_startup_trials=10
        )
    if not known:
        study.enqueue_trial(given(config), user_attrs={"folder": GIVEN})
    return study


def given(config: Config) -> dict[str, Any]:
    """The base config as parameters of the search space, moved into its ranges."""
    ranges, values = config.sweep, {}
    for part in ("noise_channels", "content_channels"):
        low, high = getattr(ranges, part)
        for level, width in enumerate(getattr(config.model, part)):
            values[f"{part}_{level}"] = min(max(width, low), high)
    values["triplet"] = min(max(config.loss.triplet, ranges.triplet[0]), ranges.triplet[1])
    if config.loss.content_kl:
        low, high = ranges.content_kl
        values["content_kl"] = min(max(config.loss.content_kl, low), high)
    return values


def requeue(study: optuna.Study) -> None:
    """Trials that a killed driver left running: asked again with their folder, so they resume."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        study.enqueue_trial(trial.params, user_attrs=dict(trial.user_attrs))


def first_rung(trial: FrozenTrial) -> float | None:
    """Swap PSNR in dB at the rung that all trials came to; None of one that broke before."""
    return trial.intermediate_values.get(FIRST_RUNG)


def importances(trials: list[FrozenTrial]) -> dict[str, float]:
    """Share of each parameter in what sets the best quarter of the trials apart at the first rung.

    All trials count there, pruned ones too. Empty below 10 trials, of which nothing can be said.
    Source: Watanabe, Bansal and Hutter, PED-ANOVA (2023).
    """
    reached = [trial for trial in trials if first_rung(trial) is not None]
    if len(reached) < FEWEST_TRIALS:
        return {}
    rung = optuna.create_study(direction="maximize")
    for trial in reached:
        rung.add_trial(
            optuna.create_trial(
                params=trial.params,
                distributions=trial.distributions,
                value=first_rung(trial),
            )
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(
            target_quantile=0.25, region_quantile=1.0, evaluate_on_local=True
        )
    return optuna.importance.get_param_importances(rung, evaluator=evaluator)
