"""The lock of an output folder: one holder, who is named; it ends with the holder's life."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest

from snr_ray import lock
from snr_ray.address import open_folder
from snr_ray.errors import InputError, RunError
from snr_ray.folder import Folder
from snr_ray.lock import LOCK, check_free, locked

HOLD = """
import sys, time
from snr_ray.address import open_folder
from snr_ray.lock import locked
with locked(open_folder(sys.argv[1]), "train"):
    print("held", flush=True)
    time.sleep(60)
"""


def _dead_holders(folder: Path, n: int) -> None:
    """Locks of n drivers of this machine, each of which took over from the one before, and died."""
    name = LOCK
    for at in range(n):
        mine = lock._me("train") | {"key": str(at), "begun": "1"}
        (folder / name).write_text(json.dumps(mine))
        name = lock._after(mine)


def _held_elsewhere(folder: Path) -> None:
    """The lock of a driver on another machine."""
    with locked(folder, "sweep"):
        text = json.loads((folder / LOCK).read_text())
    (folder / LOCK).write_text(json.dumps(text | {"machine": "far", "host": "node7"}))


def test_the_second_is_told_who_holds_it_until_the_first_ends(tmp_path: Path) -> None:
    with locked(tmp_path, "train"):
        sentence = rf"in use by snr train on .* \(process {os.getpid()}, since 20.*--out\."
        with pytest.raises(InputError, match=sentence), locked(tmp_path, "train"):
            pass
        with pytest.raises(InputError, match=sentence):
            check_free(tmp_path)
    check_free(tmp_path)
    with locked(tmp_path, "train"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(InputError, match=f"process {holder.pid}"), locked(tmp_path, "train"):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    with locked(tmp_path, "train"), pytest.raises(InputError, match=f"process {os.getpid()}"):
        check_free(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_process_that_has_the_number_of_a_dead_holder_is_not_the_holder(tmp_path: Path) -> None:
    with locked(tmp_path, "train"):
        text = json.loads((tmp_path / LOCK).read_text())
    (tmp_path / LOCK).write_text(json.dumps(text | {"begun": "1"}))
    with locked(tmp_path, "train"):
        pass


def test_a_holder_elsewhere_that_gives_signs_of_life_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.2)
    _held_elsewhere(tmp_path)
    done = threading.Event()

    def beat() -> None:
        while not done.wait(0.2):
            os.utime(tmp_path / LOCK)

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(InputError, match="snr sweep on node7"), locked(tmp_path, "sweep"):
        pass
    done.set()
    thread.join()


def test_a_holder_elsewhere_that_fell_silent_loses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.1)
    _held_elsewhere(tmp_path)
    since = time.monotonic()
    with locked(tmp_path, "sweep"), pytest.raises(InputError) as told:
        check_free(tmp_path)
    assert "node7" not in str(told.value)
    assert time.monotonic() - since > 1.0
    assert "whether snr sweep on node7" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["after it", "in its place"])
def test_who_lost_the_folder_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.1)

    def work() -> None:
        with locked(tmp_path, "sweep"):
            mine = json.loads((tmp_path / LOCK).read_text())
            other = mine | {"key": "other", "host": "node7", "stage": "train"}
            name = lock._after(mine) if how == "after it" else LOCK
            (tmp_path / name).write_text(json.dumps(other))
            time.sleep(5)

    with pytest.raises(RunError, match="taken over by snr train on node7"):
        work()
    assert lock._chain(lock._files(tmp_path))[-1][1]["key"] == "other"


def test_of_many_at_once_one_gets_it(tmp_path: Path) -> None:
    """Many times over: what goes wrong here does so once in a hundred."""
    held, most = [0], [0]

    def ask(folder: Path, together: threading.Barrier) -> None:
        together.wait()
        with suppress(InputError), locked(folder, "train"):
            held[0] += 1
            most[0] = max(most[0], held[0])
            time.sleep(0.005)
            held[0] -= 1

    for n_dead in [0, 1, 2] * 20:
        _dead_holders(tmp_path, n_dead)
        together = threading.Barrier(8)
        threads = [threading.Thread(target=ask, args=(tmp_path, together)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert most == [1]
        assert not list(tmp_path.iterdir())


def test_a_holder_killed_before_it_wrote_its_name_is_waited_for_then_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.1)
    (tmp_path / LOCK).touch()
    since = time.monotonic()
    with locked(tmp_path, "train"):
        assert time.monotonic() - since > 1.0
        with pytest.raises(InputError, match="in use by snr train"), locked(tmp_path, "train"):
            pass
    assert not list(tmp_path.iterdir())


@pytest.fixture
def run(bucket: tuple[pafs.FileSystem, str]) -> Folder:
    """A run folder in a bucket."""
    return open_folder(f"s3://bucket/run?{bucket[1]}")


def test_a_bucket_has_one_holder_until_it_ends_or_is_killed(run: Folder) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(InputError, match=rf"s3://.*process {holder.pid}"), locked(run, "train"):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    with locked(run, "train"), pytest.raises(InputError, match=f"process {os.getpid()}"):
        check_free(run)
    assert run.empty()
    assert not run.list()


@pytest.mark.parametrize("lives", [True, False])
def test_a_holder_of_a_bucket_elsewhere_keeps_it_while_it_gives_signs_of_life(
    run: Folder, monkeypatch: pytest.MonkeyPatch, lives: bool
) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.3)  # a bucket tells times by the second
    far = lock._me("sweep") | {"machine": "far", "host": "node7"}
    files, done = lock._files(run), threading.Event()
    assert files.create(LOCK, far)

    def beat() -> None:
        while not done.wait(0.3):
            files.touch(LOCK, far["key"])

    thread = threading.Thread(target=beat if lives else lambda: None)
    thread.start()
    try:
        if lives:
            with pytest.raises(InputError, match="snr sweep on node7"), locked(run, "train"):
                pass
        else:
            with locked(run, "train"), pytest.raises(InputError, match="snr train on"):
                check_free(run)
            assert not run.list()
    finally:
        done.set()
        thread.join()


def test_who_lost_a_bucket_stops(run: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.1)

    def work() -> None:
        with locked(run, "sweep"):
            mine = json.loads(run.read(LOCK))
            other = mine | {"key": "other", "host": "node7", "stage": "train"}
            assert run.create(lock._after(mine), json.dumps(other))
            time.sleep(5)

    with pytest.raises(RunError, match="taken over by snr train on node7"):
        work()


def test_of_many_at_once_at_most_one_holds_a_bucket(run: Folder) -> None:
    held, most, entered = [0], [0], [0]

    def ask(together: threading.Barrier) -> None:
        together.wait()
        with suppress(InputError), locked(run, "train"):
            held[0] += 1
            entered[0] += 1
            most[0] = max(most[0], held[0])
            time.sleep(0.05)
            held[0] -= 1

    for dead in [False, True] * 2:
        if dead:
            assert run.create(LOCK, json.dumps(lock._me("train") | {"key": "0", "begun": "1"}))
        together = threading.Barrier(4)
        threads = [threading.Thread(target=ask, args=(together,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not run.list()
    assert most == [1]
    assert entered[0] >= 4


def test_a_lock_that_cannot_be_read_once_is_still_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    read, failed = lock._OnDisk.read, list[str]()

    def stale(files: lock._OnDisk, name: str) -> dict[str, Any]:
        if len(failed) < 3 and threading.current_thread() is not threading.main_thread():
            failed.append(name)
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(files, name)

    with locked(tmp_path, "train"):
        monkeypatch.setattr(lock._OnDisk, "read", stale)
        time.sleep(0.5)
    assert len(failed) == 3


def test_a_lock_that_may_not_be_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", LOCK)

    monkeypatch.setattr(lock._OnDisk, "read", refuse)
    for take in (check_free, lambda folder: locked(folder, "train").__enter__()):
        with pytest.raises(InputError, match=r"can be read and written, but .*Permission denied"):
            take(tmp_path)
