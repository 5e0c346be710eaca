"""The Optuna study of a sweep: what is searched, how it is drawn, and who goes on."""

import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import optuna
from optuna.storages import BaseStorage
from optuna.trial import BaseTrial, FixedTrial, FrozenTrial, TrialState

from snr_ray import configfile as configs
from snr_ray.config import Config
from snr_ray.errors import check
from snr_ray.stages.sweeping.objectives import SWAP, Goals

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
NINTHS = 9
"""Checkpoints of a trial."""
RUNGS = (1, 3)
"""Those at which it may be ended: at 1/9 and 1/3 of its steps."""
FEWEST_TRIALS = 10
"""Of fewer trials nothing can be said about what matters."""
GIVEN = "0000"
"""Folder of the trial of the config as given, whatever number a resumed study gives it."""
FIRST_RUNG = 1
"""Number of the checkpoint that every trial comes to."""
IDENTITY = "identity"
"""Attribute of a study: what all its trials have in common."""
DRIVER = "driver"
"""Attribute of a trial: the folder that runs it, of several drivers of one study."""
MEASURED = "measured"
"""Attribute of a trial: what its model came to, by the names of metrics.jsonl."""
SHARE = "share"
"""Attribute of a trial: the share of its steps that it ran."""


def suggest(trial: BaseTrial, config: Config) -> Config:
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


def config_of(params: Mapping[str, Any], config: Config) -> Config:
    """The config that a trial of this base and these parameters has."""
    return suggest(FixedTrial(dict(params)), config)


