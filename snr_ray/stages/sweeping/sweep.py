"""Search of the noise/content split and the loss weights: an Optuna study, one train run a trial.

    study.ask() --Ray task--> train() in OUT/trials/NNNN --metrics.jsonl--> report, prune, tell

    OUT/data/            the data folder, where the origin is a source
    OUT/study.journal    the study; survives a kill and opens in optuna-dashboard
    OUT/driver           in its place, where the study is in PostgreSQL: who this driver is there
    OUT/trials/NNNN/     ordinary run folders
    OUT/best.yaml        config of the best trial: `snr train --config OUT/best.yaml`
    OUT/confirm/         run folders of best and given config with other seeds; confirm.json
    OUT/report.html      what matters, best trial, all trials; trials.csv, history.png, split.png,
                         of several objectives front.png

A trial's value is the swap PSNR on validation images, mean over view counts, or what --objective
names in its place. The driver alone writes the study; it reads how trials fare from their
metrics.jsonl and ends a hopeless one through RUN/stop. The same command again continues: finished
trials count, running ones resume from their checkpoints. Trial 0 is the config as given, and always
runs to its end.

With several objectives every trial runs to its end, and the trials that no other beats in all of
them at once are the Pareto front; best.yaml is the best by the first objective alone. Of trials
beyond a bound (--at-most, --at-least) none is the best, nor on the front.
"""

import contextlib
import dataclasses
import math
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import ray
from optuna.trial import Trial, TrialState
from sqlalchemy.exc import OperationalError

from snr_ray import configfile as configs
from snr_ray.address import open_folder
from snr_ray.config import Config
from snr_ray.errors import InputError, Lost, RunError, room_in
from snr_ray.folder import Folder
from snr_ray.learning.validation import Metrics
from snr_ray.lock import check_free, locked
from snr_ray.outputs import FILES, claim
from snr_ray.stages.job.connection import connected
from snr_ray.stages.job.counters import show_trials
from snr_ray.stages.job.outcome import Outcome
from snr_ray.stages.simulation.dataset import Origin, count_rows, settle
from snr_ray.stages.simulation.simulate import simulate
from snr_ray.stages.sweeping.confirm import CONFIRMED, RUNS, confirm
from snr_ray.stages.sweeping.objectives import SWAP, Goals
from snr_ray.stages.sweeping.page import share_run, write_page
from snr_ray.stages.sweeping.storage import (
    DRIVER_FILE,
    JOURNAL,
    Heart,
    close,
    dashboard,
    driver_of,
    open_storage,
    read_url,
    shown,
)
from snr_ray.stages.sweeping.study import (
    DRIVER,
    FINISHED,
    GIVEN,
    MEASURED,
    SHARE,
    best_of,
    by_rungs,
    check_same,
    config_of,
    given,
    moved,
    open_study,
    requeue,
    suggest,
)
from snr_ray.stages.sweeping.trial import ask_for_room, ending, slots_of, start_run
from snr_ray.stages.training.desk import Desk
from snr_ray.stages.training.runlog import metrics_of
from snr_ray.stages.training.setup import check_room, identity
from snr_ray.stages.training.tracker import check_tracker, settings

PAGE = ("best.yaml", CONFIRMED, "trials.csv", "history.png", "split.png", "front.png",
        "report.html")  # fmt: skip
OWNED = ("data", JOURNAL, f"{JOURNAL}.lock", DRIVER_FILE, "trials", RUNS, *PAGE)
POLL_S = 1.0
FAILS_IN_A_ROW = 3
"""So many trials that fail one after the other say that the next will fail, too."""


