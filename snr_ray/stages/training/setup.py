"""What is settled before a worker starts: the config, what the run is known by, that it can run."""

import socket
import sys
import time
from typing import Any

import ray
import ray.util
import torch

from snr_ray import configfile as configs
from snr_ray.address import without_secrets
from snr_ray.config import Config, NoiseConfig
from snr_ray.errors import InputError, check
from snr_ray.folder import Folder
from snr_ray.hashing import fingerprint
from snr_ray.images.datafolder import Failure, failures_bytes
from snr_ray.learning.checkpoint import load_any
from snr_ray.learning.modelfolder import WEIGHTS_FILE, model_path
from snr_ray.network.hvae import HVAE
from snr_ray.outputs import FILES
from snr_ray.stages.job import pools
from snr_ray.stages.job.connection import gpus
from snr_ray.stages.simulation.dataset import Origin, check_decoder
from snr_ray.stages.training.runlog import WAITING_S

HOW = ("train.num_workers", "train.cpus_per_worker", "train.use_gpu", "train.compile")
"""Settings that say how, not what: a run may continue with others."""
SOON_S = 5.0
"""What was free a moment ago needs so long to be told as free."""


def settle_start(config: Config) -> Config:
    """The config with the model section of train.start, if there is one.

    Raises:
        InputError: if that is no model folder, or of a model that cannot begin this run.
    """
    start = config.train.start
    if start is None:
        return config
    trained = load_any(start)
    its = trained.config
    for key, mine, theirs in (
        ("images.channels", config.images.channels, its.images.channels),
        ("model.kind", config.model.kind, its.model.kind),
    ):
        check(
            mine == theirs,
            f"train.start needs a model of the same {key}, but {start} has {theirs} where this run "
            f"has {mine}; set {key}={theirs}, or start from another.",
        )
    if isinstance(trained.model, HVAE) and trained.model.noise_maker is not None:
        _check_views(start, its.noise, config.noise)
    mine, stored = configs.to_dict(config)["model"], configs.to_dict(its)["model"]
    stored["physics"] = stored["physics"] or mine["physics"]
    for key in ("bounded", "correction"):  # which have no weights
        stored[key] = mine[key]
    stored["step_channels"] = stored["step_channels"] or mine["step_channels"]
    for key, value in stored.items():
        if mine[key] != value:
            print(f"{without_secrets(str(start))} has model.{key}={value}, which is used in place "
                  f"of {mine[key]}.",
                  file=sys.stderr)  # fmt: skip
    settled = configs.replace(config, {f"model.{key}": value for key, value in stored.items()})
    check_decoder(settled)
    return settled


def _check_views(start: str, its: NoiseConfig, mine: NoiseConfig) -> None:
    """Raise InputError if what reads view counts from noise codes cannot begin as that of a model:
    it names one of a few, or says how many there are, of any count in a range."""
    if its.views_per_pixel is None and mine.views_per_pixel is None:
        known, wanted = list(its.n_views), list(mine.n_views)
        check(
            len(known) == len(wanted),
            f"train.start needs a model of as many view counts, but {start} has {len(known)} "
            f"({known}) where this run has {len(wanted)} ({wanted}); set noise.n_views to "
            f"{len(known)} of them, or start from another.",
        )
    elif its.views_per_pixel is None:
        raise InputError(
            f"train.start needs a model of a range of view counts, as noise.views_per_pixel is "
            f"set, but {start} was trained on {list(its.n_views)} views; leave "
            "noise.views_per_pixel out, or start from another."
        )
    elif mine.views_per_pixel is None:
        low, high = its.views_per_pixel
        raise InputError(
            f"train.start needs a model of a few view counts where noise.views_per_pixel is not "
            f"set, but {start} was trained on a range of them; set noise.views_per_pixel="
            f"[{low:g},{high:g}], or start from another."
        )


def identity(config: Config, origin: Origin) -> dict[str, Any]:
    """All that decides what a run learns, flat: what its folder is known by."""
    what = configs.to_dict(config)
    for key in HOW:
        section, name = key.split(".")
        what[section].pop(name)
    flat = {
        f"{section}.{key}": value
        for section, values in what.items()
        if isinstance(values, dict) and section != "sweep"
        for key, value in values.items()
    }
    data = {}
    if origin.images:
        data["source"] = origin.source.identity
        data[FILES] = origin.source.files()
    if origin.data:  # known by what it holds, wherever it lies
        data["data"] = fingerprint(origin.folder.place.read("manifest.json"))
    if config.train.start:
        weights = model_path(config.train.start) / WEIGHTS_FILE
        data["start"] = fingerprint(weights.read_bytes())
    return {"stage": "train", **data, "seed": config.seed, **flat}


