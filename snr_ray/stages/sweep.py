"""Search of the noise/content split and the loss weights: an Optuna study, one train run a trial.

    study.ask() --Ray task--> train() in OUT/trials/NNNN --metrics.jsonl--> report, prune, tell

    OUT/data/            the data folder, where the origin is a source
    OUT/study.journal    the study; survives a kill and opens in optuna-dashboard
    OUT/trials/NNNN/     ordinary run folders
    OUT/best.yaml        config of the best trial: `snr train --config OUT/best.yaml`
    OUT/report.html      what matters, best trial, all trials; trials.csv, history.png, split.png

A trial's value is the swap PSNR on validation images, mean over view counts. The driver alone
writes the study; it reads how trials fare from their metrics.jsonl and ends a hopeless one through
RUN/stop. The same command again continues: finished trials count, running ones resume from their
checkpoints. Trial 0 is the config as given, and always runs to its end.
"""

import dataclasses
import logging
import math
import time
from pathlib import Path
from typing import Any

import optuna
import ray
from optuna.trial import Trial, TrialState

from snr_ray import configfile as configs
from snr_ray.config import Config, InputError
from snr_ray.folder import open_local
from snr_ray.lock import check_free, locked
from snr_ray.outputs import claim
from snr_ray.stages.cluster import connected, cpus, gpus
from snr_ray.stages.counters import show_trials
from snr_ray.stages.dataset import Origin, count_rows, settle
from snr_ray.stages.runlog import read_metrics
from snr_ray.stages.simulate import Outcome, simulate
from snr_ray.stages.study import FINISHED, GIVEN, NINTHS, by_rungs, open_study, requeue, suggest
from snr_ray.stages.sweeppage import share_run, write_page
from snr_ray.stages.train import train
from snr_ray.stages.trainsetup import identity

OWNED = ("data", "study.journal", "study.journal.lock", "trials", "best.yaml", "trials.csv",
         "history.png", "split.png", "report.html")  # fmt: skip
POLL_S = 1.0
TRIAL_BYTES = 700 * 2**20
"""Memory of a trial that runs in its task."""
TRIAL_ON_TRAIN_BYTES = 1_300 * 2**20
"""Memory of one of several workers beside these: its driver, and five processes of Ray Train."""


def sweep(
    config: Config, *, origin: Origin, out: Path | str, trials: int, overwrite: bool = False
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
    config = by_rungs(config)
    out = open_local(out, "trials append to their files while they train")
    for split in ("train", "val"):
        count_rows(config, origin, split)
    space = {f"sweep.{k}": v for k, v in configs.to_dict(config)["sweep"].items()}
    check_free(out)
    claim(
        out,
        identity(config, origin) | {"stage": "sweep"} | space,
        owned=OWNED,
        overwrite=overwrite,
    )
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with locked(out, "sweep"):
        study = open_study(out, config)
        requeue(study)
        with connected():
            if origin.images:  # simulated once, for all trials
                simulate(config, images=origin.images, out=out / "data")
                origin = Origin(data=out / "data")
            failed = _run(study, config, origin, out, trials)
        _finish(study, config, out)
    return Outcome(out, len(study.get_trials(states=FINISHED)), failed)


# On any node, not all on the one that this process is on. A trial whose node is lost is tried again
# and continues from its checkpoint; what fails of itself is not.
@ray.remote(max_retries=3, scheduling_strategy="SPREAD")
def _train_trial(config: Config, origin: Origin, folder: str) -> None:
    """One trial, in a task of its own: that of a single worker runs in it, those of several hold
    the resources of a larger one."""
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    here = config.train.num_workers == 1
    train(config, origin=origin, out=Path(folder), progress=False, alone=False, here=here)


def _resources(config: Config, memory: int) -> dict[str, Any]:
    """What Ray is to find for the task of a trial. Cores are counted by `_slots`: a trial that held
    its own would wait for ever where the tasks that read its images found none."""
    alone = config.train.num_workers == 1
    return {"num_cpus": 0, "num_gpus": int(alone and config.train.use_gpu), "memory": memory}


@dataclasses.dataclass
class _Live:
    """A trial that is running."""

    trial: Trial
    folder: Path
    reported: int = 0


def _run(study: optuna.Study, config: Config, origin: Origin, out: Path, trials: int) -> int:
    slots, memory = _slots(config)
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
            ref = _train_trial.options(**_resources(chosen, memory)).remote(
                chosen, origin, str(run)
            )
            live[ref] = _Live(trial, run)
            print(f"sweep: trial {trial.number} starts: {_short(trial.params)}", flush=True)
        if not live:
            return failed
        show_trials(running=len(live), finished=done, failed=failed)
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
            pruned = (ended.folder / "stop").exists() and values[-1][0] < NINTHS
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


def _slots(config: Config) -> tuple[int, int]:
    """How many trials run at once, and the memory in bytes that Ray is to find for each: as many
    as there are cores, GPUs and memory for, on all nodes together."""
    train = config.train
    bounds = [(cpus() - 1) // (train.num_workers * train.cpus_per_worker)]
    if train.use_gpu:
        bounds.append(gpus() // train.num_workers)
    rooms = [node["Resources"].get("memory", 0.0) for node in ray.nodes() if node["Alive"]]
    wanted = TRIAL_BYTES if train.num_workers == 1 else TRIAL_ON_TRAIN_BYTES
    memory = int(min(wanted, max(rooms)))
    bounds.append(sum(int(room // memory) for room in rooms) if memory else 1)
    return max(1, min(bounds)), memory


def _report(running: _Live) -> None:
    """Tell the pruner what is new; end the trial if it is hopeless."""
    values = _values(running.folder)
    for step, value in values[running.reported :]:
        running.trial.report(value, step)
        # All are compared with the config as given; after the last checkpoint nothing is saved.
        mortal = running.folder.name != GIVEN and step < NINTHS
        if mortal and running.trial.should_prune():
            (running.folder / "stop").touch()
    running.reported = len(values)


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
    """best.yaml, the table, the plots and the page of a study."""
    complete = study.get_trials(states=(TrialState.COMPLETE,))
    if not complete:
        raise InputError("No trial was completed, so there is no best config; run more --trials.")
    best = configs.load([out / "trials" / study.best_trial.user_attrs["folder"] / "config.yaml"])
    configs.save(best, out / "best.yaml")
    trials = study.get_trials(states=FINISHED)
    write_page(out, trials, config.sweep)
    saved = 1 - share_run(trials)
    print(f"sweep: {saved:.0%} of the steps were saved by ending trials early.", flush=True)
