"""Stages on a cluster of three nodes, of which one is lost.

pytest tests/test_nodes.py -s                 with the seconds that a lost node costs each stage
pytest tests/test_nodes.py -k anywhere --rounds 20 -s         a denoising job killed 20 times
"""

import contextlib
import filecmp
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from nodes import RAY, REPOSITORY, Cable, Nodes, cable, cluster, ended, until
from PIL import Image

from snr_ray.address import open_folder
from snr_ray.config import Config
from snr_ray.hashing import hash64
from snr_ray.images.sources import open_source
from snr_ray.noise.operator import NoiseSpec, noise_operator
from snr_ray.stages.training.runlog import read_metrics

pytestmark = pytest.mark.ray

# As many cores each as a node has, so that they are on two.
TWO_WORKERS = ("--set", "train.num_workers=2", "--set", "train.cpus_per_worker=2")
SMALL = ("--config", "smoke")
VIEWS = ("--model", "notmnist", "--views", 20)
SCANS = 600


def add_workers(nodes: Nodes) -> None:
    """A node of cores, and one that stands for a machine with a GPU."""
    nodes.add("cpu")
    nodes.add("gpu")


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with cluster(jobs=True) as there:
        add_workers(there)
        yield there


def write_scans(folder: Path, count: int) -> None:
    """Glyphs of 28 pixels with the noise of 20 views, as 8-bit PNG."""
    source, noise = open_source("glyphs"), noise_operator(NoiseSpec(20), 28, 28)
    config = Config().images
    (folder / "a").mkdir(parents=True)
    (folder / "b").mkdir()
    for k in range(count):
        image = noise(source.load(k, config)[None])[0, 0]
        pixels = (255 * image.clip(0, 1)).round().astype(np.uint8)
        Image.fromarray(pixels).save(folder / "ab"[k % 2] / f"{k:04d}.png")


def same(one: Path, other: Path, pattern: str) -> bool:
    """Whether two folders have the same files of this pattern, and more than none."""
    names = {path.relative_to(one) for path in one.rglob(pattern)}
    assert {path.relative_to(other) for path in other.rglob(pattern)} == names
    return bool(names) and all(_equal(one / name, other / name) for name in names)


def _equal(one: Path, other: Path) -> bool:
    """Whether two files are the same; of scores, all but the seconds that they took."""
    if one.name != "metrics.json":
        return filecmp.cmp(one, other, shallow=False)
    lines = [
        [x for x in path.read_text().splitlines() if "seconds" not in x] for path in (one, other)
    ]
    return lines[0] == lines[1]


def check_cleaned(out: Path, as_in: Path, count: int) -> None:
    """The files of an unbroken job to the bit, and a row for each."""
    assert same(out, as_in, "*.png")
    ids = pq.read_table(out / "manifest.parquet")["id"].to_pylist()
    assert len(ids) == len(set(ids)) == count


WHERE = """
import collections, json, time
import ray
from snr_ray.stages.job.connection import OFF_HEAD, ON_CORES

def pool(*_):
    time.sleep(1)
    return ray.get_runtime_context().get_node_labels()["pool"]

def pools(count, **options):
    return collections.Counter(ray.get([ray.remote(pool).options(**options).remote()
                                        for _ in range(count)]))

ray.init(log_to_driver=False)
print(json.dumps([
    pools(2, num_cpus=1, **ON_CORES),
    pools(4, num_cpus=1, **ON_CORES),
    pools(4, num_cpus=0, scheduling_strategy="SPREAD", **OFF_HEAD),
    pools(1, num_cpus=0),
]))
"""


def test_work_is_placed_by_labels(nodes: Nodes) -> None:
    asked = subprocess.run(
        [sys.executable, "-c", WHERE], env=nodes.environment, capture_output=True, text=True
    )
    assert asked.returncode == 0, asked.stderr
    few, full, trials, drivers = json.loads(asked.stdout.splitlines()[-1])
    assert few == {"cpu": 2}
    assert full["cpu"] >= 2  # a task of the GPU node's cores only where the others are taken
    assert "head" not in full | trials
    assert drivers == {"head": 1}  # the same without OFF_HEAD


