"""Connecting to Ray: the cluster there is, or a local one."""

import functools
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from snr_ray.config import InputError


@contextmanager
def connected() -> Iterator[None]:
    """Connect for the time of a stage: to RAY_ADDRESS (a job has it set), else to a new local Ray.

    Stays out of the way where the caller has connected already.
    """
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS", "local")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=True,
                **({"include_dashboard": False} if address == "local" else {}),
            )
        except ConnectionError as error:
            raise InputError(
                f"RAY_ADDRESS must name a running Ray cluster, but {address} does not answer "
                f"({error}); unset it to work on this machine."
            ) from None
        except Exception as error:  # Ray has no class of its own for this
            if "timed out during startup" not in str(error):
                raise
            raise InputError(
                "Ray must start within 30 seconds, but this machine is too busy for that; the same "
                "command continues when there is less to do."
            ) from None
    quiet_data()
    try:
        yield
    finally:
        # A prefetching thread that is late finds Ray gone, which is no news.
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        ray.shutdown()


def quiet_data() -> None:
    """Ray Data without its own progress bars and tracebacks: stages report in their own words."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def cpus() -> int:
    """Processor cores of the cluster."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def gpus() -> int:
    """GPUs of the cluster."""
    return int(ray.cluster_resources().get("GPU", 0))


@functools.lru_cache(maxsize=2)
def shared(ref: "ray.ObjectRef") -> Any:
    """What the driver put in the object store for all tasks, fetched once per worker process."""
    return ray.get(ref)
