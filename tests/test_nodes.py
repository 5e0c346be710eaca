"""Stages on a cluster of three nodes, of which one is lost.

pytest tests/test_nodes.py                      what every run of the tests has
pytest tests/test_nodes.py -m long -s           each stage as a job that loses a node, and a
                                                denoising job killed in 20 places
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
from dataclasses import dataclass
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
from snr_ray.stages.runlog import metrics_of, read_metrics

pytestmark = pytest.mark.ray

# As many cores each as a node has, so that they are on two.
TWO_WORKERS = ("--set", "train.num_workers=2", "--set", "train.cpus_per_worker=2",
               "--set", "train.steps=40")  # fmt: skip
VIEWS = ("--model", "notmnist", "--views", 20)


def add_workers(nodes: Nodes) -> None:
    """A node of cores, and one that stands for a machine with a GPU."""
    nodes.add("cpu")
    nodes.add("gpu")


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with cluster() as there:
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
from snr_ray.stages.cluster import OFF_HEAD, ON_CORES

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
    write_scans(scans, 600)
    words = ("denoise", *VIEWS, "--images", scans, "--out")
    nodes.run(*words, whole)
    job = nodes.start(*words, broken)
    until(lambda: list(broken.rglob("*.png")), job)
    nodes.lose(nodes.members[1])
    ended(job)
    check_cleaned(broken, whole, 600)
    nodes.add("cpu")


@pytest.mark.long
def test_training_goes_on_from_its_checkpoint_when_a_node_is_killed(
    nodes: Nodes, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = nodes.start(
        "train", "--config", "smoke", *TWO_WORKERS, "--images", "glyphs", "--out", run
    )
    until(lambda: list((run / "checkpoints").glob("step-*")), job)
    first, second = nodes.members[1:]
    assert first.workers("RayTrainWorker")
    assert second.workers("RayTrainWorker")
    nodes.lose(first)
    nodes.add("cpu")
    ended(job)
    steps = [row["step"] for row in read_metrics(run / "metrics.jsonl") if "swap_psnr" in row]
    assert steps == [10, 20, 30, 40]
    assert (run / "model" / "model.safetensors").is_file()


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


# What follows takes long, and is asked for by name.


@pytest.fixture(scope="module")
def jobs() -> Iterator[Nodes]:
    with cluster(jobs=True) as there:
        add_workers(there)
        yield there


def submit(nodes: Nodes, stage: str, *words: object) -> subprocess.Popen[str]:
    """A stage through the Jobs API, as cluster/README.md says."""
    job = ["job", "submit", "--runtime-env", "cluster/runtime_env.yaml", "--working-dir", "."]
    return subprocess.Popen(
        [RAY, *job, "--", "python", f"jobs/{stage}.py", *map(str, words)],
        env=nodes.environment, cwd=REPOSITORY, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """A stage, what is killed of it when, and what must be equal."""

    stage: str
    words: tuple[object, ...]
    begun: str
    """Files of the output folder that tell that it is at work."""
    equal: str
    """Files that must be those of an unbroken run."""


def trials(folder: Path) -> list[Trial]:
    """The chain of stages; each reads what those before it wrote unbroken."""
    small = ("--config", "smoke")
    run = folder / "train"
    return [
        Trial("simulate", (*small, "--images", "glyphs"), "train/*.parquet", "*/*.parquet"),
        Trial("train", (*small, *TWO_WORKERS, "--data", folder / "simulate"),
              "checkpoints/step-*", "model/model.safetensors"),
        # For two objectives no trial is ended early, which depends on what others know by then.
        Trial("sweep", (*small, "--data", folder / "simulate", "--trials", 3,
                        "--set", "sweep.steps=90", "--objective", "swap", "--objective", "inject"),
              "trials/*/checkpoints/step-*", "trials/*/model/model.safetensors"),
        Trial("denoise", (*VIEWS, "--images", folder / "scans"), "*/*.png", "*/*.png"),
        Trial("evaluate", ("--model", run / "model", "--images", "glyphs", "--limit", 60,
                           "--baselines", ""), "job.json", "metrics.json"),
    ]  # fmt: skip


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_job_of_each_stage_loses_a_node(jobs: Nodes, tmp_path: Path) -> None:
    write_scans(tmp_path / "scans", 1500)
    rows = []
    for trial in trials(tmp_path):
        took = []
        for name in (trial.stage, f"{trial.stage}-broken"):
            out, since = tmp_path / name, time.monotonic()
            job = submit(jobs, trial.stage, *trial.words, "--out", out)
            if name != trial.stage:
                until(lambda out=out, trial=trial: list(out.glob(trial.begun)), job)
                hit = max(jobs.members[1:], key=lambda node: node.busy)
                jobs.lose(hit)
                jobs.add(hit.pool)
            ended(job)
            took.append(time.monotonic() - since)
        equal = same(tmp_path / f"{trial.stage}-broken", tmp_path / trial.stage, trial.equal)
        rows.append((trial.stage, took[0], took[1] - took[0], equal))
        print("| {} | the raylet of a node | {:.0f} | {:+.0f} | {} |".format(*rows[-1]), flush=True)
    assert all(equal for *_, equal in rows)
    ids = pq.read_table(tmp_path / "denoise-broken" / "manifest.parquet")["id"].to_pylist()
    assert len(ids) == len(set(ids)) == 1500


@pytest.fixture
def wire() -> Iterator[Cable]:
    with contextlib.ExitStack() as stack:
        try:
            laid = stack.enter_context(cable())
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("only root can make a network namespace")
        yield laid


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_node_whose_packets_are_dropped_is_given_up(wire: Cable, tmp_path: Path) -> None:
    scans, whole, broken = tmp_path / "scans", tmp_path / "whole", tmp_path / "broken"
    write_scans(scans, 4000)
    words = ("denoise", *VIEWS, "--images", scans, "--out")
    with cluster(host=wire.here) as nodes:
        nodes.add("cpu")
        nodes.add("gpu", before=wire.inside, at=wire.there)
        since = time.monotonic()
        nodes.run(*words, whole)
        unbroken = time.monotonic() - since
        job = nodes.start(*words, broken)
        until(lambda: nodes.members[2].workers("_clean") and list(broken.rglob("*.png")), job)
        since = time.monotonic()
        wire.cut()
        ended(job)
        print(f"cut off: ended {time.monotonic() - since:.0f} s later, of {unbroken:.0f} s")
    check_cleaned(broken, whole, 4000)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_bucket_is_storage_enough_for_several_nodes(
    bucket: tuple[pafs.FileSystem, str], tmp_path: Path
) -> None:
    """Data, a run and scans in a bucket; a denoising job from it to it that loses a node."""
    store, query = bucket
    small, scans, whole = ("--config", "smoke"), tmp_path / "in", tmp_path / "out"
    run = open_folder(f"s3://bucket/run?{query}")
    write_scans(scans, 1500)
    for folder in ("a", "b"):
        store.create_dir(f"bucket/scans/{folder}")
    pafs.copy_files(str(scans), "bucket/scans", destination_filesystem=store)

    def cleaned() -> dict[str, bytes]:
        found = store.get_file_info(
            pafs.FileSelector("bucket/clean", allow_not_found=True, recursive=True)
        )
        paths = [info.path for info in found if info.path.endswith(".png")]
        return {path.removeprefix("bucket/clean/"): _read(store, path) for path in paths}

    with cluster() as nodes:
        add_workers(nodes)
        data = f"s3://bucket/data?{query}"
        nodes.run("simulate", *small, "--images", "glyphs", "--out", data)
        nodes.run("train", *small, *TWO_WORKERS, "--data", data, "--out", run)
        nodes.run("denoise", *VIEWS, "--images", scans, "--out", whole)
        words = ("--images", f"s3://bucket/scans?{query}", "--out", f"s3://bucket/clean?{query}")
        job = nodes.start("denoise", *VIEWS, *words)
        until(lambda: len(cleaned()) > 0, job)
        nodes.lose(nodes.members[1])
        nodes.add("cpu")
        ended(job)
    steps = [row["step"] for row in metrics_of(run) if "swap_psnr" in row]
    assert steps == [10, 20, 30, 40]
    assert run.exists("model/model.safetensors")
    assert cleaned() == {
        str(path.relative_to(whole)): path.read_bytes() for path in whole.rglob("*.png")
    }
    assert len(cleaned()) == 1500


def _read(store: pafs.FileSystem, path: str) -> bytes:
    with store.open_input_file(path) as file:
        return bytes(file.read())


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_denoising_bears_kills_anywhere(
    nodes: Nodes, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    scans, whole = tmp_path / "scans", tmp_path / "whole"
    write_scans(scans, 4000)
    words = ("denoise", *VIEWS, "--images", scans, "--out")
    since = time.monotonic()
    nodes.run(*words, whole)
    unbroken = time.monotonic() - since
    print(f"unbroken: {unbroken:.0f} s", flush=True)
    for k in range(pytestconfig.getoption("rounds")):
        draw, out = random.Random(hash64(f"kill/{k}")), tmp_path / f"{k}"
        victim = draw.choice(["driver", "worker", "raylet"])
        since = time.monotonic()
        job = nodes.start(*words, out)
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.wait(draw.uniform(0.1, 0.9) * unbroken)
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
        check_cleaned(out, whole, 4000)
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


@pytest.mark.long
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
