"""A cluster of several nodes on this machine: the chain of stages, a killed node, a lost mount."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from ray.cluster_utils import Cluster

from snr_ray.stages.denoise import denoise

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STORE = 100 * 2**20
PATIENCE_S = 240


@dataclass
class Nodes:
    """A head without cores and two nodes of two cores, one with a resource of its own."""

    cluster: Cluster
    workers: list[Any]

    def start(self, *words: object) -> subprocess.Popen[str]:
        """`snr ...` on the cluster, as its head would run it."""
        return subprocess.Popen(
            [sys.executable, "-m", "snr_ray.cli", *map(str, words)],
            env=os.environ | {"RAY_ADDRESS": self.cluster.address},
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, *words: object, status: int = 0) -> str:
        """The same to its end; what it said."""
        job = self.start(*words)
        said = job.communicate(timeout=PATIENCE_S)[0]
        assert job.returncode == status, said
        return said


def _add(cluster: Cluster, **how: Any) -> Any:
    """A node; Ray gives up a start after 30 seconds, which a busy machine may exceed."""
    for attempt in range(3):
        try:
            return cluster.add_node(object_store_memory=STORE, **how)
        except Exception as error:  # Ray has no class of its own for it
            if "timed out during startup" not in str(error) or attempt == 2:
                raise
    raise AssertionError


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    cluster = Cluster()
    _add(cluster, num_cpus=0, include_dashboard=False)
    workers = [_add(cluster, num_cpus=2), _add(cluster, num_cpus=2, resources={"special": 1})]
    yield Nodes(cluster, workers)
    cluster.shutdown()


def _until(there: Callable[[], object]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not there():
        assert time.monotonic() < until
        time.sleep(0.1)


def test_stages_follow_each_other_on_several_nodes(nodes: Nodes, tmp_path: Path) -> None:
    data, run, report = tmp_path / "data", tmp_path / "run", tmp_path / "report"
    small = ("--config", "smoke", "--set", "images.limit=80")
    nodes.run("simulate", *small, "--images", "glyphs", "--out", data)
    two = ("--set", "train.num_workers=2", "--set", "train.steps=8")
    nodes.run("train", *small, *two, "--data", data, "--out", run)
    said = nodes.run("evaluate", "--model", run / "model", "--images", "glyphs", "--out", report,
                     "--baselines", "", "--limit", 4)  # fmt: skip
    assert "4 images scored" in said


def test_results_are_the_same_when_a_node_is_killed(
    nodes: Nodes, tiny: Any, model_folder: Path, image_folder: Path, ray_2_cpus: None,
    tmp_path: Path,
) -> None:  # fmt: skip
    for path in sorted(image_folder.rglob("*.png")):
        for k in range(12):
            shutil.copy(path, path.with_stem(f"{path.stem}-{k}"))
    here, there = tmp_path / "here", tmp_path / "there"
    job = nodes.start("denoise", "--model", model_folder, "--images", image_folder, "--out", there)
    _until(lambda: list(there.rglob("*.png")) or job.poll() is not None)
    victim = nodes.workers.pop()
    nodes.cluster.remove_node(victim, allow_graceful=False)
    killed = time.monotonic()
    said = job.communicate(timeout=PATIENCE_S)[0]
    assert job.returncode == 0, said
    print(f"ended {time.monotonic() - killed:.0f} s after the kill")
    denoise(tiny, model=str(model_folder), images=str(image_folder), out=here)
    names = {path.relative_to(here) for path in here.rglob("*.png")}
    assert len(names) == 24 * 13
    assert {path.relative_to(there) for path in there.rglob("*.png")} == names
    for name in names:
        assert (here / name).read_bytes() == (there / name).read_bytes()
    assert pq.read_table(there / "manifest.parquet").num_rows == len(names)


def _can_hide_folders() -> bool:
    tried = subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False)
    return tried.returncode == 0


@pytest.mark.skipif(not _can_hide_folders(), reason="only root can take a folder from a process")
def test_a_node_without_the_mount_is_named_and_writes_nothing(
    nodes: Nodes, model_folder: Path, tmp_path: Path
) -> None:
    share, elsewhere = tmp_path / "share", tmp_path / "elsewhere"
    share.mkdir()
    elsewhere.mkdir()
    for worker in nodes.workers:
        nodes.cluster.remove_node(worker)
    # The same folder is another one for all processes of this node.
    hide = f"mount --bind {elsewhere} {share} && exec ray start --address={nodes.cluster.address}"
    raylet = subprocess.Popen(
        ["unshare", "-m", "bash", "-c", f"{hide} --block --num-cpus=2"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        said = nodes.run(
            "simulate", "--config", "smoke", "--set", "images.limit=40",
            "--images", "glyphs", "--out", share / "data", status=2,
        )  # fmt: skip
        assert f"node {os.uname().nodename} does not see" in said
        assert "Traceback" not in said
    finally:
        family = [raylet, *psutil.Process(raylet.pid).children(recursive=True)]
        for process in family:
            process.kill()
        raylet.wait()
    assert not list(elsewhere.iterdir())
    assert not list(share.rglob("*.parquet"))
