"""What a sweep found, to read and to look at: trials.csv, history.png, split.png, report.html, and
front.png of several objectives."""

import base64
import csv
import html
import io
import itertools
import math
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from snr_ray.config import SweepConfig
from snr_ray.outputs import write_atomic
from snr_ray.stages.sweeping.confirm import read_confirmation
from snr_ray.stages.sweeping.objectives import OBJECTIVES, Goals, Objective
from snr_ray.stages.sweeping.study import (
    GIVEN,
    NINTHS,
    SHARE,
    best_of,
    compared,
    importances,
    keeps,
    last,
)

LOGARITHMIC = ("triplet", "content_kl")
COMPLETED, EARLY = "C0o", "C1x"
"""How trials are drawn that ended, and that were ended early: the same in all plots."""


def write_page(
    out: Path,
    trials: list[FrozenTrial],
    goals: Goals,
    front: list[int],
    ranges: SweepConfig,
    command: str,
) -> None:
    """Write table, plots and page of finished trials, one of which is complete, into a folder.

    Args:
        out: the folder.
        trials: complete and pruned ones.
        goals: what the sweep looks for.
        front: numbers of the trials on the Pareto front, of several objectives.
        ranges: what was searched.
        command: opens the study in optuna-dashboard.
    """
    _table(trials, goals, front, out)
    _history(trials, goals, out)
    _split(trials, goals, ranges, out)
    if front:
        _front(trials, goals, front, out)
    write_atomic(out / "report.html", _page(trials, goals, front, out, command))


def share_run(trials: list[FrozenTrial]) -> float:
    """Share of the steps of all trials that were run; pruning saved the rest."""
    return sum(_share(trial) for trial in trials) / len(trials)


def _share(trial: FrozenTrial) -> float:
    if trial.state == TrialState.COMPLETE:
        return 1.0
    of_old = max(trial.intermediate_values, default=0) / NINTHS  # which did not count steps
    return float(trial.user_attrs.get(SHARE, of_old))


def _last(trial: FrozenTrial, objective: Objective) -> float:
    value = last(trial, objective.metric)
    return math.nan if value is None else value


def _table(trials: list[FrozenTrial], goals: Goals, front: list[int], out: Path) -> None:
    table = io.StringIO()
    writer = csv.writer(table)
    names = sorted({name for trial in trials for name in trial.params})
    metrics = [one.metric for one in OBJECTIVES.values()]
    writer.writerow(
        ["trial", "state", *metrics, "in_bounds", "on_front", "share_of_steps", "folder", *names]
    )
    for trial in trials:
        writer.writerow(
            [
                trial.number,
                trial.state.name.lower(),
                *(last(trial, metric) for metric in metrics),
                int(keeps(trial)),
                int(trial.number in front) if front else "",
                round(share_run([trial]), 3),
                f"trials/{trial.user_attrs['folder']}",
                *(trial.params.get(name, "") for name in names),
            ]
        )
    write_atomic(out / "trials.csv", table.getvalue())


