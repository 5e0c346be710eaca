"""Connecting to Ray: what goes wrong is said in one sentence, and soon; others stay out."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import psutil
import pytest
import ray
from ray._private import services
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from snr_ray.errors import InputError
from snr_ray.stages.job import connection
from snr_ray.stages.job.connection import check_cluster, closed_folder, connected


@pytest.mark.parametrize(
    ("problem", "raised", "said"),
    [
        (
            Exception("The current node timed out during startup. And so on."),
            InputError,
            "too busy",
        ),
        (Exception("Something else."), Exception, "Something else"),
    ],
)
def test_ray_that_does_not_start(
    problem: Exception, raised: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def init(**_: object) -> None:
        tries.append(problem)
        raise problem

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)  # a machine too busy for it cannot be had in a test
    monkeypatch.setattr(ray, "shutdown", lambda: None)  # not of the Ray that other tests share
    with pytest.raises(raised, match=said), connected():
        pytest.fail("there is no cluster")
    assert len(tries) == (2 if said == "too busy" else 1)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_2_cpus")
def test_wrong_input_that_a_task_finds_is_its_sentence() -> None:
    def refuse(_: object) -> object:
        raise InputError("Images must be whole, but one is not.")

    with pytest.raises(InputError, match=r"^Images must be whole, but one is not\.$"), connected():
        ray.data.range(1).map_batches(refuse).materialize()
    with pytest.raises(InputError, match=r"^Images must be whole, but one is not\.$"), connected():
        ray.get(ray.remote(refuse).remote(None))
    with pytest.raises(ray.exceptions.RayTaskError, match="ZeroDivisionError"), connected():
        ray.get(ray.remote(lambda: 1 / 0).remote())


@pytest.fixture
def heads() -> Iterator[Callable[[dict[str, str], str], str]]:
    """Starts what a head answers its drivers with: versions, to those with the token."""
    servers = []

    def start(versions: dict[str, str], token: str) -> str:
        class Store(gcs_service_pb2_grpc.InternalKVGcsServiceServicer):
            def InternalKVGet(self, request, context):
                sent = dict(context.invocation_metadata()).get("authorization")
                if token and sent != f"Bearer {token}":
                    context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
                return gcs_service_pb2.InternalKVGetReply(value=json.dumps(versions).encode())

        server = grpc.server(ThreadPoolExecutor(1))
        gcs_service_pb2_grpc.add_InternalKVGcsServiceServicer_to_server(Store(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(None)


OURS = {"ray_version": ray.__version__, "python_version": sys.version.split()[0]}


def test_a_cluster_like_ours_is_taken(heads: Callable[[dict[str, str], str], str]) -> None:
    check_cluster(heads(OURS, ""))
    check_cluster(heads({}, ""))


@pytest.mark.parametrize(
    ("versions", "said"),
    [
        ({"ray_version": "2.9.0"}, r"must run the Ray of the driver, 2\.\S+, but .* runs 2\.9\.0"),
        ({"python_version": "3.12.1"}, r"the Python of the driver, 3\.\S+, but .* runs 3\.12\.1"),
    ],
)
def test_another_ray_or_python_is_told(
    versions: dict[str, str], said: str, heads: Callable[[dict[str, str], str], str]
) -> None:
    with pytest.raises(InputError, match=said):
        check_cluster(heads(OURS | versions, ""))


def test_no_token_and_a_wrong_one_are_told(
    heads: Callable[[dict[str, str], str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    address = heads(OURS, "feed" * 16)
    with pytest.raises(InputError, match="asks for a token, but ours is another; set RAY_AUTH_MO"):
        check_cluster(address)  # the tests have one of their own
    code = f"""
