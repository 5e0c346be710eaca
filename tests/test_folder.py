"""What a folder and a bucket have in common: whole files, claims, names that stay inside."""

import os
import pickle
import threading
from pathlib import Path

import pytest

from snr_ray.address import open_folder
from snr_ray.errors import InputError
from snr_ray.folder import JOB, Folder


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
    assert len(won) == 1
    assert place.read(JOB) == str(won[0]).encode()
    assert not place.create(JOB, "late")


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x"])
def test_names_stay_inside(name: str, place: Folder) -> None:
    for use in (place.read, place.remove, place.exists, place.join):
        with pytest.raises(InputError, match="stay inside"):
            use(name)
    with pytest.raises(InputError, match="stay inside"):
        place.write(name, "")