def _page(
    trials: list[FrozenTrial], goals: Goals, front: list[int], out: Path, command: str
) -> str:
    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    names = sorted({name for trial in trials for name in trial.params})
    first, columns = goals.first, list(goals.objectives)
    columns += [b.objective for b in goals.bounds if b.objective not in columns]
    columns = list(dict.fromkeys(columns))
    sign = -1 if first.larger else 1
    ranked = sorted(trials, key=lambda t: _order(sign * _last(t, first)))
    rows = "".join(
        f"<tr><td>{t.number}</td><td>{_state(t, front)}</td>"
        + "".join(f"<td>{one.show(_last(t, one))}</td>" for one in columns)
        + f"<td>{share_run([t]):.0%}</td>"
        + "".join(f"<td>{_number(t.params.get(name))}</td>" for name in names)
        + "</tr>"
        for t in ranked
    )
    heads = "".join(f"<th>{one.title}, {one.unit}</th>" for one in columns) + "<th>steps</th>"
    heads += "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in names)
    saved = (
        f"{1 - share_run(trials):.0%} of all steps were saved by ending the others early."
        if goals.prunes
        else "None is ended early"
        + (", since of several objectives none can be told to be hopeless before."
           if len(goals.objectives) > 1 else ".")
    )  # fmt: skip
    shown = [("Trials over time", "history.png"), ("Each setting", "split.png")]
    if front:
        shown.insert(0, ("Pareto front", "front.png"))
    pictures = "".join(
        f"<h2>{title}</h2><img alt='{title}' src='data:image/png;base64,"
        f"{base64.b64encode((out / name).read_bytes()).decode()}'>"
        for title, name in shown
    )
    what = "".join(
        _bars(one, importances(trials, goals, one.metric), goals) for one in goals.objectives
    )
    confirmed = read_confirmation(out)
    sure = f"<h2>Is it real?</h2><p>{confirmed.sentence()}</p>" if confirmed else ""
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>snr_ray: sweep</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 68rem }}
img {{ max-width: 100% }} table {{ border-collapse: collapse }}
td, th {{ text-align: left; padding: .15rem .8rem .15rem 0; font-variant-numeric: tabular-nums }}
.bar {{ background: #4878a8; height: .9em; display: inline-block }}
</style>
<h1>Sweep: {len(trials)} trials</h1>
<p>{_answer(trials, goals, front)} {len(complete)} trials ran to their end. {saved}</p>{sure}
<h2>What matters</h2>{what}
{pictures}
<h2>All trials</h2>
<table><tr><th>trial</th><th></th>{heads}</tr>{rows}</table>
<p>The study opens in optuna-dashboard: <code>pip install optuna-dashboard;
{html.escape(command)}</code></p></html>
"""


def _order(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _state(trial: FrozenTrial, front: list[int]) -> str:
    words = [trial.state.name.lower()]
    words += ["on the front"] if trial.number in front else []
    words += [] if keeps(trial) else ["out of bounds"]
    return ", ".join(words)


def _answer(trials: list[FrozenTrial], goals: Goals, front: list[int]) -> str:
    """Which trial is the best, in sentences."""
    best, first = best_of(trials, goals), goals.first
    bounds = html.escape(" ".join(bound.text for bound in goals.bounds))
    if best is None:
        return f"No trial keeps to {bounds}, so none is the best."
    kept = f", of those that keep to {bounds}" if bounds else ""
    text = (
        f"Best by {first.title} is trial {best.number}{kept}: {first.show(best.values[0])} "
        f"{first.unit} on validation images"
    )
    given = next((t for t in trials if t.user_attrs["folder"] == GIVEN), None)
    if given is None:
        text += ". The trial of the config as given failed: with the same command it is tried anew."
    elif given.number == best.number:
        text += ", the config as given."
    else:
        before = _last(given, first)
        text += (
            f", {'+' if best.values[0] >= before else '-'}"
            f"{first.show(abs(best.values[0] - before))} {first.unit} on the config as given "
            f"({first.show(before)} {first.unit}). One run each: seeds of one config differ by "
            "tenths of a decibel, so train both with several before you believe a small difference."
        )
    if front:
        others = ", ".join(str(number) for number in sorted(front))
        text += (
            f" No other trial beats {others} in all objectives at once: they are the Pareto front; "
            "best.yaml is the best by the first objective."
        )
    return text


def _bars(objective: Objective, matters: dict[str, float], goals: Goals) -> str:
    if not matters:
        return (
            f"<p>{objective.title.capitalize()}: of fewer than ten trials, or of trials that are "
            "all alike, nothing can be said about that.</p>"
        )
    rows = "".join(
        f"<tr><td>{html.escape(name.replace('_', ' '))}</td><td>{share:.0%}</td>"
        f"<td><span class='bar' style='width:{30 * share:.1f}em'></span></td></tr>"
        for name, share in sorted(matters.items(), key=lambda item: -item[1])
    )
    where = "at the first rung, which all came to" if goals.prunes else "at their end"
    return (
        f"<p>Share of each setting in what sets the best quarter of the trials by "
        f"{objective.title} apart, {where} (PED-ANOVA).</p><table>{rows}</table>"
    )


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.3g}"


def _history(trials: list[FrozenTrial], goals: Goals, out: Path) -> None:
    """history.png: first objective of each trial and the best so far."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    first = goals.first
    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    pruned = [t for t in trials if t.state == TrialState.PRUNED]
    able = [t for t in complete if keeps(t)]
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    for drawn, mark, label in (
        (able, COMPLETED, "completed"),
        ([t for t in complete if not keeps(t)], "C3s", "out of bounds"),
        (pruned, EARLY, "ended early"),
    ):
        if drawn:
            axis.plot(
                [t.number for t in drawn], [_last(t, first) for t in drawn], mark, label=label
            )
    if able:
        best = itertools.accumulate((_last(t, first) for t in able), max if first.larger else min)
        axis.step([t.number for t in able], list(best), "C2", where="post", label="best so far")
    axis.set_xlabel("trial")
    axis.set_ylabel(f"{first.title} on validation images, {first.unit}")
    axis.legend()
    FigureCanvasAgg(figure).print_png(out / "history.png")


def _front(trials: list[FrozenTrial], goals: Goals, front: list[int], out: Path) -> None:
    """front.png: each further objective over the first, the Pareto front marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    first, *others = goals.objectives
    figure = Figure(figsize=(5 * len(others) + 1, 3.8), layout="constrained")
    for axis, other in zip(
        figure.subplots(1, len(others), squeeze=False).flat, others, strict=True
    ):
        for drawn, mark, label in (
            ([t for t in trials if t.number not in front and keeps(t)], "o", "beaten"),
            ([t for t in trials if not keeps(t)], "s", "out of bounds"),
            ([t for t in trials if t.number in front], "D", "Pareto front"),
        ):
            if drawn:
                x, y = ([_last(t, one) for t in drawn] for one in (first, other))
                axis.plot(x, y, mark, label=label)
        for t in trials:
            if t.number in front or t.user_attrs["folder"] == GIVEN:
                name = "as given" if t.user_attrs["folder"] == GIVEN else str(t.number)
                at = (_last(t, first), _last(t, other))
                axis.annotate(name, at, textcoords="offset points", xytext=(4, 4), fontsize=8)
        axis.set_xlabel(f"{first.title}, {first.unit}")
        axis.set_ylabel(f"{other.title}, {other.unit}")
        axis.legend()
    FigureCanvasAgg(figure).print_png(out / "front.png")


def _split(trials: list[FrozenTrial], goals: Goals, ranges: SweepConfig, out: Path) -> None:
    """split.png: the first objective, where all trials can be compared, over each setting, and
    over the share of the noise code in all code channels of each level."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    values = {t.number: compared(t, goals, goals.first.metric) for t in trials}
    reached = [t for t in trials if values[t.number] is not None]
    names = sorted({name for t in trials for name in t.params})
    levels = sum(name.startswith("noise_channels_") for name in names)
    names += [f"noise_share_{level}" for level in range(levels)]
    columns = 4
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(3 * columns, 2.4 * rows), layout="constrained")
    for axis, name in zip(figure.subplots(rows, columns, squeeze=False).flat, names, strict=False):
        for state, mark, label in (
            (TrialState.PRUNED, EARLY, "ended early"),
            (TrialState.COMPLETE, COMPLETED, "completed"),
        ):
            drawn = [t for t in reached if t.state == state]
            if drawn:
                x, y = [_setting(t, name) for t in drawn], [values[t.number] for t in drawn]
                axis.plot(x, y, mark, label=label)
        axis.set_xlabel(name.replace("_", " "))
        if name.startswith("noise_share"):
            axis.set_xlim(0, 1)
            continue
        limits = getattr(ranges, name.rstrip("0123456789").rstrip("_"))
        if name in LOGARITHMIC:
            axis.set_xscale("log")
            axis.set_xlim(*limits)
            axis.xaxis.set_minor_formatter(NullFormatter())
        else:
            axis.set_xlim(limits[0] - 0.5, limits[1] + 0.5)
    for axis in figure.axes[len(names) :]:
        axis.set_axis_off()
    when = f" after 1/{NINTHS} of the steps" if goals.prunes else ""
    figure.supylabel(f"{goals.first.title}{when}, {goals.first.unit}")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper right", ncols=2)
    FigureCanvasAgg(figure).print_png(out / "split.png")


def _setting(trial: FrozenTrial, name: str) -> float:
    """A setting of a trial, or the share of the noise code in the code channels of a level."""
    if not name.startswith("noise_share_"):
        return float(trial.params[name])
    level = name.rpartition("_")[2]
    noise = trial.params[f"noise_channels_{level}"]
    return noise / (noise + trial.params[f"content_channels_{level}"])
