"""What a sweep found, to read and to look at: trials.csv, history.png, split.png, report.html."""

import base64
import csv
import html
import io
import math
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from snr_ray.config import SweepConfig
from snr_ray.outputs import write_atomic
from snr_ray.stages.study import GIVEN, NINTHS, first_rung, importances

LOGARITHMIC = ("triplet", "content_kl")


def write_page(out: Path, trials: list[FrozenTrial], ranges: SweepConfig) -> None:
    """Write table, plots and page of finished trials, one of which is complete, into a folder."""
    _table(trials, out)
    _history(trials, out)
    _split(trials, ranges, out)
    write_atomic(out / "report.html", _page(trials, ranges, out))


def last(trial: FrozenTrial) -> float:
    """Swap PSNR in dB where a trial ended, NaN where it never came to a checkpoint."""
    if trial.state == TrialState.COMPLETE:
        return float(trial.values[0])
    values = trial.intermediate_values
    return values[max(values)] if values else math.nan


def share_run(trials: list[FrozenTrial]) -> float:
    """Share of the steps of all trials that were run; pruning saved the rest."""
    ran = [1.0 if t.state == TrialState.COMPLETE else _ninths(t) / NINTHS for t in trials]
    return sum(ran) / len(ran)


def _ninths(trial: FrozenTrial) -> int:
    return max(trial.intermediate_values, default=0)


def _table(trials: list[FrozenTrial], out: Path) -> None:
    table = io.StringIO()
    writer = csv.writer(table)
    names = sorted({name for trial in trials for name in trial.params})
    writer.writerow(["trial", "state", "swap_psnr", "share_of_steps", "folder", *names])
    for trial in trials:
        folder = f"trials/{trial.user_attrs['folder']}"
        share = round(share_run([trial]), 3)
        params = [trial.params.get(name, "") for name in names]
        writer.writerow(
            [trial.number, trial.state.name.lower(), last(trial), share, folder, *params]
        )
    write_atomic(out / "trials.csv", table.getvalue())


def _page(trials: list[FrozenTrial], ranges: SweepConfig, out: Path) -> str:
    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    best = max(complete, key=last)
    given = next((t for t in trials if t.user_attrs["folder"] == GIVEN), None)
    matters = importances(trials)
    names = sorted(best.params)
    rows = "".join(
        f"<tr><td>{t.number}</td><td>{t.state.name.lower()}</td><td>{last(t):.2f}</td>"
        f"<td>{share_run([t]):.0%}</td>"
        + "".join(f"<td>{_number(t.params.get(name))}</td>" for name in names)
        + "</tr>"
        for t in sorted(trials, key=last, reverse=True)
    )
    heads = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in names)
    gain = (
        f", {last(best) - last(given):+.2f} dB on the config as given ({last(given):.2f} dB). One "
        "run each: seeds of one config differ by tenths of a decibel, so train both with several "
        "before you believe a small difference"
        if given is not None and given.number != best.number
        else ", the config as given"
    )
    what = (
        _bars(matters)
        if matters
        else "<p>Of fewer than ten trials nothing can be said about that.</p>"
    )
    pictures = "".join(
        f"<h2>{title}</h2><img alt='{title}' src='data:image/png;base64,"
        f"{base64.b64encode((out / name).read_bytes()).decode()}'>"
        for title, name in (
            ("Trials over time", "history.png"),
            ("PSNR over each setting", "split.png"),
        )
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>snr_ray: sweep</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 68rem }}
img {{ max-width: 100% }} table {{ border-collapse: collapse }}
td, th {{ text-align: left; padding: .15rem .8rem .15rem 0; font-variant-numeric: tabular-nums }}
.bar {{ background: #4878a8; height: .9em; display: inline-block }}
</style>
<h1>Sweep: {len(trials)} trials</h1>
<p>Best is trial {best.number}: {last(best):.2f} dB swap PSNR on validation images{gain}.
{len(complete)} trials ran to their end; {1 - share_run(trials):.0%} of all steps were saved by
ending the others early.</p>
<h2>What matters</h2>{what}
{pictures}
<h2>All trials</h2>
<table><tr><th>trial</th><th></th><th>dB</th><th>steps</th>{heads}</tr>{rows}</table>
<p>The study opens in optuna-dashboard: <code>pip install optuna-dashboard; optuna-dashboard
{html.escape(str(out / "study.journal"))}</code></p></html>
"""


def _bars(matters: dict[str, float]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(name.replace('_', ' '))}</td><td>{share:.0%}</td>"
        f"<td><span class='bar' style='width:{30 * share:.1f}em'></span></td></tr>"
        for name, share in sorted(matters.items(), key=lambda item: -item[1])
    )
    return (
        "<p>Share of each setting in what sets the best quarter of the trials apart, at the first "
        f"rung, which all came to (PED-ANOVA).</p><table>{rows}</table>"
    )


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.3g}"


def _history(trials: list[FrozenTrial], out: Path) -> None:
    """history.png: value of each trial and the best so far."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    pruned = [t for t in trials if t.state == TrialState.PRUNED]
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    numbers, values = [t.number for t in complete], [last(t) for t in complete]
    best = [max(values[: k + 1]) for k in range(len(values))]
    axis.plot(numbers, values, "o", label="completed")
    axis.plot([t.number for t in pruned], [last(t) for t in pruned], "x", label="ended early")
    axis.step(numbers, best, where="post", label="best so far")
    axis.set_xlabel("trial")
    axis.set_ylabel("swap PSNR on validation images, dB")
    axis.legend()
    FigureCanvasAgg(figure).print_png(out / "history.png")


def _split(trials: list[FrozenTrial], ranges: SweepConfig, out: Path) -> None:
    """split.png: value at the first rung, which all trials came to, over each setting."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    reached = [t for t in trials if first_rung(t) is not None]
    names = sorted({name for t in trials for name in t.params})
    columns = 4
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(3 * columns, 2.4 * rows), layout="constrained")
    for axis, name in zip(figure.subplots(rows, columns, squeeze=False).flat, names, strict=False):
        for state, mark in ((TrialState.PRUNED, "x"), (TrialState.COMPLETE, "o")):
            drawn = [t for t in reached if t.state == state]
            axis.plot([t.params[name] for t in drawn], [first_rung(t) for t in drawn], mark)
        axis.set_xlabel(name.replace("_", " "))
        limits = getattr(ranges, name.rstrip("0123456789").rstrip("_"))
        if name in LOGARITHMIC:
            axis.set_xscale("log")
            axis.set_xlim(*limits)
            axis.xaxis.set_minor_formatter(NullFormatter())
        else:
            axis.set_xlim(limits[0] - 0.5, limits[1] + 0.5)
    for axis in figure.axes[len(names) :]:
        axis.set_axis_off()
    figure.supylabel(f"swap PSNR after 1/{NINTHS} of the steps, dB")
    FigureCanvasAgg(figure).print_png(out / "split.png")
