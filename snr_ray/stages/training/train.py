"""Data-parallel training on Ray: source or data folder -> run folder with a model in it.

    RUN/job.json, config.yaml   what was asked for
    RUN/metrics.jsonl           a line every 25 steps; validation PSNR at each checkpoint
    RUN/tensorboard/            the same as curves, and pictures
    RUN/report.html             the same as a page
    RUN/pictures.png            what the model makes of validation images
    RUN/checkpoints/            the two newest states
    RUN/failures.parquet        images that could not be read
    RUN/errors.txt              what Ray said of workers that failed for good
    RUN/model/                  the result, written once, at the end
    RUN/data/                   a data folder, of images that do not fit in memory
    RUN/mlflow_run              the id of the run in MLflow, where MLFLOW_TRACKING_URI names one

The same command again continues from the newest checkpoint that is intact, on any number of
workers. One driver at a time has the folder. A file RUN/stop ends training at the next checkpoint
as if it were the last. A run in a bucket is worked on in copies: see `desk`.
"""

import contextlib
import functools
import math
import shlex
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.train
import ray.train.torch
from ray.train import UserCallback

from snr_ray import configfile as configs
from snr_ray.address import open_folder
from snr_ray.config import Config
from snr_ray.errors import InputError, RunError, check, room_in
from snr_ray.folder import Folder
from snr_ray.images.datafolder import Failure
from snr_ray.learning.modelfolder import WEIGHTS_FILE, model_place, read_model
from snr_ray.learning.restart import newest_checkpoint
from snr_ray.lock import check_free, locked
from snr_ray.network.swap import N_DONORS
from snr_ray.noise.lmmse import FIT_IMAGES
from snr_ray.outputs import claim
from snr_ray.stages.job.connection import connected
from snr_ray.stages.job.outcome import Outcome
from snr_ray.stages.simulation.dataset import (
    Origin,
    count_rows,
    failed_images,
    fits_in_memory,
    open_rows,
    settle,
)
from snr_ray.stages.simulation.simulate import simulate
from snr_ray.stages.training.desk import Desk
from snr_ray.stages.training.pictures import check_memory, open_pictures
from snr_ray.stages.training.runlog import Watch, read_metrics, write_page
from snr_ray.stages.training.setup import (
    check_images,
    identity,
    settle_start,
    wait_for_room,
    waiting_for,
)
from snr_ray.stages.training.tracker import RUN_FILE, check_tracker, settings
from snr_ray.stages.training.worker import CHECKPOINTS, NodeTorch, work, work_alone

OWNED = ("config.yaml", "metrics.jsonl", "tensorboard", CHECKPOINTS, "failures.parquet",
         "errors.txt", "report.html", "pictures.png", "model", "stop", "data",
         RUN_FILE)  # fmt: skip
FINISHED = f"model/{WEIGHTS_FILE}"
"""The last file of a run."""
DONE = "Done:"
"""How the page of a finished run begins to say so."""
RETRIES = 3
"""How often workers that died, with their node or for memory, are started again."""


