"""The lock of an output folder: one holder, who is named; it ends with the holder's life."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from snr_ray import lock
from snr_ray.config import InputError, RunError
from snr_ray.lock import LOCK, check_free, locked

HOLD = """
import sys, time
from pathlib import Path
from snr_ray.lock import locked
with locked(Path(sys.argv[1]), "train"):
    print("held", flush=True)
    time.sleep(60)
"""


def _dead_holders(folder: Path, n: int) -> None:
    """Locks of n drivers of this machine, each of which took over from the one before, and died."""
    path = folder / LOCK
    for at in range(n):
        mine = lock._me("train") | {"key": str(at), "begun": "1"}
        path.write_text(json.dumps(mine))
        path = lock._after(path, mine)


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
            path = tmp_path / LOCK
            mine = json.loads(path.read_text())
            other = mine | {"key": "other", "host": "node7", "stage": "train"}
            (lock._after(path, mine) if how == "after it" else path).write_text(json.dumps(other))
            time.sleep(5)

    with pytest.raises(RunError, match="taken over by snr train on node7"):
        work()
    assert lock._chain(tmp_path)[-1][1]["key"] == "other"


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
