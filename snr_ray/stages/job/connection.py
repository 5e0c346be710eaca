"""Connecting to Ray: the cluster there is, or a local one that nobody else gets into."""

import functools
import json
import logging
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import ray
from ray._private import services
from ray._private.grpc_utils import init_grpc_channel
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from snr_ray.errors import InputError, Lost

LOST = "Ray on this machine has ended, killed or out of memory (its logs are in {})"
SHORT = Path("/tmp")
"""Where local files lie; not TMPDIR, as paths of Ray's sockets may have about 100 characters."""
ATTEMPTS = 2
"""Ray gives up a start after 30 seconds, which a busy machine may exceed; a second is quicker."""
ON_CORES: dict[str, Any] = {
    "label_selector": {"pool": "!gpu"},
    "fallback_strategy": [{"label_selector": {}}],
}
"""Ray options of work without a GPU: nodes with the label pool=gpu are its last choice. Work with
one needs no label, as it asks for the GPU."""
OFF_HEAD: dict[str, Any] = {"label_selector": {"pool": "!head"}}
"""Ray options of work that asks for no core, and so would find room on a head without any."""
ANSWER_S = 10.0
"""How long a cluster may take to answer: one that is starting, or far away."""


@contextmanager
def connected(*, data: bool = True) -> Iterator[None]:
    """Connect for the time of a stage: to RAY_ADDRESS (a job has it set), else to a new local Ray.

    Stays out of the way where the caller has connected already. `data` says that the stage uses Ray
    Data, which takes a second to import.

    Raises:
        InputError: within a minute, if the cluster cannot be used, with the reason; and where one
            ended a task.
    """
    if ray.is_initialized():
        with _of_tasks():
            yield
        return
    address = os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {}
    if address == "local":
        options = {"include_dashboard": False, "_temp_dir": str(closed_folder() / "local")}
    elif "://" not in address:
        address = _detected() if address == "auto" else address
        check_cluster(address)
    stops = signal.getsignal(signal.SIGTERM)
    for attempt in range(ATTEMPTS):
        try:
            _start(address, options)
            break
        except Exception as error:  # Ray has no class of its own for most of what can happen
            late = address == "local" and "timed out during startup" in str(error)
            if not late or attempt == ATTEMPTS - 1:
                raise _sentence(address, error) from error
            ray.shutdown()  # what has started of it
    _hear(stops)  # Ray's own prints the stack of its C++
    if data:
        quiet_data()
    done = threading.Event()
    if address == "local":
        threading.Thread(target=_end_with_ray, args=(done,), daemon=True).start()
    try:
        with _of_tasks():
            yield
    except ray.exceptions.RayError as error:
        if not _is_lost(error):
            raise
        raise Lost(LOST.format(ray._private.worker._global_node.get_logs_dir_path())) from error
    finally:
        done.set()
        # A prefetching thread that is late finds Ray gone, which is no news.
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        ray.shutdown()
        _hear(stops)  # which Ray has taken away, behind Python's back


@contextmanager
def _of_tasks() -> Iterator[None]:
    """Raise the InputError that ended a task as it was: of one in Ray Data the text alone is left,
    among all the rest."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        told = re.findall(r"^(?:\w+\.)*InputError: (.+)$", str(error), re.MULTILINE)
        if not told:
            raise
        raise InputError(told[-1]) from None


def _hear(stops: Any) -> None:
    """Let SIGTERM do what it did before Ray; only a main thread may say so."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stops)


def _start(address: str, options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=True,
            **options,
        )


def _detected() -> str:
    """HOST:PORT of the Ray that RAY_ADDRESS=auto means. Raises InputError if there is none, or more
    than one."""
    try:
        return services.canonicalize_bootstrap_address_or_die("auto")
    except ConnectionError as error:
        raise _sentence("auto", error) from None