def train(
    config: Config,
    *,
    origin: Origin,
    out: Path | str | Folder,
    overwrite: bool = False,
    wait: float | None = None,
    progress: bool = True,
    alone: bool = True,
    here: bool = False,
) -> Outcome:
    """Train a model, or continue, or leave a finished run alone.

    Args:
        config: what to train.
        origin: the images.
        out: the run folder, also in a bucket.
        overwrite: start afresh whatever an earlier run left there.
        wait: minutes to wait for processors, also for machines to join; None as long as it takes
            for those there are to be free.
        progress: keep a progress line.
        alone: make sure that no other driver has the folder; off where the caller has it.
        here: train in this process, a task that holds what train.cpus_per_worker and train.use_gpu
            ask for, in place of workers of Ray Train; for train.num_workers=1.

    Raises:
        InputError: for a source, folder or setting the user can put right.
        RunError: for a run that went wrong; what it had is kept.
    """
    check(
        wait is None or 0 <= wait < math.inf,
        f"--wait must be minutes, 0 or more, but got {wait}.",
    )
    config = settle_start(settle(config, origin))
    place = open_folder(out)
    desk = Desk(place)
    counts = {split: count_rows(config, origin, split) for split in ("train", "val")}
    if counts["train"] < config.train.batch_size:
        raise InputError(
            f"Training needs at least one batch of images (train.batch_size = "
            f"{config.train.batch_size}), but the train split of {origin.name} holds "
            f"{counts['train']}; add images or lower train.batch_size."
        )
    if alone:
        check_tracker(settings())
        check_free(place)
    claim(place, identity(config, origin), owned=OWNED, overwrite=overwrite, **origin.inputs)
    if _is_finished(place):
        if not place.exists("report.html") or DONE.encode() not in place.read("report.html"):
            desk.fetch("config.yaml")  # the driver was killed before it could write its page
            write_page(desk, f"{DONE} {_named(origin)}")
        return _outcome(desk)
    held = locked(place, "train") if alone else contextlib.nullcontext()
    with room_in(desk.path), held:
        configs.save(config, desk.path / "config.yaml")
        desk.keep("config.yaml")
        desk.fetch("metrics.jsonl", "pictures.png", CHECKPOINTS)
        newest, damaged = newest_checkpoint(desk.path / CHECKPOINTS)
        if damaged:
            goes_on = f"goes on from {newest}" if newest else "begins anew, as none is intact"
            said = f"train: damaged: {'; '.join(damaged)}. Training {goes_on}."
            print(said.replace(str(desk.path), desk.name), file=sys.stderr)
        with connected():
            if not here:
                wait_for_room(config, wait, tell=progress)
            _train(config, origin, desk, counts, progress=progress, here=here)
    return _outcome(desk)


def _is_finished(place: Folder) -> bool:
    """Whether a run has its model. One that was damaged is made anew of the newest checkpoint; in
    a bucket, which takes files whole, it is not looked at."""
    if not place.exists(FINISHED):
        return False
    if place.local is not None:
        try:
            read_model(place.local / "model")
        except InputError as error:
            print(f"train: damaged: {error} It is made anew.", file=sys.stderr)
            return False
    return True


def _train(
    config: Config,
    origin: Origin,
    desk: Desk,
    counts: dict[str, int],
    *,
    progress: bool,
    here: bool,
) -> None:
    name = _named(origin)
    failed: dict[str, list[Failure]] = {"train": [], "val": []}
    mixed = config.noise.views_per_pixel is not None
    if mixed:
        check_memory(config, counts["train"])
    in_memory = mixed or fits_in_memory(config, counts["train"])
    if not in_memory and origin.images:
        data = desk.place.join("data")
        print(f"The images do not fit in memory; they go to {data}.", file=sys.stderr)
        simulate(config, images=origin.images, out=data)
        origin = Origin(data=data)
        counts = {split: count_rows(config, origin, split) for split in counts}
        table = pq.read_table(pa.BufferReader(data.read("failures.parquet")))
        failed["all"] = table.to_pylist()
    datasets = {"val": open_rows(config, origin, "val", config.train.val_images).materialize()}
    if mixed:
        datasets["train"] = open_pictures(config, origin, "train").materialize()
    elif in_memory:
        datasets["train"] = open_rows(config, origin, "train").materialize()
    failed |= {split: failed_images(rows) for split, rows in datasets.items()}
    counts["val"] = min(counts["val"], config.train.val_images)
    check_images(desk.place, config, origin, counts, failed)
    if mixed:
        datasets["donors"] = open_rows(config, origin, "train", N_DONORS).materialize()
    if config.model.physics:
        datasets["physics"] = open_rows(config, origin, "train", FIT_IMAGES).materialize()
    job = {
        "config": config,
        "desk": desk,
        "origin": name,
        "start": config.train.start and model_place(config.train.start),
        "data": None if in_memory else origin.folder,
        "tracker": settings(),
    }
    watch = Watch(desk, config, functools.partial(waiting_for, config)) if progress else None
    ending = f"Interrupted; the same command continues: {name}"
    try:
        if here:
            work_alone(job, datasets)
        else:
            _fit_on_ray(job, datasets)
        ending = f"{DONE} {name}"
    except (InputError, RunError) as error:
        ending = str(error)
        raise
    finally:
        if watch:
            watch.stop()
        write_page(desk, ending)