def sweep(
    config: Config,
    *,
    origin: Origin,
    out: Path | str | Folder,
    trials: int,
    goals: Goals | None = None,
    storage: str | None = None,
    name: str = "sweep",
    seeds: int = 0,
    overwrite: bool = False,
) -> Outcome:
    """Run trials until `trials` of them have finished or were pruned.

    Args:
        config: the config as given.
        origin: the images.
        out: the folder of the sweep, also in a bucket; that of this driver, where several share a
            study.
        trials: how many, over all drivers of the study.
        goals: what is looked for; by default the swap PSNR.
        storage: URL of a PostgreSQL that keeps the study, for several drivers; None: the journal in
            `out`.
        name: of the study in that PostgreSQL.
        seeds: train the best config and that as given with so many seeds each when the trials have
            finished, and say whether the one is better; 0: not.
        overwrite: start afresh whatever an earlier sweep left in `out`.

    Raises:
        InputError: for a source, folder or setting the user can put right.
        Lost: if the storage went away.
        RunError: if trials fail one after the other.
    """
    goals = goals or Goals()
    if trials < 1:
        raise InputError(f"--trials must be at least 1, but got {trials}.")
    if seeds < 0 or seeds == 1:
        raise InputError(
            f"--confirm takes 2 seeds or more, of which a spread can be told, but got {seeds}."
        )
    if config.model.kind != "hvae":
        raise InputError(
            f"A sweep searches the split of the codes, but model.kind={config.model.kind} has no "
            f"codes; leave the preset {config.model.kind} out."
        )
    if config.train.start:
        raise InputError(
            f"A sweep searches the sizes of the network, but train.start={config.train.start} "
            "fixes them; leave it out."
        )
    url = read_url(storage) if storage else None
    if url is None and name != "sweep":
        raise InputError(
            f"--study names a study among others in --storage, but got --study {name} without it; "
            "leave it out."
        )
    config = settle(config, origin)
    config = by_rungs(config)
    if outside := moved(config):
        print(f"sweep: the config as given lies outside of what is searched; what is trained and "
              f"called so has {', '.join(outside)}.", file=sys.stderr)  # fmt: skip
    place = open_folder(out)
    desk = Desk(place)
    for split in ("train", "val"):
        count_rows(config, origin, split)
    space = {f"sweep.{k}": v for k, v in configs.to_dict(config)["sweep"].items()}
    known = identity(config, origin) | {"stage": "sweep"} | space | goals.identity()
    shared = {key: value for key, value in known.items() if key != FILES}  # drivers may have copies
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    check_tracker(settings())
    if url is not None:
        asked = open_storage(desk.path, url)
        check_same(asked, name, shared)
        close(asked)
    check_free(place)
    whose = known | {"study": name if url else None}
    claim(place, whose, owned=OWNED, overwrite=overwrite, **origin.inputs)
    with room_in(desk.path), locked(place, "sweep"):
        desk.fetch(DRIVER_FILE, JOURNAL, "best.yaml", CONFIRMED)
        driver = driver_of(desk.path) if url else None
        desk.keep(DRIVER_FILE)
        try:
            kept = open_storage(desk.path, url)
            study = open_study(kept, config, goals, name=name, identity=shared)
            requeue(study, driver)
            print(f"sweep: {dashboard(place, url)} shows the study.", flush=True)
            if len(goals.objectives) > 1:
                print("sweep: every trial runs to its end: of several objectives none can be told "
                      "to be hopeless before.", flush=True)  # fmt: skip
            with connected():
                check_room(config)
                if origin.images:  # simulated once, for all trials
                    data = place.join("data")
                    simulate(config, images=origin.images, out=data)
                    origin = Origin(data=data)
                heart = Heart(kept, study)
                driving = _Sweep(study, heart, config, goals, origin, desk, driver)
                with ending(driving.live):
                    failed = driving.run(trials)
                best = _finish(study, config, goals, desk, dashboard(place, url))
                if seeds:
                    _confirm(best, config, goals, origin, desk, seeds)
                    _finish(study, config, goals, desk, dashboard(place, url))  # its page
        except (OperationalError, optuna.exceptions.StorageInternalError) as error:
            if url is None:
                raise
            raise Lost(f"{shown(url)} went away ({type(error).__name__})") from None
        done = len(study.get_trials(deepcopy=False, states=FINISHED))
        close(kept)
    return Outcome(place.local or place, done, failed)


@dataclasses.dataclass
class _Live:
    """A trial that is running."""

    trial: Trial
    name: str
    """Of its folder."""
    folder: Folder
    reported: int = 0