def by_rungs(config: Config) -> Config:
    """The config of all trials: so many steps, with a checkpoint at every ninth of them."""
    steps = config.sweep.steps
    every = max(1, steps // NINTHS)
    return configs.replace(config, {"train.steps": steps, "train.checkpoint_every_steps": every})


class BetterHalf(optuna.pruners.BasePruner):
    """Ends a trial at one of RUNGS where it is not among the better half of those that came there.

    The best third, which is usual, saves more, but of 40 real trials in 200 orders it lost more
    than 0.1 dB in 7, the better half in one (sweep.md). Source: Li et al., A system for massively
    parallel hyperparameter tuning, 2020.
    """

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether the trial, which has just come to its last step, is to end there."""
        step = trial.last_step
        if step not in RUNGS:
            return False
        # One that broke off is there again where it goes on.
        states = (*FINISHED, TrialState.RUNNING)
        values = [t.intermediate_values for t in study.get_trials(deepcopy=False, states=states)]
        there = np.array([its[step] for its in values if step in its])
        mine = trial.intermediate_values[step]
        larger = study.direction == optuna.study.StudyDirection.MAXIMIZE
        better = there > mine if larger else there < mine
        return not math.isfinite(mine) or int(better.sum()) >= math.ceil(len(there) / 2)


def open_study(
    storage: BaseStorage,
    config: Config,
    goals: Goals,
    *,
    name: str = "sweep",
    identity: Mapping[str, Any] | None = None,
) -> optuna.Study:
    """The study of a name, new or continued.

    With one objective `BetterHalf` ends trials early; with several all run to their end, since none
    can be said to be hopeless then.

    Args:
        storage: where the study is kept.
        config: the config as given, which is the first trial.
        goals: what is looked for.
        name: of the study among others in the storage.
        identity: what all drivers of the study have in common, for `check_same`.
    """
    study = optuna.create_study(
        study_name=name,
        storage=storage,
        directions=goals.directions,
        load_if_exists=True,
        pruner=BetterHalf() if goals.prunes else optuna.pruners.NopPruner(),
    )
    if identity is not None and IDENTITY not in study.user_attrs:
        study.set_user_attr(IDENTITY, dict(identity))
    # A resumed study must not draw the numbers of its first part again.
    seed = config.seed + len(study.get_trials(deepcopy=False))
    # Sizes of levels are worth something together; trials that still run count as poor, so that
    # those beside them look elsewhere. Said in full, since defaults differ between versions.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.sampler = optuna.samplers.TPESampler(
            seed=seed, multivariate=True, group=True, constant_liar=True, n_startup_trials=10
        )
    known = [t for t in study.get_trials(deepcopy=False) if t.state != TrialState.FAIL]
    if all(t.user_attrs.get("folder") != GIVEN for t in known):
        study.enqueue_trial(given(config), user_attrs={"folder": GIVEN})
    return study


def check_same(storage: BaseStorage, name: str, identity: Mapping[str, Any]) -> None:
    """Raise InputError if a storage has a study of this name that is another one."""
    if name not in optuna.get_all_study_names(storage):
        return
    known = optuna.load_study(study_name=name, storage=storage).user_attrs.get(IDENTITY, {})
    for key, value in identity.items():
        check(
            known.get(key) == value,
            f"Study {name!r} of that storage is of another sweep ({key}: {known.get(key)!r} there, "
            f"{value!r} now); give another --study.",
        )


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


def moved(config: Config) -> list[str]:
    """What `given` has moved into the ranges, in words."""
    before, after = (configs.to_dict(one) for one in (config, config_of(given(config), config)))
    return [
        f"{section}.{key}={after[section][key]} in place of {before[section][key]}"
        for section in ("model", "loss")
        for key in before[section]
        if before[section][key] != after[section][key]
    ]


def requeue(study: optuna.Study, driver: str | None) -> None:
    """Trials that a killed driver left running: asked again with their folder, so they resume.

    `driver`: which of several drivers; None of a study that has one.
    """
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if trial.user_attrs.get(DRIVER) == driver:
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
            study.enqueue_trial(trial.params, user_attrs=dict(trial.user_attrs))


def last(trial: FrozenTrial, metric: str) -> float | None:
    """A number of a trial where it ended; None of one that it never came to."""
    measured = trial.user_attrs.get(MEASURED)
    if measured is None and metric == SWAP:  # of a study of an earlier version
        ended = trial.state == TrialState.COMPLETE
        steps = trial.intermediate_values
        return trial.values[0] if ended else steps[max(steps)] if steps else None
    return (measured or {}).get(metric)


def compared(trial: FrozenTrial, goals: Goals, metric: str) -> float | None:
    """A number that all trials can be compared by: at the first rung, which pruned ones came to as
    well, or where all run to their end, there. None of one that broke before."""
    if goals.prunes:
        return trial.intermediate_values.get(FIRST_RUNG)
    return last(trial, metric)


def keeps(trial: FrozenTrial) -> bool:
    """Whether a trial keeps to the bounds."""
    return all(excess <= 0 for excess in trial.constraints.values())


def best_of(trials: list[FrozenTrial], goals: Goals) -> FrozenTrial | None:
    """The trial that is best by the first objective, of those that ended and keep to the bounds."""
    sign = 1 if goals.first.larger else -1
    able = [t for t in trials if t.state == TrialState.COMPLETE and keeps(t)]
    return max(able, key=lambda trial: sign * trial.values[0], default=None)


def importances(trials: list[FrozenTrial], goals: Goals, metric: str) -> dict[str, float]:
    """Share of each parameter in what sets the best quarter of the trials apart, as `compared`.

    Empty below 10 trials, of which nothing can be said, and where all are the same.
    Source: Watanabe, Bansal and Hutter, PED-ANOVA (2023).
    """
    values = {trial.number: compared(trial, goals, metric) for trial in trials}
    reached = [trial for trial in trials if values[trial.number] is not None]
    if len(reached) < FEWEST_TRIALS or len({values[t.number] for t in reached}) == 1:
        return {}
    larger = next((one.larger for one in goals.objectives if one.metric == metric), True)
    rung = optuna.create_study(direction="maximize" if larger else "minimize")
    for trial in reached:
        rung.add_trial(
            optuna.create_trial(
                params=trial.params,
                distributions=trial.distributions,
                value=values[trial.number],
            )
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(
            target_quantile=0.25, region_quantile=1.0, evaluate_on_local=True
        )
    return optuna.importance.get_param_importances(rung, evaluator=evaluator)