def _named(origin: Origin) -> str:
    """The command, as a shell takes it."""
    return f"snr train {'--images' if origin.images else '--data'} {shlex.quote(origin.name)}"


def _fit_on_ray(job: dict[str, Any], datasets: dict[str, Any]) -> None:
    config, place = job["config"], job["desk"].place
    # Ray's own list of checkpoints, of runs of snr_ray 0.1.0: it has none now, and one that is
    # damaged, or of another Ray, would end the run.
    place.remove(f"{CHECKPOINTS}/checkpoint_manager_snapshot.json")
    store, root = place.filesystem()
    scaling = ray.train.ScalingConfig(
        num_workers=config.train.num_workers,
        use_gpu=config.train.use_gpu,
        resources_per_worker={"CPU": config.train.cpus_per_worker}
        | ({"GPU": 1} if config.train.use_gpu else {}),
    )
    trainer = ray.train.torch.TorchTrainer(
        work,
        train_loop_config=job,
        torch_config=NodeTorch(),
        datasets=datasets,
        dataset_config=ray.train.DataConfig(datasets_to_split=[]),
        scaling_config=scaling,
        run_config=ray.train.RunConfig(
            name=CHECKPOINTS,
            storage_path=root,
            storage_filesystem=None if place.local else store,
            failure_config=ray.train.FailureConfig(max_failures=RETRIES),
            callbacks=[EndAtOnce()],
        ),
    )
    answer = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit()
    except SystemExit:  # Ray Train's answer to an interrupt
        raise KeyboardInterrupt from None
    except ray.train.TrainingFailedError as error:
        raise _why(error, place) from None
    except (ray.exceptions.ActorDiedError, ray.exceptions.OutOfMemoryError) as error:
        place.write("errors.txt", f"{error}\n")
        raise RunError(
            "Training has ended because the process that leads it was killed, most often for lack "
            f"of memory on this machine (all that is known is in {place.join('errors.txt')}); the "
            "same command continues from the last checkpoint."
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, answer)  # Ray Train leaves its own behind


class EndAtOnce(UserCallback):
    """Ends a run at an error that trying again does not mend; Ray Train tries others again."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for error in worker_exceptions.values():
            cause = _cause(error)
            if isinstance(cause, (InputError, RunError)):
                raise cause


def _cause(error: BaseException) -> BaseException:
    """What a worker raised, out of Ray Train's wrapping."""
    return getattr(error, "_base_exc", error)


def _why(error: Exception, place: Folder) -> Exception:
    """A failed training in one sentence; Ray's own words go to a file."""
    causes = [
        getattr(error, "controller_failure", None),
        *getattr(error, "worker_failures", {}).values(),
    ]
    causes = [_cause(cause) for cause in causes if cause is not None]
    for cause in causes:
        while cause is not None:
            if isinstance(cause, (InputError, RunError)):
                return cause
            cause = getattr(cause, "controller_failure", None)
    place.write("errors.txt", f"{error}\n")
    last = f"{type(causes[0]).__name__}: {causes[0]}" if causes else str(error)
    lines = last.strip().splitlines() or [last]
    return RunError(
        f"Training failed {RETRIES + 1} times, the last time by {lines[0]} (all of it is in "
        f"{place.join('errors.txt')}); the same command continues from the last checkpoint."
    )


def _outcome(desk: Desk) -> Outcome:
    failed = _count_failed(desk.place)
    desk.fetch("metrics.jsonl")
    rows = read_metrics(desk.path / "metrics.jsonl")
    check(
        bool(rows),
        f"{desk.place.join('metrics.jsonl')} must hold the curves of the run, but holds none; put "
        f"a copy of it in its place. The model, {desk.place.join('model')}, can be used without.",
    )
    return Outcome(desk.place.local or desk.place, int(rows[-1]["step"]), failed)


def _count_failed(place: Folder) -> int:
    try:
        data = place.read("failures.parquet")
        return pq.read_metadata(pa.BufferReader(data)).num_rows
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"{place.join('failures.parquet')} must say which images could not be read, but is "
            f"missing or damaged ({' '.join(str(error).split())}); put a copy of it in its place. "
            f"The model, {place.join('model')}, can be used without."
        ) from None
