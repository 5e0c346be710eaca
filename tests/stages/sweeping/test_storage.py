"""Where a study is kept: the journal, and a real PostgreSQL that the tests start."""

import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import optuna
import pytest
from optuna.storages import BaseStorage
from optuna.trial import TrialState
from stages.sweeping.postgres import binaries, free_port, server

from snr_ray.address import open_folder
from snr_ray.config import Config
from snr_ray.errors import InputError
from snr_ray.stages.sweeping import storage as module
from snr_ray.stages.sweeping.objectives import Goals
from snr_ray.stages.sweeping.storage import (
    JOURNAL,
    Heart,
    close,
    dashboard,
    driver_of,
    open_storage,
    read_url,
    shown,
)
from snr_ray.stages.sweeping.study import FINISHED, GIVEN, open_study

needs_postgres = pytest.mark.skipif(
    binaries() is None, reason="no PostgreSQL (initdb, postgres) on this machine"
)


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    with server() as url:
        yield url


def test_passwords_are_neither_shown_nor_written() -> None:
    for text in (
        "postgresql://me:hush@host:5432/db",
        "postgres://me:hush@host/db",
        "postgresql+psycopg://me@host/db?password=hush&sslmode=require",
    ):
        url = read_url(text)
        assert "hush" in url.render_as_string(hide_password=False)
        assert "hush" not in shown(url)
        assert "hush" not in dashboard(Path("out"), url)
        assert shown(url).startswith("postgresql+psycopg://me@host")


def test_the_command_of_the_dashboard_is_one_that_a_shell_takes(tmp_path: Path) -> None:
    url = read_url("postgresql://me@host/db?sslmode=require&application_name=a")
    for out, where in ((tmp_path, url), (tmp_path / "my sweep", None)):
        words = shlex.split(dashboard(open_folder(out), where))
        assert words == ["optuna-dashboard", shown(url) if where else str(out / JOURNAL)]


def _studied(folder: Path) -> Path:
    study = optuna.create_study(storage=open_storage(folder, None), study_name="s")
    for _ in range(3):
        study.tell(study.ask(), 1.0)
    return folder / JOURNAL


def test_a_journal_whose_last_line_was_cut_goes_on_for_good(tmp_path: Path) -> None:
    path = _studied(tmp_path)
    path.write_bytes(path.read_bytes()[:-9])
    for number in (3, 4, 5):
        study = optuna.load_study(storage=open_storage(tmp_path, None), study_name="s")
        assert len(study.trials) == number
        study.tell(study.ask(), 1.0)


@pytest.mark.parametrize("line", ["{", "3", "[]", "null", "", "\x00\x00"])
def test_a_damaged_line_of_a_journal_is_one_sentence(tmp_path: Path, line: str) -> None:
    path = _studied(tmp_path)
    lines = path.read_text().split("\n")
    lines[2] = line
    path.write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"study\.journal must be .* line 3 is damaged \(.*--out"):
        open_storage(tmp_path, None)


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("sqlite:///study.db", "not SQLite, whose locks do not hold on file systems that nodes"),
        ("mysql://me:hush@host/db", "URL of a PostgreSQL database.*but got mysql://me@host/db"),
        ("postgresql://host", "URL of a PostgreSQL database"),
        ("study.journal", "URL of a PostgreSQL database"),
    ],
)
def test_other_storages_are_refused(url: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as error:
        read_url(url)
    assert "hush" not in str(error.value)


def test_without_its_package_postgresql_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"psycopg.*pip install 'snr-ray\[postgres\]'"):
        read_url("postgresql://me@host/db")


@pytest.mark.parametrize("silent", [False, True])
def test_a_database_that_is_not_there_is_a_sentence_within_ten_seconds(
    silent: bool, tmp_path: Path
) -> None:
    with socket.socket() as listener:  # takes connections and never says a word
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1] if silent else free_port()
        url, since = read_url(f"postgresql://me:hush@127.0.0.1:{port}/db"), time.monotonic()
        with pytest.raises(InputError, match=f"127.0.0.1:{port}/db cannot be reached") as error:
            open_storage(tmp_path, url)
        assert time.monotonic() - since < 10
    assert "hush" not in str(error.value)


@needs_postgres
def test_a_wrong_password_is_a_sentence_that_does_not_say_it(postgres: str, tmp_path: Path) -> None:
    url = read_url(postgres).set(password="hush")
    with pytest.raises(InputError, match="password authentication failed") as error:
        open_storage(tmp_path, url)
    assert "hush" not in str(error.value)


@pytest.fixture
def drivers(
    postgres: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[BaseStorage]]:
    """Two connections to that PostgreSQL, to which a trial is dead after a second."""
    monkeypatch.setattr(module, "STALE_S", 1)
    storages = [open_storage(tmp_path, read_url(postgres)) for _ in range(2)]
    yield storages
    for storage in storages:
        close(storage)


DRIVER = """
import sys
from pathlib import Path
from snr_ray import configfile as configs
from snr_ray.stages.sweeping.objectives import Goals
from snr_ray.stages.sweeping.storage import open_storage, read_url
from snr_ray.stages.sweeping.study import open_study, suggest
config = configs.load(["smoke"])
study = open_study(open_storage(Path("."), read_url(sys.argv[1])), config, Goals(), name="both")
for _ in range(6):
    trial = study.ask()
    suggest(trial, config)
    trial.report(1.0, 1)
    trial.should_prune()
    study.tell(trial, float(trial.number))
"""


@needs_postgres
def test_drivers_that_come_at_once_make_the_tables_once(tiny: Config, tmp_path: Path) -> None:
    with server() as url, ThreadPoolExecutor(4) as pool:
        storages = list(pool.map(lambda _: open_storage(tmp_path, read_url(url)), range(4)))
        for storage in storages:
            assert storage.get_all_studies() == []
            close(storage)


@needs_postgres
def test_two_drivers_share_a_study(postgres: str, drivers: list[BaseStorage], tiny: Config) -> None:
    running = [subprocess.Popen([sys.executable, "-c", DRIVER, postgres]) for _ in range(2)]
    assert [driver.wait(timeout=120) for driver in running] == [0, 0]
    study = open_study(drivers[0], tiny, Goals(), name="both")
    trials = study.get_trials(states=FINISHED)
    assert sorted(trial.number for trial in trials) == list(range(12))
    assert all(trial.values == [float(trial.number)] for trial in trials)


@needs_postgres
def test_the_trial_of_a_driver_that_died_is_taken_over(
    drivers: list[BaseStorage], tiny: Config
) -> None:
    dead, alive = (Heart(kept, open_study(kept, tiny, Goals(), name="dead")) for kept in drivers)
    lost, mine = dead.ask(), alive.ask()
    assert lost.user_attrs["folder"] == GIVEN
    time.sleep(2.5)
    alive.beat([mine])
    states = {t.number: t.state for t in alive.study.get_trials(deepcopy=False)}
    assert states[lost.number] == TrialState.FAIL
    assert states[mine.number] == TrialState.RUNNING
    assert alive.ask().user_attrs["folder"] == GIVEN
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        lost.set_user_attr("folder", "x")  # which is how the one that died is told


def test_a_driver_keeps_its_name_in_its_folder(tmp_path: Path) -> None:
    assert driver_of(tmp_path) == driver_of(tmp_path)
    (tmp_path / "other").mkdir()
    assert driver_of(tmp_path / "other") != driver_of(tmp_path)
