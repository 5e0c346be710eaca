"""Search of the noise/content split and the loss weights: an Optuna study, one train run a trial.

    study.ask() --Ray task--> train() in OUT/trials/NNNN --metrics.jsonl--> report, prune, tell

    OUT/data/            the data folder, where the origin is a source
    OUT/study.journal    the study; survives a kill and opens in optuna-dashboard
    OUT/trials/NNNN/     ordinary run folders
    OUT/best.yaml        config of the best trial: `snr train --config OUT/best.yaml`
    OUT/trials.csv, history.png, split.png

A trial's value is the swap PSNR on validation images, mean over view counts. The driver alone
writes the study; it reads how trials fare from their metrics.jsonl and ends a hopeless one through
RUN/stop. The same command again continues: finished trials count, running ones resume from their
checkpoints. Trial 0 is the config as given.
"""

import csv
import dataclasses
import io
import logging
import math
import time
from pathlib import Path
from typing import Any

import optuna
import ray
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from snr_ray import configfile as configs
from snr_ray.config import Config, InputError, SweepConfig
from snr_ray.outputs import claim, write_atomic
from snr_ray.stages.cluster import connected, cpus
from snr_ray.stages.dataset import Origin, count_rows, settle
from snr_ray.stages.simulate import Outcome, simulate
from snr_ray.stages.train import identity, read_metrics, train

OWNED = ("data", "study.journal", "study.journal.lock", "trials", "best.yaml", "trials.csv",
         "history.png", "split.png")  # fmt: skip
POLL_S = 1.0
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


def sweep(
    config: Config, *, origin: Origin, out: Path, trials: int, overwrite: bool = False
) -> Outcome:
    """Run trials until `trials` of them have finished or were pruned.

    Raises:
        InputError: for a source, folder or setting the user can put right.
    """
    if trials < 1:
        raise InputError(f"--trials must be at least 1, but got {trials}.")
    if config.model.kind != "hvae":
        raise InputError(
            "A sweep searches the split of the codes, but model.kind=unet has no codes; "
            "leave the preset unet out."
        )
    if config.train.start:
        raise InputError(
            f"A sweep searches the sizes of the network, but train.start={config.train.start} "
            "fixes them; leave it out."
        )
    config = settle(config, origin)
    config = configs.replace(config, {"train.steps": config.sweep.steps})
    out = out.absolute()
    for split in ("train", "val"):
        count_rows(config, origin, split)
    space = {f"sweep.{k}": v for k, v in configs.to_dict(config)["sweep"].items()}
    claim(
        out,
        identity(config, origin) | {"stage": "sweep"} | space,
        owned=OWNED,
        overwrite=overwrite,
    )
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = _open_study(out, config)
    _requeue(study)
    with connected():
        if origin.images:  # simulated once, for all trials
            simulate(config, images=origin.images, out=out / "data")
            origin = Origin(data=out / "data")
        failed = _run(study, config, origin, out, trials)
    _finish(study, config, out)
    return Outcome(out, len(study.get_trials(states=FINISHED)), failed)


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