def check_cluster(address: str) -> None:
    """Ask the cluster at HOST:PORT who it is, as Ray itself would wait for long and tell little.

    Raises:
        InputError: if none answers, or one that wants another token, Ray or Python.
    """
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isdecimal()):
        raise InputError(
            f"RAY_ADDRESS must be HOST:PORT of a Ray cluster, but got {address!r}; unset it to "
            "work on this machine."
        )
    try:
        theirs = json.loads(_metadata(address) or b"{}")
    except ray.exceptions.AuthenticationError:
        raise InputError(
            "RAY_AUTH_MODE=token needs a token, but there is none; set RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH to that of the cluster."
        ) from None
    except grpc.RpcError as error:
        details = " ".join(str(error.details()).split())
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            has_token = os.environ.get("RAY_AUTH_MODE", "").lower() == "token"
            raise InputError(
                f"The cluster at {address} asks for a token, but "
                + ("ours is another" if has_token else "none was sent")
                + "; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH."
            ) from None
        raise InputError(
            f"RAY_ADDRESS must name a running Ray cluster, but {address} does not answer as one "
            f"({details}); unset it to work on this machine."
        ) from None
    ours = {"ray_version": ray.__version__, "python_version": sys.version.split()[0]}
    for key, name in (("ray_version", "Ray"), ("python_version", "Python")):
        if theirs.get(key, ours[key]) != ours[key]:
            raise InputError(
                f"The cluster must run the {name} of the driver, {ours[key]}, but the one at "
                f"{address} runs {theirs[key]}; install the same here, or submit the job to it."
            )


def _metadata(address: str) -> bytes:
    """JSON of the versions of a cluster; b"" if it does not say. Raises grpc.RpcError."""
    question = gcs_service_pb2.InternalKVGetRequest(key=b"CLUSTER_METADATA", namespace=b"cluster")
    until = time.monotonic() + ANSWER_S
    with init_grpc_channel(address) as channel:
        store = gcs_service_pb2_grpc.InternalKVGcsServiceStub(channel)
        while True:
            left = until - time.monotonic()
            try:
                return store.InternalKVGet(question, timeout=max(1.0, left)).value
            except grpc.RpcError as error:
                if error.code() != grpc.StatusCode.UNAVAILABLE or left < 0:
                    raise
            time.sleep(0.5)


def _sentence(address: str, error: Exception) -> Exception:
    """What a user is told where ray.init failed."""
    reason = " ".join(str(error).split())
    if "timed out during startup" in reason:
        return InputError(
            "Ray must start within 30 seconds, but this machine was twice too busy for that; the "
            "same command continues when there is less to do."
        )
    if address == "local":
        return error
    return InputError(
        f"RAY_ADDRESS must name a running Ray cluster that this machine is a node of, but "
        f"{address} cannot be used ({reason[:300]}); submit the job to it, or unset RAY_ADDRESS to "
        "work on this machine."
    )


def _end_with_ray(done: threading.Event) -> None:
    """End this process soon after its own Ray has died, for which Ray takes pages and minutes.

    Nothing is lost that Ray could still give; what is in output folders is whole.
    """
    node = ray._private.worker._global_node
    logs = node.get_logs_dir_path()
    parts = [p.process for name in ("raylet", "gcs_server") for p in node.all_processes[name]]
    while not done.wait(0.5):
        if any(part.poll() is not None for part in parts):
            print(f"snr: {LOST.format(logs)}; the same command continues.", file=sys.stderr)
            sys.stderr.flush()
            node.kill_all_processes(check_alive=False, allow_graceful=False)
            os._exit(1)


def _is_lost(error: BaseException | None) -> bool:
    """Whether an error came of the death of this machine's raylet."""
    while error is not None:
        if isinstance(error, ray.exceptions.LocalRayletDiedError):
            return True
        error = error.__cause__ or error.__context__
    return False


def closed_folder() -> Path:
    """A folder of this user's that no other enters, for the files of a local Ray.

    Ray opens its own folder to everyone; who may write there could change what workers run.

    Raises:
        InputError: if another user has taken the name.
    """
    folder = SHORT / f"snr-ray-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise InputError(
            f"{folder} must be a folder of this user's, but is a link or belongs to another; "
            "have it removed."
        )
    folder.chmod(0o700)
    return folder


def quiet_data() -> None:
    """Ray Data without its own progress bars and tracebacks: stages report in their own words."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


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