def test_denoising_goes_on_when_a_node_is_killed(nodes: Nodes, tmp_path: Path) -> None:
    scans, whole, broken = tmp_path / "scans", tmp_path / "whole", tmp_path / "broken"
    write_scans(scans, SCANS)
    words = ("denoise", *VIEWS, "--images", scans, "--out")
    nodes.run(*words, whole)
    job = nodes.start(*words, broken)
    until(lambda: list(broken.rglob("*.png")), job)
    nodes.lose(nodes.members[1])
    ended(job)
    check_cleaned(broken, whole, SCANS)
    nodes.add("cpu")


def _can_hide_folders() -> bool:
    tried = subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False)
    return tried.returncode == 0


@pytest.mark.skipif(not _can_hide_folders(), reason="only root can take a folder from a process")
def test_a_node_without_the_mount_is_named_and_writes_nothing(tmp_path: Path) -> None:
    scans, share, elsewhere = tmp_path / "scans", tmp_path / "share", tmp_path / "elsewhere"
    write_scans(scans, 24)
    share.mkdir()
    elsewhere.mkdir()
    # For all processes of the node the folder is another one.
    hide = f'mount --bind {elsewhere} {share} && exec "$@"'
    with cluster() as nodes:
        nodes.add("cpu", before=["unshare", "-m", "bash", "-c", hide, "hide"])
        jobs = [
            ("simulate", "--config", "smoke", "--images", "glyphs"),
            ("denoise", *VIEWS, "--images", scans),
        ]
        for job in jobs:
            said = nodes.run(*job, "--out", share / job[0], status=2)
            assert f"node {os.uname().nodename} does not see {share / job[0]}" in said
            assert "Traceback" not in said
    assert not list(elsewhere.iterdir())
    assert not list(share.rglob("*.png"))
    assert not list((share / "simulate").rglob("*.parquet"))


