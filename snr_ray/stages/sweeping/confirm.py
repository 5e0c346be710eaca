"""Whether the best config of a sweep is better than the one it began with: both with other seeds.

The best of many trials is the best partly by luck, and its own trial cannot say how much. Seeds
that the search did not use can.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from scipy import stats

from snr_ray import configfile as configs
from snr_ray.config import Config
from snr_ray.errors import InputError, RunError
from snr_ray.folder import Folder
from snr_ray.stages.simulation.dataset import Origin
from snr_ray.stages.sweeping.objectives import OBJECTIVES, SWAP, Goals
from snr_ray.stages.sweeping.trial import ending, slots_of, start_run
from snr_ray.stages.training.runlog import metrics_of

RUNS = "confirm"
"""Folder of the run folders, one for each config and seed."""
CONFIRMED = "confirm.json"
VAL_IMAGES = 200
"""Validation images, at the least where there are so many: runs are scored once, at their end."""
SURE = 0.95


@dataclass(frozen=True)
class Confirmation:
    """One number of the runs of two configs with other seeds."""

    objective: str
    """Name of the number."""
    seeds: list[int]
    best: list[float]
    """Of the best config, one value a seed."""
    given: list[float]
    """Of the config as given."""

    @property
    def gain(self) -> float:
        """Mean of the best less that of the given."""
        return float(np.mean(self.best) - np.mean(self.given))

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the gain by Welch's t test: the spreads may differ."""
        if np.ptp(self.best) == 0 and np.ptp(self.given) == 0:
            return self.gain, self.gain
        test = stats.ttest_ind(self.best, self.given, equal_var=False)
        low, high = test.confidence_interval(SURE)
        return float(low), float(high)

    def sentence(self) -> str:
        """Which is better, by how much, how sure."""
        one = OBJECTIVES[self.objective]
        low, high = self.interval
        if low <= 0 <= high:
            answer = "so the difference may be luck"
        else:
            answer = f"so the best is {'better' if (low > 0) == one.larger else 'worse'} for sure"
        sides = [
            f"{one.show(float(np.mean(values)))} ± {one.show(float(np.std(values, ddof=1)))}"
            for values in (self.best, self.given)
        ]
        bounds = [f"{'-' if value < 0 else '+'}{one.show(abs(value))}"
                  for value in (self.gain, low, high)]  # fmt: skip
        return (
            f"With {len(self.seeds)} seeds that the search did not use the best config has a "
            f"{one.title} of {sides[0]} {one.unit} (mean and standard deviation), the config as "
            f"given {sides[1]}: {bounds[0]} {one.unit}, with {SURE:.0%} confidence between "
            f"{bounds[1]} and {bounds[2]}, {answer}."
        )


def read_confirmation(out: Path) -> Confirmation | None:
    """What `confirm` found in the folder of a sweep; None if it was not asked.

    Raises:
        InputError: if the file is damaged.
    """
    path = out / CONFIRMED
    if not path.is_file():
        return None
    try:
        found = Confirmation(**json.loads(path.read_text()))
        found.sentence()
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{CONFIRMED} in --out must be what --confirm found, but is damaged ({error}); remove "
            f"it: --confirm makes it anew of the runs in {RUNS}."
        ) from None
    return found


def confirm(
    best: Config, given: Config, goals: Goals, origin: Origin, out: Folder, n_seeds: int
) -> Confirmation:
    """Train two configs with seeds that the search did not use, and compare the first objective.

    Runs that are there already, whole or in part, are gone on with.

    Raises:
        RunError: if a run failed.
    """
    seeds = [given.seed + k for k in range(1, n_seeds + 1)]
    # Named by what they train: with more trials another config may be the best.
    jobs = {
        (side, seed): (_of_seed(config, seed), out.join(f"{RUNS}/{_name(config)}-seed{seed}"))
        for seed in seeds
        for side, config in (("best", best), ("given", given))
    }
    slots, memory = slots_of(given)
    waiting, live = list(jobs), dict[Any, tuple[str, int]]()
    ended: dict[tuple[str, int], float] = {}
    with ending(live):
        while waiting or live:
            while waiting and len(live) < slots:
                key = waiting.pop(0)
                live[start_run(jobs[key][0], origin, jobs[key][1], memory)] = key
            (ref, *_), _ = ray.wait(list(live), num_returns=1)
            key = live.pop(ref)
            try:
                ray.get(ref)
            except ray.exceptions.RayError as error:
                reason = str(error).strip().splitlines()[-1]
                raise RunError(f"--confirm: {jobs[key][1]} failed: {reason}") from None
            rows = [row for row in metrics_of(jobs[key][1]) if SWAP in row]
            if not rows or goals.first.metric not in rows[-1]:
                raise RunError(
                    f"--confirm: {jobs[key][1]} has no {goals.first.title} that is a number."
                )
            ended[key] = rows[-1][goals.first.metric]
            shown = f"{goals.first.show(ended[key])} {goals.first.unit}"
            print(f"sweep: confirm {len(ended)}/{len(jobs)}: {key[0]}, seed {key[1]}: {shown}",
                  flush=True)  # fmt: skip
    values = {side: [ended[side, seed] for seed in seeds] for side in ("best", "given")}
    found = Confirmation(goals.first.name, seeds, values["best"], values["given"])
    out.write(CONFIRMED, json.dumps(dataclasses.asdict(found), indent=2) + "\n")
    return found


def _of_seed(config: Config, seed: int) -> Config:
    return configs.replace(
        config,
        {
            "seed": seed,
            "train.checkpoint_every_steps": config.train.steps,
            "train.val_images": max(VAL_IMAGES, config.train.val_images),
        },
    )


def _name(config: Config) -> str:
    """A folder name of the split and the weights of a config."""
    model = config.model
    splits = ("-".join(map(str, model.noise_channels)), "-".join(map(str, model.content_channels)))
    weights = f"{config.loss.triplet:.4g}_{config.loss.content_kl:.4g}"
    return f"noise{splits[0]}_content{splits[1]}_{weights}"
