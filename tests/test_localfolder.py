"""Folders on a file system: what a kill leaves, links, and mounts that are not there."""

import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from snr_ray import localfolder
from snr_ray.address import open_folder
from snr_ray.folder import JOB, NotShared


def test_a_link_is_removed_and_not_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "a").write_text("kept")
    place = open_folder(tmp_path / "out")
    place.write("x", "")
    (tmp_path / "out" / "parts").symlink_to(tmp_path / "theirs")
    place.remove("parts")
    assert place.list() == ["x"]
    assert (tmp_path / "theirs" / "a").read_text() == "kept"


def test_a_folder_takes_the_place_of_a_file(tmp_path: Path) -> None:
    place = open_folder(tmp_path)
    place.write("a", "a file")
    place.write_folder("a", {"x": b"1"})
    assert place.list() == ["a/x"]


def test_of_many_who_write_a_folder_each_writes_it_whole(tmp_path: Path) -> None:
    place = open_folder(tmp_path)
    names = [f"{k}/{j}" for k in range(4) for j in range(4)]

    def write(k: int) -> None:
        for _ in range(5):
            place.write_folder("a", {name: bytes([k]) for name in names})

    threads = [threading.Thread(target=write, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({place.read(f"a/{name}") for name in names}) == 1
    assert place.list() == [f"a/{name}" for name in sorted(names)]
    assert os.listdir(tmp_path) == ["a"]


WRITES = """
import sys
from pathlib import Path
from snr_ray.address import open_folder
place = open_folder(Path(sys.argv[1]))
for k in range(10**6):
    place.write_folder("a", {f"{n // 40}/{n}": bytes([k % 256]) * 4096 for n in range(400)})
    print(k, flush=True)
"""


@pytest.mark.parametrize("after", [0.0, 0.013, 0.031])
def test_who_is_killed_while_a_folder_is_written_leaves_none_that_is_half(
    after: float, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", WRITES, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        for _ in range(3):
            writer.stdout.readline()
        time.sleep(after)
        writer.kill()
    place = open_folder(tmp_path)
    if place.exists("a"):  # not between the old one and the new
        names = place.list("a")
        assert len(names) == 400
        assert len({place.read(name) for name in names}) == 1
    place.sweep()
    assert set(os.listdir(tmp_path)) <= {"a"}


def test_a_folder_that_a_kill_left_is_no_file_and_is_swept(tmp_path: Path) -> None:
    place = open_folder(tmp_path)
    place.write_folder(".0123456789ab.partial", {"0/0": b"1"})
    place.write("a/x", "1")
    assert place.list() == ["a/x"]
    place.sweep()
    assert os.listdir(tmp_path) == ["a"]


def test_the_longest_name_that_a_disk_takes_can_be_written(tmp_path: Path) -> None:
    name = "n" * 251 + ".png"
    open_folder(tmp_path).write(name, "x")
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda out: (out / JOB).unlink(),  # an empty mount point
        lambda out: (out / JOB).write_text("another job"),
        lambda out: out.rename(out.with_name("elsewhere")),  # no mount at all
    ],
)
def test_a_task_writes_only_where_its_job_is(
    spoil: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(localfolder, "MOUNT_S", 0.1)
    out = tmp_path / "out"
    place = open_folder(out)
    place.write(JOB, "this job")
    task = pickle.loads(pickle.dumps(place.claimed()))
    task.write("a/b/0.png", "x")
    task = pickle.loads(pickle.dumps(task))
    spoil(out)
    with pytest.raises(NotShared, match=rf"node {os.uname().nodename} does not see .*{JOB}"):
        task.write("a/b/1.png", "x")
    assert not list(tmp_path.rglob("1.png"))
    assert out.exists() == (not (tmp_path / "elsewhere").exists())


def test_a_mount_that_goes_while_a_task_runs_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(localfolder, "MOUNT_S", 0.1)
    place = open_folder(tmp_path / "out")
    place.write(JOB, "this job")
    task = place.claimed()
    task.write("0.png", "x")
    place.remove(JOB)
    with pytest.raises(NotShared):
        task.write("1.png", "x")


def test_a_file_that_is_late_on_the_network_is_waited_for(tmp_path: Path) -> None:
    place = open_folder(tmp_path / "out")
    place.write(JOB, "this job")
    task = place.claimed()
    place.remove(JOB)
    timer = threading.Timer(0.3, lambda: place.write(JOB, "this job"))
    timer.start()
    task.write("0.png", "x")
    timer.join()
    assert place.exists("0.png")