def check_images(
    out: Folder,
    config: Config,
    origin: Origin,
    counts: dict[str, int],
    failed: dict[str, list[Failure]],
) -> None:
    """Write the images that could not be read to failures.parquet, before any worker starts.

    Args:
        out: the run folder.
        config: of the run.
        origin: where the images come from.
        counts: images of each split, readable or not.
        failed: those of each split that could not be read.

    Raises:
        InputError: if what is left does not fill a batch, or leaves nothing to validate on.
    """
    rows = [row for rows in failed.values() for row in rows]
    out.write("failures.parquet", failures_bytes(rows))
    batch = config.train.batch_size
    for split, least, what in (
        ("train", batch, f"one batch of images (train.batch_size = {batch})"),
        ("val", 1, "one image to validate on"),
    ):
        bad = failed[split]
        if bad and counts[split] - len(bad) < least:
            raise InputError(
                f"Training needs at least {what}, but of the {counts[split]} images in the {split} "
                f"split of {origin.name}, {len(bad)} cannot be read, the first ({bad[0]['id']}) "
                f"because: {bad[0]['reason'].rstrip('.')}. All reasons are in "
                f"{out.join('failures.parquet')}."
            )


def check_room(config: Config) -> None:
    """Raise InputError if workers of a run need more than the cluster has, where none may come."""
    if not pools.has_autoscaler() and _lacks(config):
        _refuse(config, "")


def wait_for_room(config: Config, minutes: float | None, *, tell: bool) -> None:
    """Return once the cluster has free what the workers need, or will bring it when asked.

    Args:
        config: of the run.
        minutes: how long to wait; also for machines to join. None waits for those that are busy
            for as long as it takes, and for machines that are not there not at all.
        tell: say every half a minute what is waited for.

    Raises:
        InputError: if there is less than that, or still is after so many minutes.
    """
    train = config.train
    begun, told = time.monotonic(), 0.0
    while True:
        comes = False
        if _waiting(config) and pools.has_autoscaler():
            # Ray Train asks for it once more when it starts, and waits until it is there.
            comes = pools.brings(of_a_worker(config), train.num_workers)
        lacks = not comes and _lacks(config)
        if not lacks and (comes or not _waiting(config)):
            break
        waited = time.monotonic() - begun
        if lacks and not minutes:
            _refuse(config, "; --wait MINUTES waits for more")
        if minutes is not None and waited >= 60 * minutes:
            raise InputError(
                f"After --wait {minutes:g} minutes the cluster still has not free what training "
                f"needs: {_waiting(config)}; wait longer, or lower train.num_workers."
            )
        if tell and waited >= told + SOON_S:
            print(f"train: {_waiting(config)}", file=sys.stderr, flush=True)
            told = waited + WAITING_S - SOON_S
        time.sleep(0.5)
    if train.use_gpu:
        _check_torch_sees_gpus()


def waiting_for(config: Config) -> str:
    """What a run that has been given to Ray waits for, such as a node that was lost."""
    table = ray.util.placement_group_table()
    pending = any(group["state"] in ("PENDING", "RESCHEDULING") for group in table.values())
    return _waiting(config) if pending else ""


def _waiting(config: Config) -> str:
    train, free = config.train, ray.available_resources()
    wants = [("CPUs", "CPU", train.num_workers * train.cpus_per_worker)]
    wants += [("GPUs", "GPU", train.num_workers)] if train.use_gpu else []
    short = [
        f"{want} {name}, {int(free.get(key, 0))} free"
        for name, key, want in wants
        if free.get(key, 0) < want
    ]
    return f"waiting for {' and '.join(short)}" if short else ""


def of_a_worker(config: Config) -> dict[str, float]:
    """Ray resources of one."""
    cores = {"CPU": float(config.train.cpus_per_worker)}
    return cores | {"GPU": 1.0} if config.train.use_gpu else cores


def _lacks(config: Config) -> bool:
    """Whether all cores and GPUs that are there are too few."""
    there = ray.cluster_resources()
    wants = of_a_worker(config).items()
    return any(config.train.num_workers * each > there.get(key, 0) for key, each in wants)


def _refuse(config: Config, way_out: str) -> None:
    train, most = config.train, int(ray.cluster_resources().get("CPU", 0))
    if train.num_workers * train.cpus_per_worker > most:
        raise InputError(
            f"train.num_workers x train.cpus_per_worker must be at most the cluster's {most} "
            f"cores, but got {train.num_workers} x {train.cpus_per_worker}{way_out}."
        )
    raise InputError(
        f"train.use_gpu needs one GPU per worker ({train.num_workers}), but the "
        f"cluster has {gpus()}; set train.use_gpu=false to train on processors."
    )


def _check_torch_sees_gpus() -> None:
    host = ray.get(ray.remote(num_gpus=1, max_retries=0)(_blind_host).remote())
    check(
        not host,
        f"train.use_gpu needs GPUs that torch can use, but on {host} it finds none: its driver, or "
        "a torch that was built for CUDA, is missing. Set train.use_gpu=false to train on "
        "processors.",
    )


def _blind_host() -> str:
    """The name of this machine, if torch cannot use its GPUs."""
    return "" if torch.cuda.is_available() else socket.gethostname()