def submit(nodes: Nodes, stage: str, *words: object) -> subprocess.Popen[str]:
    """A stage through the Jobs API, as cluster/README.md says."""
    job = ["job", "submit", "--runtime-env", "cluster/runtime_env.yaml", "--working-dir", "."]
    started = subprocess.Popen(
        [RAY, *job, "--", "python", f"jobs/{stage}.py", *map(str, words)],
        env=nodes.environment, cwd=REPOSITORY, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    nodes.jobs.append(started)
    return started


@dataclass(frozen=True)
class Trial:
    """A stage, what is killed of it when, and what must be equal."""

    words: tuple[object, ...]
    begun: str
    """Files of the output folder that tell that it is at work."""
    equal: str
    """Files that must be those of an unbroken run."""
    reads: str | None = None
    """The stage before it, whose results it reads."""


@dataclass
class Chain:
    """The stages, of which each reads what those before it wrote unbroken."""

    nodes: Nodes
    folder: Path
    seconds: dict[str, float] = field(default_factory=dict)
    """What each took unbroken."""

    def __post_init__(self) -> None:
        write_scans(self.folder / "scans", SCANS)

    def trial(self, stage: str) -> Trial:
        data, model = self.folder / "simulate", self.folder / "train" / "model"
        return {
            "simulate": Trial((*SMALL, "--images", "glyphs"), "train/*.parquet", "*/*.parquet"),
            "train": Trial(
                (*SMALL, *TWO_WORKERS, "--data", data),
                "checkpoints/step-*", "model/model.safetensors", "simulate",
            ),
            # For two objectives no trial is ended early, which depends on what others know by then.
            "sweep": Trial(
                (*SMALL, "--data", data, "--trials", 3,
                 "--objective", "swap", "--objective", "inject"),
                "trials/*/checkpoints/step-*", "trials/*/model/model.safetensors", "simulate",
            ),
            "denoise": Trial((*VIEWS, "--images", self.folder / "scans"), "*/*.png", "*/*.png"),
            "evaluate": Trial(
                ("--model", model, "--images", "glyphs", "--limit", 30, "--baselines", ""),
                "job.json", "metrics.json", "train",
            ),
        }[stage]  # fmt: skip

    def unbroken(self, stage: str) -> Path:
        """Results of a stage that lost nothing, made once."""
        out, trial = self.folder / stage, self.trial(stage)
        if stage not in self.seconds:
            if trial.reads:
                self.unbroken(trial.reads)
            since = time.monotonic()
            self.nodes.run(stage, *trial.words, "--out", out)
            self.seconds[stage] = time.monotonic() - since
        return out


@pytest.fixture(scope="module")
def chain(nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return Chain(nodes, tmp_path_factory.mktemp("chain"))


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("stage", ["simulate", "train", "sweep", "denoise", "evaluate"])
def test_a_job_of_each_stage_loses_a_node(chain: Chain, stage: str) -> None:
    nodes, trial, out = chain.nodes, chain.trial(stage), chain.folder / f"{stage}-broken"
    whole, since = chain.unbroken(stage), time.monotonic()
    job = submit(nodes, stage, *trial.words, "--out", out)
    until(lambda: list(out.glob(trial.begun)), job)
    if stage == "train":
        assert all(node.workers("RayTrainWorker") for node in nodes.members[1:])
    hit = max(nodes.members[1:], key=lambda node: node.busy)
    nodes.lose(hit)
    nodes.add(hit.pool)
    ended(job)
    took, unbroken = time.monotonic() - since, chain.seconds[stage]
    print(f"| {stage} | the raylet of a node | {unbroken:.0f} | {took - unbroken:+.0f} |")
    assert same(out, whole, trial.equal)
    if stage == "train":
        steps = [row["step"] for row in read_metrics(out / "metrics.jsonl") if "swap_psnr" in row]
        assert steps == [10, 20]
    if stage == "denoise":
        check_cleaned(out, whole, SCANS)


@pytest.fixture
def wire() -> Iterator[Cable]:
    with contextlib.ExitStack() as stack:
        try:
            laid = stack.enter_context(cable())
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("only root can make a network namespace")
        yield laid


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_node_whose_packets_are_dropped_is_given_up(
    chain: Chain, wire: Cable, tmp_path: Path
) -> None:
    whole = chain.unbroken("denoise")
    with cluster(host=wire.here) as nodes:
        nodes.add("cpu")
        nodes.add("gpu", before=wire.inside, at=wire.there)
        job = nodes.start("denoise", *chain.trial("denoise").words, "--out", tmp_path)
        until(lambda: nodes.members[2].workers("_clean") and list(tmp_path.rglob("*.png")), job)
        since = time.monotonic()
        wire.cut()
        ended(job)
    unbroken = chain.seconds["denoise"]
    print(f"cut off: ended {time.monotonic() - since:.0f} s later, of {unbroken:.0f} s")
    check_cleaned(tmp_path, whole, SCANS)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_bucket_is_storage_enough_for_several_nodes(
    chain: Chain, bucket: tuple[pafs.FileSystem, str]
) -> None:
    """Data, a run and scans in a bucket; a denoising job from it to it that loses a node."""
    store, query = bucket
    nodes = chain.nodes
    data, run = f"s3://bucket/data?{query}", open_folder(f"s3://bucket/run?{query}")
    for folder in ("a", "b"):
        store.create_dir(f"bucket/scans/{folder}")
    pafs.copy_files(str(chain.folder / "scans"), "bucket/scans", destination_filesystem=store)

    def cleaned() -> dict[str, bytes]:
        found = store.get_file_info(
            pafs.FileSelector("bucket/clean", allow_not_found=True, recursive=True)
        )
        paths = [info.path for info in found if info.path.endswith(".png")]
        return {path.removeprefix("bucket/clean/"): _read(store, path) for path in paths}

    nodes.run("simulate", *SMALL, "--images", "glyphs", "--out", data)
    nodes.run("train", *SMALL, *TWO_WORKERS, "--data", data, "--out", run)
    words = ("--images", f"s3://bucket/scans?{query}", "--out", f"s3://bucket/clean?{query}")
    job = nodes.start("denoise", *VIEWS, *words)
    until(lambda: len(cleaned()) > 0, job)
    hit = nodes.members[1]
    nodes.lose(hit)
    nodes.add(hit.pool)
    ended(job)
    weights = "model/model.safetensors"
    assert run.read(weights) == (chain.unbroken("train") / weights).read_bytes()
    whole = chain.unbroken("denoise")
    assert cleaned() == {
        str(path.relative_to(whole)): path.read_bytes() for path in whole.rglob("*.png")
    }
    assert len(cleaned()) == SCANS


def _read(store: pafs.FileSystem, path: str) -> bytes:
    with store.open_input_file(path) as file:
        return bytes(file.read())


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_denoising_bears_kills_anywhere(
    chain: Chain, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    nodes, whole = chain.nodes, chain.unbroken("denoise")
    words = ("denoise", *chain.trial("denoise").words, "--out")
    print(f"unbroken: {chain.seconds['denoise']:.0f} s", flush=True)
    for k in range(pytestconfig.getoption("rounds")):
        draw, out = random.Random(hash64(f"kill/{k}")), tmp_path / f"{k}"
        victim = draw.choice(["driver", "worker", "raylet"])
        since, there = time.monotonic(), draw.uniform(0.0, 0.8) * SCANS
        job = nodes.start(*words, out)
        until(lambda out=out, there=there: len(list(out.rglob("*.png"))) >= there, job)
        at, n_done = time.monotonic() - since, len(list(out.rglob("*.png")))
        if victim == "driver":
            job.kill()
            job.communicate()
            nodes.run(*words, out)
        else:
            hit = draw.choice(nodes.members[1:])
            if victim == "worker":
                until(lambda hit=hit, job=job: hit.workers("_clean") or job.poll() is not None, job)
                for worker in hit.workers("_clean")[:1]:
                    worker.kill()
            else:
                nodes.lose(hit)
                nodes.add(hit.pool)
            ended(job)
        took = time.monotonic() - since
        check_cleaned(out, whole, SCANS)
        print(f"{k}: {victim} killed after {at:.0f} s with {n_done} images done, ended after "
              f"{took:.0f} s, all equal", flush=True)  # fmt: skip
        shutil.rmtree(out)


IN_SECRET = """
import os, subprocess, sys
from nodes import cluster
with cluster() as nodes:
    nodes.add("cpu")
    print(nodes.run(*sys.argv[1:]))
    plain = {k: v for k, v in nodes.environment.items() if not k.startswith("RAY_TLS")}
    subprocess.run(
        [sys.executable, "-m", "snr_ray.cli", *sys.argv[1:], "--overwrite"],
        env=plain | {"RAY_USE_TLS": "0"}, stderr=sys.stdout,
    )
"""


def blocks(heading: str) -> list[str]:
    """Commands under a heading of cluster/README.md."""
    page = (REPOSITORY / "cluster" / "README.md").read_text()
    section = page.partition(f"\n### {heading}\n")[2].partition("\n## ")[0]
    return section.split("```")[1::2]


@pytest.mark.slow
def test_channels_are_encrypted_by_the_commands_of_the_page(tmp_path: Path) -> None:
    commands = "set -e\n" + "\n".join(blocks("Encrypted channels")) + "\nenv -0"
    made = subprocess.run(
        ["bash", "-c", commands], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    secret = dict(line.split("=", 1) for line in made.stdout.split("\0") if "=" in line)
    write_scans(tmp_path / "scans", 24)
    words = ["denoise", *VIEWS, "--images", tmp_path / "scans", "--out", tmp_path / "out"]
    # Another process, as Ray reads how it is to connect once.
    tried = subprocess.run(
        [sys.executable, "-c", IN_SECRET, *map(str, words)],
        env=secret | {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert tried.returncode == 0, tried.stdout + tried.stderr
    assert f"24 images in {tmp_path / 'out'}" in tried.stdout
    assert "does not answer as one" in tried.stdout  # to who has no certificate
