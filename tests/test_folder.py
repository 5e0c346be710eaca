"""Output places: the same words for a folder and for a bucket; whole files, claims, secrets."""

import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from snr_ray import folder as folders
from snr_ray.config import InputError
from snr_ray.folder import (
    JOB,
    Folder,
    LocalFolder,
    NotShared,
    open_folder,
    within,
    without_secrets,
)


@pytest.fixture(params=["local", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """An output place that nothing lies in, of either kind."""
    if request.param == "local":
        return open_folder(tmp_path / "out")
    _, query = request.getfixturevalue("bucket")
    return open_folder(f"s3://key:secret@bucket/runs/out?{query}")


def test_what_is_written_is_read(place: Folder) -> None:
    assert place.empty()
    assert not place.exists()
    assert place.list() == []
    assert place.list("a") == []
    place.write("a/b c#1.txt", "ä")
    place.write("z", b"1", durable=True)
    place.write("z", b"2")
    assert place.read("a/b c#1.txt").decode() == "ä"
    assert place.read("z") == b"2"
    assert place.list() == ["a/b c#1.txt", "z"]
    assert place.list("a") == ["a/b c#1.txt"]
    assert place.exists("a")
    assert place.exists("a/b c#1.txt")
    assert not place.exists("a/b")
    assert not place.empty()
    inner = place.join("a")
    assert inner.read("b c#1.txt") == place.read("a/b c#1.txt")
    assert str(inner).split("?")[0] == str(place).split("?")[0] + "/a"
    fs, root = place.filesystem()
    with fs.open_input_stream(f"{root}/z") as stream:
        assert stream.read() == b"2"
    with pytest.raises(FileNotFoundError):
        place.read("none")


def test_what_is_removed_is_gone(place: Folder) -> None:
    for name in ("a/b/c", "a/d", "e", "f"):
        place.write(name, name)
    for name in ("a", "e", "none"):
        place.remove(name)
    assert place.list() == ["f"]


def test_a_link_is_removed_and_not_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "a").write_text("kept")
    place = open_folder(tmp_path / "out")
    place.write("x", "")
    (tmp_path / "out" / "parts").symlink_to(tmp_path / "theirs")
    place.remove("parts")
    assert place.list() == ["x"]
    assert (tmp_path / "theirs" / "a").read_text() == "kept"


def test_a_file_appears_whole_or_not_at_all(place: Folder) -> None:
    place.write("big", "old")

    def killed() -> None:
        with place.writing("big") as path:
            path.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        killed()
    assert place.read("big") == b"old"
    with place.writing("big") as path:
        path.write_text("new")
        assert place.read("big") == b"old"
    assert place.read("big") == b"new"
    assert place.list() == ["big"]  # nothing is left of either


def test_a_folder_is_written_in_place_of_what_was_there(place: Folder) -> None:
    place.write("keep", "k")
    place.write_folder("in/a.zarr", {"0/0.0": b"1", "0/1.0": b"2", ".zattrs": b"first"})
    assert place.list() == ["in/a.zarr/.zattrs", "in/a.zarr/0/0.0", "in/a.zarr/0/1.0", "keep"]
    place.write_folder("in/a.zarr", {"1/0.0": b"3", ".zattrs": b"second"})
    assert place.list("in") == ["in/a.zarr/.zattrs", "in/a.zarr/1/0.0"]
    assert place.read("in/a.zarr/.zattrs") == b"second"
    with pytest.raises(InputError, match="must stay inside"):
        place.write_folder("b", {"../x": b"", "y": b""})
    assert not place.exists("b")
    assert place.list() == ["in/a.zarr/.zattrs", "in/a.zarr/1/0.0", "keep"]


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


@pytest.mark.parametrize("at", ["0/1.0", ".zattrs"])
def test_a_folder_that_could_not_be_finished_is_not_there(
    at: str, place: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"0/0.0": b"1", "0/1.0": b"2", ".zattrs": b"{}"}
    if place.local is not None:
        real_bytes = Path.write_bytes

        def write_bytes(path: Path, data: bytes) -> int:
            if path.as_posix().endswith(at):
                raise OSError("the disk is gone")
            return real_bytes(path, data)

        monkeypatch.setattr(Path, "write_bytes", write_bytes)
    else:
        real = type(place).write

        def write(self: Folder, name: str, data: bytes) -> None:
            if name.endswith(at):
                raise OSError("the bucket is gone")
            real(self, name, data)

        monkeypatch.setattr(type(place), "write", write)
    with pytest.raises(OSError, match="is gone"):
        place.write_folder("a", files)
    assert "a/.zattrs" not in place.list()
    assert place.local is None or not os.listdir(place.local)


WRITES = """
import sys
from pathlib import Path
from snr_ray.folder import open_folder
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


def test_of_many_who_create_a_file_one_does(place: Folder) -> None:
    rivals = [pickle.loads(pickle.dumps(place)) for _ in range(6)]
    won: list[int] = []

    def race(k: int) -> None:
        if rivals[k].create(JOB, str(k)):
            won.append(k)

    threads = [threading.Thread(target=race, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # In a bucket those who come at the same moment may all be turned away.
    assert len(won) == 1 or (not won and place.local is None)
    if won:
        assert place.read(JOB) == str(won[0]).encode()
        assert not place.create(JOB, "late")
    else:
        assert place.empty()
        assert place.create(JOB, "later")


def test_a_claim_that_was_left_behind_is_soon_too_old(
    bucket: tuple[pafs.FileSystem, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = open_folder(f"s3://bucket/out?{bucket[1]}")
    place.write(".claims/dead", "")
    assert place.empty()
    assert not place.create(JOB, "x")
    monkeypatch.setattr(folders, "CLAIM_S", 0.5)
    time.sleep(1.5)  # S3 tells whole seconds
    assert place.create(JOB, "x")


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x"])
def test_names_stay_inside(name: str, place: Folder) -> None:
    for use in (place.read, place.remove, place.exists, place.join):
        with pytest.raises(InputError, match="stay inside"):
            use(name)
    with pytest.raises(InputError, match="stay inside"):
        place.write(name, "")


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
    monkeypatch.setattr(folders, "MOUNT_S", 0.1)
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
    monkeypatch.setattr(folders, "MOUNT_S", 0.1)
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


@pytest.mark.parametrize("text", ["s3:/bucket/x", "gs:/bucket/x"])
def test_a_uri_that_lost_a_slash_is_no_folder(text: str) -> None:
    with pytest.raises(InputError, match=f"give {text.replace(':/', '://')}"):
        open_folder(text)


def test_file_uri_is_a_folder(tmp_path: Path) -> None:
    place = open_folder(f"file://{tmp_path}/out")
    assert isinstance(place, LocalFolder)
    assert place.local == tmp_path / "out"


@pytest.mark.parametrize("text", ["nosuch://bucket/x", "s3://", "http://host/x"])
def test_a_uri_that_cannot_be_opened_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"can be opened|name a bucket"):
        open_folder(text)


def test_a_store_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "ANSWER_S", 0.3)
    begun = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        where = f"scheme=http&endpoint_override=127.0.0.1:{port}&region=us-east-1"
        with pytest.raises(InputError, match=r"s3://bucket/x\S+ .* no answer within"):
            open_folder(f"s3://key:secret@bucket/x?{where}")
    assert time.monotonic() - begun < 3


def test_within_tells_what_went_wrong() -> None:
    def fail() -> None:
        raise OSError("why")

    with pytest.raises(OSError, match="why"):
        within(5, fail)


def test_secrets_are_never_shown(bucket: tuple[pafs.FileSystem, str]) -> None:
    place = open_folder(f"s3://key:se%2Fcret@bucket/out?{bucket[1]}")
    assert str(place) == f"s3://bucket/out?{bucket[1]}"
    assert "cret" not in str(pickle.loads(pickle.dumps(place.join("x"))))
    said = without_secrets("read 's3://k:s@b/x', s3://t@b, mail a@b.c at http://h/p?u=a@b")
    assert said == "read 's3://b/x', s3://b, mail a@b.c at http://h/p?u=a@b"


def test_missing_bucket_and_wrong_key_are_told(bucket: tuple[pafs.FileSystem, str]) -> None:
    place = open_folder(f"s3://nowhere/out?{bucket[1]}")
    with pytest.raises(OSError, match="does not exist"):
        place.write("x", "")