class _Sweep:
    """A driver at work: the trials that it runs, on a study that others may run trials of, too."""

    def __init__(
        self,
        study: optuna.Study,
        heart: Heart,
        config: Config,
        goals: Goals,
        origin: Origin,
        desk: Desk,
        driver: str | None,
    ) -> None:
        self.study, self.heart, self.config, self.goals = study, heart, config, goals
        self.origin, self.desk, self.driver = origin, desk, driver
        self.live: dict[Any, _Live] = {}
        self.failed = self.in_a_row = 0

    def run(self, trials: int) -> int:
        """Run trials until so many of the study have finished; returns how many failed."""
        since, started, waiting = time.monotonic(), self._count(*FINISHED), False
        ask_for_room(self.config, trials - started)
        while (done := self._count(*FINISHED)) < trials or self.live:
            self.heart.beat([running.trial for running in self.live.values()])
            slots, memory = slots_of(self.config)  # which nodes that come make more
            while len(self.live) < slots and done + self._count(TrialState.RUNNING) < trials:
                self._start(memory)
            show_trials(running=len(self.live), finished=done, failed=self.failed)
            if not self.live:
                if not waiting:
                    print("sweep: waiting for trials of other drivers.", flush=True)
                waiting = True
                time.sleep(POLL_S)
                continue
            ready, _ = ray.wait(list(self.live), num_returns=1, timeout=POLL_S)
            for ref, running in list(self.live.items()):
                try:
                    # In a bucket they are looked at less often, but always at their end.
                    now = ref in ready or self.desk.soon(running.name)
                    if self.goals.prunes and now:
                        _report(running, self.goals, self.config.train.steps)
                    if ref in ready and (how := self._end(ref, running)):
                        done = self._count(*FINISHED)
                        left = (time.monotonic() - since) / max(1, done - started) * (trials - done)
                        print(
                            f"sweep: {done}/{trials} trials, {math.ceil(left / 60)} min left; "
                            f"trial {running.trial.number} {how}; best {self._best()}",
                            flush=True,
                        )
                except optuna.exceptions.UpdateFinishedTrialError:
                    # This driver had shown no sign of life for minutes.
                    print(f"sweep: trial {running.trial.number} was taken over by another driver",
                          flush=True)  # fmt: skip
                    ray.cancel(ref, force=True)
                    self.live.pop(ref, None)
            if ready or self.desk.soon(JOURNAL):
                self.desk.keep(JOURNAL)
        return self.failed

    def _count(self, *states: TrialState) -> int:
        return len(self.study.get_trials(deepcopy=False, states=states))

    def _start(self, memory: int) -> None:
        trial = self.heart.ask()
        folder = trial.user_attrs.get("folder", f"{trial.number:04d}")
        trial.set_user_attr("folder", folder)
        if self.driver:
            trial.set_user_attr(DRIVER, self.driver)
        run = self.desk.place.join(f"trials/{folder}")
        chosen = suggest(trial, self.config)
        self.desk.keep(JOURNAL)  # before there is a folder that it must know
        ref = start_run(chosen, self.origin, run, memory)
        self.live[ref] = _Live(trial, folder, run)
        print(f"sweep: trial {trial.number} starts: {_short(trial.params)}", flush=True)

    def _end(self, ref: Any, ended: _Live) -> str:
        """Tell the study what became of a trial; returns that in words, none of one that failed."""
        del self.live[ref]
        trial = ended.trial
        try:
            ray.get(ref)
            rows = _checkpoints(ended.folder)
            measured = self.goals.measured(rows[-1] if rows else {})
        except (ray.exceptions.RayError, InputError) as error:
            self.study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
            self.failed += 1
            reason = str(error).strip().splitlines()[-1]
            print(f"sweep: trial {trial.number} failed: {reason}", flush=True)
            self.in_a_row += 1
            if self.in_a_row >= FAILS_IN_A_ROW:
                raise RunError(
                    f"A sweep goes on where a trial fails, but {self.in_a_row} in a row did, the "
                    f"last with: {reason} Mend it, and the same command continues."
                ) from None
            return ""
        self.in_a_row = 0
        share = rows[-1]["step"] / self.config.train.steps
        trial.set_user_attr(MEASURED, measured)
        trial.set_user_attr(SHARE, share)
        for bound in self.goals.bounds:
            trial.set_constraint(bound.text, bound.excess(measured))
        pruned = ended.folder.exists("stop") and share < 1
        if pruned:
            self.study.tell(trial, state=TrialState.PRUNED)
        else:
            self.study.tell(trial, [measured[one.metric] for one in self.goals.objectives])
        what = ", ".join(
            f"{one.title} {one.show(measured[one.metric])} {one.unit}"
            for one in self.goals.objectives
        )
        beyond = [b.text for b in self.goals.bounds if b.excess(measured) > 0]
        words = f"pruned at {what}" if pruned else f"ended with {what}"
        return f"{words}, beyond {' '.join(beyond)}" if beyond else words

    def _best(self) -> str:
        trials = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        best, first = best_of(trials, self.goals), self.goals.first
        if best is None:
            return "none"
        return f"{first.show(best.values[0])} {first.unit} (trial {best.number})"