from snr_ray.errors import InputError
from snr_ray.stages.job.connection import check_cluster
try: check_cluster({address!r})
except InputError as error: print(error)
"""
    without = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}
    for settings, said in (
        ({}, "asks for a token, but none was sent"),
        ({"RAY_AUTH_MODE": "token"}, "RAY_AUTH_MODE=token needs a token, but there is none"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "feed" * 16}, ""),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=without | {"HOME": "/nonexistent"} | settings,
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert said in done.stdout if said else not done.stdout


@pytest.mark.parametrize("last", ["127.0.0.1:9", ""])
def test_a_cluster_that_is_found_dead_is_told_soon(
    last: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(connection, "ANSWER_S", 1.0)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(services, "find_bootstrap_address", lambda folder: last or None)
    monkeypatch.setattr(services, "find_gcs_addresses", set)
    began = time.monotonic()
    said = "127.0.0.1:9 does not answer" if last else "auto cannot be used .*not find any running"
    with pytest.raises(InputError, match=f"^RAY_ADDRESS must .*{said}.* unset "), connected():
        pass
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("kind", ["dead", "silent", "unknown", "http", "no port"])
def test_an_address_without_a_cluster_is_told_soon(
    kind: str, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "ANSWER_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        free = silent.getsockname()[1]
        http = s3_server.split("endpoint_override=")[1].split("&")[0]
        places = {
            "silent": f"127.0.0.1:{free}",
            "unknown": "nowhere.invalid:6379",
            "http": http,
            "no port": "127.0.0.1",
            "dead": "127.0.0.1:9",
        }
        begun = time.monotonic()
        with pytest.raises(InputError, match=r"^RAY_ADDRESS must .*; unset it to work on this"):
            check_cluster(places[kind])
    assert time.monotonic() - begun < 20


def test_the_folder_of_a_local_ray_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "SHORT", tmp_path)
    folder = closed_folder()
    folder.chmod(0o777)  # Ray does this to a folder that it is given
    assert closed_folder().stat().st_mode & 0o777 == 0o700
    folder.rename(tmp_path / "theirs")
    folder.symlink_to(tmp_path / "theirs")
    with pytest.raises(InputError, match="is a link or belongs to another"):
        closed_folder()


STAGE = """
import os, signal, subprocess, sys, threading, time
from snr_ray import cli
import snr_ray.stages.simulation.simulate as simulate
import ray, psutil
from snr_ray.stages.job.connection import connected

def stage(*_, **__):
    with connected():
        ray.get(ray.remote(lambda: 0).remote())
        me = psutil.Process()
        print(os.getpid(), *(p.pid for p in me.children(recursive=True)), flush=True)
        ports = [c.laddr.ip for p in [me, *me.children(recursive=True)]
                 for c in p.net_connections("tcp") if c.status == "LISTEN"]
        print(*ports, flush=True)
        print(ray._private.worker._global_node.get_session_dir_path(), flush=True)
        if "after" not in sys.argv:
            time.sleep(60)
    print("Ray is gone", flush=True)
    time.sleep(60)

simulate.simulate = stage
os.environ.pop("RAY_ADDRESS", None)
sys.exit(cli.main(["simulate", "--images", "glyphs", "--out", "nowhere"]))
"""


@pytest.mark.ray
@pytest.mark.parametrize("how", ["SIGTERM", "SIGTERM after", "raylet"])
def test_a_local_ray_is_closed_and_ends_in_a_sentence(how: str, tmp_path: Path) -> None:
    run = subprocess.Popen(
        [sys.executable, "-c", STAGE, *how.split()[1:]], cwd=tmp_path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert run.stdout
    pids = [int(pid) for pid in run.stdout.readline().split()]
    assert pids, run.communicate()
    listening = set(run.stdout.readline().split())
    session = Path(run.stdout.readline().strip())
    assert {address.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}
    closed = session.parents[1]
    assert closed.stat().st_mode & 0o777 == 0o700
    if how == "SIGTERM after":
        assert run.stdout.readline() == "Ray is gone\n"
    if how.startswith("SIGTERM"):
        run.terminate()
    else:
        next(p for p in map(psutil.Process, pids) if p.name() == "raylet").kill()
    _, said = run.communicate(timeout=60)
    lines = [line for line in said.splitlines() if line]
    if how.startswith("SIGTERM"):
        assert run.returncode == 143
        assert lines == ["snr simulate: interrupted; the same command continues."]
    else:
        assert run.returncode == 1
        assert len(lines) == 1
        assert re.search(
            r"^snr: Ray on this machine has ended, .*; the same command conti", lines[0]
        )
    until = time.monotonic() + 90  # Ray's agent looks for its raylet now and then
    while left := [pid for pid in pids if psutil.pid_exists(pid)]:
        assert time.monotonic() < until, [psutil.Process(pid).cmdline() for pid in left]
        time.sleep(0.2)
