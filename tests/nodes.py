"""A Ray cluster of several nodes on this machine: a `ray start` each, lost as machines are."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from ray._raylet import GcsClient

REPOSITORY = Path(__file__).parents[1]
RAY = Path(sys.executable).with_name("ray")
STORE = 100 * 2**20
PATIENCE_S = 600
ATTEMPTS = 6
"""Ray gives up a start after 30 seconds, and its raylet after 15, which a busy machine exceeds."""
HERE = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",  # nodes; conftest.py keeps to loopback
    "RAY_AUTH_MODE": "disabled",
    "RAY_grpc_client_keepalive_time_ms": "15000",
    "RAY_grpc_client_keepalive_timeout_ms": "10000",
    "RAY_memory_monitor_refresh_ms": "0",  # the machine's memory may be others'
    "RAY_agent_register_timeout_ms": "200000",  # these two as a busy machine needs them
    "RAY_worker_register_timeout_seconds": "200",
    "AWS_ACCESS_KEY_ID": "test",  # without keys a client asks in another form, which moto misreads
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_EC2_METADATA_DISABLED": "true",
    "OMP_WAIT_POLICY": "PASSIVE",  # nodes have more cores than the machine: who spins holds them up
    "PATH": f"{RAY.parent}{os.pathsep}{os.environ['PATH']}",  # jobs say `python`
}


@dataclass
class Node:
    """One `ray start --block` and all that it has started."""

    process: subprocess.Popen[bytes]
    pool: str
    """Its label."""

    @property
    def raylet(self) -> psutil.Process:
        """The process that is the node."""
        return next(one for one in self._family() if one.name() == "raylet")

    def workers(self, task: str) -> list[psutil.Process]:
        """Processes that are at a task or actor of this name just now."""
        return [one for one in self._family() if _title(one).startswith(f"ray::{task}")]

    @property
    def busy(self) -> int:
        """How many processes are at some task or actor."""
        idle = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
        titles = [_title(one) for one in self._family()]
        return sum(title.startswith("ray::") and not title.startswith(idle) for title in titles)

    def kill(self) -> None:
        """SIGKILL to the raylet: its workers end with it, as when a machine is lost."""
        self.raylet.kill()
        self.process.wait(PATIENCE_S)

    def stop(self) -> None:
        """End all that is left."""
        for one in [*self._family(), self.process]:
            with suppress(psutil.Error):
                one.kill()
        self.process.wait()

    def _family(self) -> list[psutil.Process]:
        if self.process.poll() is not None:
            return []
        return psutil.Process(self.process.pid).children(recursive=True)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""  # it has ended meanwhile


@dataclass
class Nodes:
    """A head without cores, and nodes that come and go."""

    folder: Path
    """Ray's own; short, for the paths of its sockets."""
    port: int
    dashboard: int | None
    """Port for jobs, if there are to be any."""
    host: str = "127.0.0.1"
    """Address of the head."""
    members: list[Node] = field(default_factory=list)
    """The head first."""
    jobs: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """Of a driver on the head."""
        jobs = {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{self.dashboard}"}
        return os.environ | HERE | {"RAY_ADDRESS": self.address} | (jobs if self.dashboard else {})

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def add(
        self, pool: str, *, cpus: int = 2, before: Sequence[str | Path] = (), at: str | None = None,
        more: Sequence[str] = (), environment: dict[str, str] | None = None,
    ) -> Node:  # fmt: skip
        """A node more; `before` are words of a program that starts it, such as unshare's, `at` is
        its address, if it is not the head's, and `more` and `environment` are for `ray start`."""
        there = self.alive()
        # A folder each, as machines have: a node unpacks the files of a job anew over those that
        # are there, and so would take them from under the workers of the others.
        own = tempfile.mkdtemp(prefix="", dir=self.folder)
        words = [f"--num-cpus={cpus}", f"--labels=pool={pool}", f"--temp-dir={own}",
                 f"--node-ip-address={at or self.host}", *more]  # fmt: skip
        if there:
            words.append(f"--address={self.address}")
        else:
            words += ["--head", f"--port={self.port}",
                      f"--include-dashboard={self.dashboard is not None}",
                      f"--dashboard-port={self.dashboard or 0}",
                      f"--ray-client-server-port={free_port()}"]  # fmt: skip
        for _ in range(ATTEMPTS):
            log = self.folder / f"node{time.monotonic_ns()}.log"
            with log.open("wb") as said:
                node = Node(
                    subprocess.Popen(
                        [*map(str, before), str(RAY), "start", "--block", *words,
                         "--disable-usage-stats", f"--object-store-memory={STORE}",
                         f"--dashboard-agent-listen-port={free_port()}"],
                        env=os.environ | HERE | (environment or {}),
                        stdout=said, stderr=said, start_new_session=True,
                    ),
                    pool,
                )  # fmt: skip
            with suppress(AssertionError):
                until(lambda: self.alive() > there, node.process)
                self.members.append(node)
                return node
            node.stop()
        raise AssertionError(log.read_text())

    def lose(self, node: Node) -> None:
        """Kill a node; returns once the cluster knows."""
        there = self.alive()
        node.kill()
        self.members.remove(node)
        until(lambda: self.alive() < there, self.members[0].process)

    def alive(self) -> int:
        """Nodes that the cluster has."""
        if not is_open(self.port, self.host):
            return 0
        try:
            known = GcsClient(address=self.address).get_all_node_info(timeout=10)
        except Exception:  # Ray has no class of its own for a head that is not up yet
            return 0
        return sum(node.state == 0 for node in known.values())

    def start(self, *words: object) -> subprocess.Popen[str]:
        """`snr ...` on the head."""
        job = subprocess.Popen(
            [sys.executable, "-m", "snr_ray.cli", *map(str, words)], env=self.environment,
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        self.jobs.append(job)
        return job

    def run(self, *words: object, status: int = 0) -> str:
        """The same to its end; what it said."""
        return ended(self.start(*words), status)


@contextmanager
def cluster(
    *,
    jobs: bool = False,
    host: str = "127.0.0.1",
    head: Callable[[Nodes], dict[str, Any]] = lambda nodes: {},
) -> Iterator[Nodes]:
    """A head without cores; `jobs` may be submitted to it, which takes Ray's dashboard. `head`
    answers with more that `Nodes.add` needs to start it."""
    folder = Path(tempfile.mkdtemp(prefix="snr-", dir="/tmp"))
    nodes = Nodes(folder, free_port(), free_port() if jobs else None, host)
    try:
        nodes.add("head", cpus=0, **head(nodes))
        yield nodes
    finally:
        for job in nodes.jobs:
            if job.poll() is None:  # its test has failed
                os.killpg(job.pid, signal.SIGKILL)
                job.communicate()
        for node in reversed(nodes.members):
            node.stop()
        shutil.rmtree(folder)


def ended(job: subprocess.Popen[str], status: int = 0) -> str:
    """What a job said, once it has ended with this status."""
    try:
        said = job.communicate(timeout=PATIENCE_S)[0]
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        said = "(it did not end) " + job.communicate()[0]
    assert job.returncode == status, said
    return said


def until(there: Callable[[], object], job: "subprocess.Popen[Any]") -> None:
    """Wait for something while a job runs."""
    late = time.monotonic() + PATIENCE_S
    while not there():
        assert time.monotonic() < late
        assert job.poll() is None, job.stdout.read() if job.stdout else job.returncode
        time.sleep(0.1)


_PORTS = iter(range(6600 + os.getpid() % 2000, 9990))


def free_port() -> int:
    """A port below those that Ray gives to workers; another each time."""
    return next(port for port in _PORTS if not is_open(port))


def is_open(port: int, host: str = "127.0.0.1") -> bool:
    """Whether somebody listens there."""
    with socket.socket() as asked:
        return asked.connect_ex((host, port)) == 0


@dataclass(frozen=True)
class Cable:
    """Between this machine and one in a network namespace of its own."""

    name: str
    """Of the namespace, and of both ends of the cable."""
    here: str
    there: str

    @property
    def inside(self) -> list[str]:
        """Words before a program that runs on the other machine."""
        return ["ip", "netns", "exec", self.name]

    def cut(self) -> None:
        """From now on packets are dropped in both directions, without a word to who sent them:
        they go to a machine that is not there."""
        nobody = ["lladdr", "02:00:00:00:00:99", "dev", self.name, "nud", "permanent"]
        _ip("neigh", "replace", self.there, *nobody)
        _ip("-n", self.name, "neigh", "replace", self.here, *nobody)


@contextmanager
def cable() -> Iterator[Cable]:
    """A machine beside this one; only root may make one."""
    number = os.getpid() % 200
    wire = Cable(f"snr{os.getpid()}", f"10.231.{number}.1", f"10.231.{number}.2")
    _ip("netns", "add", wire.name)
    try:
        _ip("link", "add", wire.name, "type", "veth", "peer", wire.name, "netns", wire.name)
        for where, address in (([], wire.here), (["-n", wire.name], wire.there)):
            _ip(*where, "addr", "add", f"{address}/30", "dev", wire.name)
            _ip(*where, "link", "set", wire.name, "up")
        _ip("-n", wire.name, "link", "set", "lo", "up")
        yield wire
    finally:
        _ip("netns", "del", wire.name)  # and the cable with it


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
