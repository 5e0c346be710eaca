"""What a sweep looks for: its objectives, and the bounds that a good trial keeps to."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from snr_ray.errors import InputError, check
from snr_ray.metrics import MOST_DB

SWAP = "swap_psnr"


@dataclass(frozen=True)
class Objective:
    """One number that a trained model has."""

    name: str
    """As the command line has it."""
    metric: str
    """Its key in metrics.jsonl."""
    title: str
    unit: str
    larger: bool
    """Whether larger is better."""
    at_checkpoints: bool
    """Whether every checkpoint has it, or the end of a run alone."""
    least: float
    """No trial comes down to it."""
    most: float
    """No trial is beyond it."""

    def show(self, value: float) -> str:
        """A value as tables have it: decibels with two digits, seconds with three significant."""
        return f"{value:.2f}" if self.unit == "dB" else f"{value:.3g}"


OBJECTIVES = {
    objective.name: objective
    for objective in (
        Objective("swap", SWAP, "swap PSNR", "dB", True, True, 0, MOST_DB),
        Objective("inject", "inject_psnr", "injection PSNR", "dB", True, True, -inf, MOST_DB),
        Objective("seconds", "seconds_per_image", "seconds per image", "s", False, False, 0, inf),
    )
}


@dataclass(frozen=True)
class Bound:
    """What a trial must not be beyond."""

    objective: Objective
    limit: float
    most: bool
    """Whether `limit` is the most or the least allowed."""

    @property
    def text(self) -> str:
        """As the command line has it."""
        return f"--at-{'most' if self.most else 'least'} {self.objective.name}={self.limit:g}"

    def excess(self, measured: Mapping[str, float]) -> float:
        """How far a trial is beyond the limit; at most 0 where it keeps to it."""
        value = measured[self.objective.metric]
        return value - self.limit if self.most else self.limit - value


@dataclass(frozen=True)
class Goals:
    """What a sweep looks for."""

    objectives: tuple[Objective, ...] = (OBJECTIVES["swap"],)
    """The first decides which trial is the best; all of them, which are on the Pareto front."""
    bounds: tuple[Bound, ...] = ()

    @property
    def first(self) -> Objective:
        return self.objectives[0]

    @property
    def directions(self) -> list[str]:
        """As Optuna has them."""
        return ["maximize" if one.larger else "minimize" for one in self.objectives]

    @property
    def prunes(self) -> bool:
        """Whether hopeless trials can be told early: by one number that every checkpoint has."""
        return len(self.objectives) == 1 and self.first.at_checkpoints

    def identity(self) -> dict[str, Any]:
        """What a sweep is known by; None where it is as those before there was a choice."""
        names = [one.name for one in self.objectives]
        return {
            "objectives": None if names == ["swap"] else names,
            "bounds": sorted(bound.text for bound in self.bounds) or None,
        }

    def measured(self, row: Mapping[str, float]) -> dict[str, float]:
        """The numbers among a line of metrics.jsonl that a sweep knows.

        Raises:
            InputError: where one that is asked for is missing: it was not finite.
        """
        known = {one.metric: row[one.metric] for one in OBJECTIVES.values() if one.metric in row}
        for one in (*self.objectives, *(bound.objective for bound in self.bounds)):
            check(one.metric in known, f"the {one.title} of the trial is not a number")
        return known


def read_goals(
    names: Sequence[str] = (), at_most: Sequence[str] = (), at_least: Sequence[str] = ()
) -> Goals:
    """Goals from the words of a command line.

    Args:
        names: objectives, the most important first; none: the swap.
        at_most: bounds such as "seconds=0.01".
        at_least: bounds such as "inject=30".

    Raises:
        InputError: for words that are none, or that nothing can keep to.
    """
    objectives = tuple(_objective(name, "--objective") for name in names or ("swap",))
    for name in names:
        check(
            list(names).count(name) == 1,
            f"--objective takes each objective once, but got {name} {list(names).count(name)} "
            "times; leave the others out.",
        )
    most = [_bound(text, most=True) for text in at_most]
    least = [_bound(text, most=False) for text in at_least]
    for side in (most, least):
        for one in side:
            check(
                sum(other.objective == one.objective for other in side) == 1,
                f"A number has one bound on a side, but {one.objective.name} has several; keep the "
                "narrowest.",
            )
    for high in most:
        for low in least:
            check(
                high.objective != low.objective or low.limit <= high.limit,
                f"{low.text} and {high.text} leave nothing between them; change one.",
            )
    return Goals(objectives, (*most, *least))


def _objective(name: str, option: str) -> Objective:
    if name not in OBJECTIVES:
        raise InputError(f"{option} takes one of {', '.join(OBJECTIVES)}, but got {name!r}.")
    return OBJECTIVES[name]


def _bound(text: str, *, most: bool) -> Bound:
    option = "--at-most" if most else "--at-least"
    name, equals, number = text.partition("=")
    try:
        limit = float(number)
    except ValueError:
        limit = math.nan
    check(
        bool(equals) and math.isfinite(limit),
        f"{option} takes NAME=NUMBER, such as {option} "
        f"{'seconds=0.01' if most else 'inject=30'}, but got {text!r}.",
    )
    one = _objective(name, option)
    check(
        limit > one.least if most else limit <= one.most,
        f"{option} must leave something that a trial can keep to, but {one.title} is "
        f"{f'above {one.least:g}' if most else f'at most {one.most:g}'} {one.unit} whatever is "
        f"tried, and got {text}; give another number.",
    )
    return Bound(one, limit, most)