def _report(running: _Live, goals: Goals, steps: int) -> None:
    """Tell the pruner what is new of a trial of so many steps; end it if it is hopeless."""
    rows = _checkpoints(running.folder)
    for step, row in list(enumerate(rows, start=1))[running.reported :]:
        if (value := row.get(goals.first.metric)) is None:
            continue
        running.trial.report(value, step)
        # All are compared with the config as given; after the last checkpoint nothing is saved.
        mortal = running.name != GIVEN and row["step"] < steps
        if mortal and running.trial.should_prune():
            running.folder.write("stop", "")
    # A run that began again from a checkpoint has dropped lines, and has the same again.
    running.reported = max(running.reported, len(rows))


def _checkpoints(folder: Folder) -> list[Metrics]:
    """What a run came to at each of its checkpoints so far."""
    return [row for row in metrics_of(folder) if SWAP in row]


def _short(params: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v:.3g}" for k, v in params.items())


def _finish(study: optuna.Study, config: Config, goals: Goals, desk: Desk, command: str) -> Config:
    """best.yaml, the table, the plots and the page of a study; returns its best config."""
    trials = study.get_trials(states=FINISHED)
    if all(trial.state != TrialState.COMPLETE for trial in trials):
        raise InputError("No trial was completed, so there is no best config; run more --trials.")
    front = [trial.number for trial in study.best_trials] if len(goals.objectives) > 1 else []
    out = desk.path
    best, place = best_of(trials, goals), out / "best.yaml"
    if best is None or config_of(best.params, config) != _saved(place):
        for old in (place, out / CONFIRMED):  # what was confirmed was another
            old.unlink(missing_ok=True)
    if best is not None:
        configs.save(config_of(best.params, config), place)
    write_page(out, trials, goals, front, config.sweep, command)
    for name in ("best.yaml", CONFIRMED):
        desk.drop(name)
    desk.keep(*PAGE)
    if goals.prunes:
        saved = 1 - share_run(trials)
        print(f"sweep: {saved:.0%} of the steps were saved by ending trials early.", flush=True)
    if best is None:
        raise InputError(
            f"No trial keeps to {' '.join(bound.text for bound in goals.bounds)}, so there is no "
            f"best config; {desk.place.join('report.html')} shows how far they are: run more "
            "--trials, or give another --out with a wider bound."
        )
    if front:
        print(
            f"sweep: {len(front)} of {len(trials)} trials are on the Pareto front; the best by the "
            f"first objective, {goals.first.title}, is trial {best.number}.",
            flush=True,
        )
    return config_of(best.params, config)


def _saved(place: Path) -> Config | None:
    """The best config so far; None where there is none, or it is damaged and written anew."""
    with contextlib.suppress(InputError):
        return configs.load([place]) if place.is_file() else None
    return None


def _confirm(
    best: Config, config: Config, goals: Goals, origin: Origin, desk: Desk, seeds: int
) -> None:
    first = config_of(given(config), config)
    if best == first:
        print("sweep: the config as given is the best, so there is nothing to confirm.", flush=True)
        return
    found = confirm(best, first, goals, origin, desk.place, seeds)
    desk.fetch(CONFIRMED)
    print(f"sweep: {found.sentence()}", flush=True)