def _open_study(out: Path, config: Config) -> optuna.Study:
    known = (out / "study.journal").is_file()
    checkpoints = max(1, config.train.steps // config.train.checkpoint_every_steps)
    study = optuna.create_study(
        study_name="sweep",
        storage=JournalStorage(JournalFileBackend(str(out / "study.journal"))),
        direction="maximize",
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=checkpoints // 3),
    )
    # A resumed study must not draw the numbers of its first part again.
    seed = config.seed + len(study.get_trials(deepcopy=False))
    study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    if not known:
        study.enqueue_trial(_given(config), user_attrs={"folder": "0000"})
    return study


def _given(config: Config) -> dict[str, Any]:
    """The base config as parameters of the search space, moved into its ranges."""
    ranges, given = config.sweep, {}
    for part in ("noise_channels", "content_channels"):
        low, high = getattr(ranges, part)
        for level, width in enumerate(getattr(config.model, part)):
            given[f"{part}_{level}"] = min(max(width, low), high)
    given["triplet"] = min(max(config.loss.triplet, ranges.triplet[0]), ranges.triplet[1])
    if config.loss.content_kl:
        low, high = ranges.content_kl
        given["content_kl"] = min(max(config.loss.content_kl, low), high)
    return given


def _requeue(study: optuna.Study) -> None:
    """Trials that a killed driver left running: asked again with their folder, so they resume."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        study.enqueue_trial(trial.params, user_attrs=dict(trial.user_attrs))


@ray.remote(num_cpus=0, max_retries=0)
def _train_trial(config: Config, origin: Origin, folder: str) -> None:
    """One trial, in a task of its own; its training workers hold the resources."""
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    train(config, origin=origin, out=Path(folder), progress=False)


@dataclasses.dataclass
class _Live:
    """A trial that is running."""

    trial: Trial
    folder: Path
    reported: int = 0


def _run(study: optuna.Study, config: Config, origin: Origin, out: Path, trials: int) -> int:
    slots = max(1, (cpus() - 1) // (config.train.num_workers * config.train.cpus_per_worker))
    live: dict[Any, _Live] = {}
    failed, since = 0, time.monotonic()
    started = len(study.get_trials(deepcopy=False, states=FINISHED))
    while True:
        done = len(study.get_trials(deepcopy=False, states=FINISHED))
        while len(live) < slots and done + len(live) < trials:
            trial = study.ask()
            folder = trial.user_attrs.get("folder", f"{trial.number:04d}")
            trial.set_user_attr("folder", folder)
            run = out / "trials" / folder
            chosen = suggest(trial, config)
            ref = _train_trial.remote(chosen, origin, str(run))
            live[ref] = _Live(trial, run)
            print(f"sweep: trial {trial.number} starts: {_short(trial.params)}", flush=True)
        if not live:
            return failed
        ready, _ = ray.wait(list(live), num_returns=1, timeout=POLL_S)
        for running in live.values():
            _report(running)
        for ref in ready:
            ended = live.pop(ref)
            try:
                ray.get(ref)
            except ray.exceptions.RayError as error:
                study.tell(ended.trial, state=TrialState.FAIL)
                failed += 1
                reason = str(error).strip().splitlines()[-1]
                print(f"sweep: trial {ended.trial.number} failed: {reason}", flush=True)
                if failed >= 3 and not study.get_trials(deepcopy=False, states=FINISHED):
                    raise InputError(f"The first three trials failed: {reason}") from None
                continue
            values = _values(ended.folder)
            pruned = (ended.folder / "stop").exists()
            state = TrialState.PRUNED if pruned else TrialState.COMPLETE
            study.tell(ended.trial, None if pruned else values[-1][1], state=state)
            done = len(study.get_trials(deepcopy=False, states=FINISHED))
            left = (time.monotonic() - since) / max(1, done - started) * (trials - done)
            print(
                f"sweep: {done}/{trials} trials, {math.ceil(left / 60)} min left; trial "
                f"{ended.trial.number} {'pruned at' if pruned else 'ended with'} swap "
                f"{values[-1][1]:.2f} dB; best {_best(study)}",
                flush=True,
            )


def _report(running: _Live) -> None:
    """Tell the pruner what is new; end the trial if it is hopeless."""
    values = _values(running.folder)
    for step, value in values[running.reported :]:
        running.trial.report(value, step)
    if len(values) > running.reported:
        running.reported = len(values)
        if running.trial.should_prune():
            (running.folder / "stop").touch()


def _values(folder: Path) -> list[tuple[int, float]]:
    """(checkpoint number, swap PSNR) of a run so far."""
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "swap_psnr" in row]
    return [(k, row["swap_psnr"]) for k, row in enumerate(rows, start=1)]


def _best(study: optuna.Study) -> str:
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return f"{study.best_value:.2f} dB (trial {study.best_trial.number})" if complete else "none"


def _short(params: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v:.3g}" for k, v in params.items())


def _finish(study: optuna.Study, config: Config, out: Path) -> None:
    """best.yaml, the table and the plots of a study."""
    complete = study.get_trials(states=(TrialState.COMPLETE,))
    if not complete:
        raise InputError("No trial was completed, so there is no best config; run more --trials.")
    best = configs.load([out / "trials" / study.best_trial.user_attrs["folder"] / "config.yaml"])
    configs.save(best, out / "best.yaml")
    shown = study.get_trials(states=FINISHED)
    table = io.StringIO()
    writer = csv.writer(table)
    names = sorted({name for trial in shown for name in trial.params})
    writer.writerow(["trial", "state", "swap_psnr", "folder", *names])
    for trial in shown:
        value = trial.value if trial.value is not None else _last(trial)
        folder = f"trials/{trial.user_attrs['folder']}"
        params = [trial.params.get(name, "") for name in names]
        writer.writerow([trial.number, trial.state.name.lower(), value, folder, *params])
    write_atomic(out / "trials.csv", table.getvalue())
    _plot(shown, config.sweep, out)


def _last(trial: FrozenTrial) -> float:
    return list(trial.intermediate_values.values())[-1] if trial.intermediate_values else math.nan


def _plot(trials: list[FrozenTrial], ranges: SweepConfig, out: Path) -> None:
    """history.png: value of each trial and the best so far; split.png: value over each width."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    pruned = [t for t in trials if t.state == TrialState.PRUNED]
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    numbers, values = [t.number for t in complete], [t.values[0] for t in complete]
    best = [max(values[: k + 1]) for k in range(len(values))]
    axis.plot(numbers, values, "o", label="completed")
    axis.plot([t.number for t in pruned], [_last(t) for t in pruned], "x", label="pruned")
    axis.step(numbers, best, where="post", label="best so far")
    axis.set_xlabel("trial")
    axis.set_ylabel("swap PSNR on validation images, dB")
    axis.legend()
    FigureCanvasAgg(figure).print_png(out / "history.png")
    names = sorted({name for t in complete for name in t.params})
    columns = 4
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(3 * columns, 2.4 * rows), layout="constrained")
    for axis, name in zip(figure.subplots(rows, columns, squeeze=False).flat, names, strict=False):
        axis.plot([t.params[name] for t in complete], values, "o")
        axis.set_xlabel(name.replace("_", " "))
        limits = getattr(ranges, name.rstrip("0123456789").rstrip("_"))
        if name in ("triplet", "content_kl"):
            axis.set_xscale("log")
            axis.set_xlim(*limits)
            axis.xaxis.set_minor_formatter(NullFormatter())
        else:
            axis.set_xlim(limits[0] - 0.5, limits[1] + 0.5)
    for axis in figure.axes[len(names) :]:
        axis.set_axis_off()
    figure.supylabel("swap PSNR on validation images, dB")
    FigureCanvasAgg(figure).print_png(out / "split.png")
