"""Where the study of a sweep is kept: a journal in its folder, or a PostgreSQL for several drivers.

    driver A, its cluster, its OUT --\\
    driver B, its cluster, its OUT ----> one study in PostgreSQL

Each driver has an output folder of its own, and runs trials of the study that no other one runs.
"""

import importlib.util
import json
import shlex
import time
import uuid
import warnings
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError

from snr_ray.address import within
from snr_ray.errors import InputError, check
from snr_ray.folder import Folder
from snr_ray.outputs import write_atomic

JOURNAL = "study.journal"
DRIVER_FILE = "driver"
CONNECT_S = 8.0
"""A database that has not answered for so long counts as not to be reached."""
TABLES_LOCK = 0x736E72
"""The number of an advisory lock."""
BEAT_S = 30
"""Seconds between two signs of life of a trial."""
STALE_S = 300
"""A trial without one for so many seconds has lost its driver; another takes it over."""
SECRETS = ("password", "sslpassword")
"""Keys of a PostgreSQL URL that hold one."""


def read_url(text: str) -> URL:
    """The URL of a PostgreSQL as SQLAlchemy has it.

    Raises:
        InputError: for another database, or without the package that speaks to it.
    """
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        url = None
    kind = url.get_backend_name() if url else ""
    check(
        kind != "sqlite",
        "--storage takes a PostgreSQL, not SQLite, whose locks do not hold on file systems that "
        "nodes share, so that trials get lost; leave --storage out: the journal in --out is safe "
        "there.",
    )
    if url is None or kind not in ("postgresql", "postgres") or not url.database:
        raise InputError(
            "--storage takes the URL of a PostgreSQL database, such as "
            f"postgresql://user@host/optuna, but got {shown(url) if url else 'something else'}."
        )
    check(
        importlib.util.find_spec("psycopg") is not None,
        "--storage needs the package psycopg, which is not installed: pip install "
        "'snr-ray[postgres]'.",
    )
    return url.set(drivername="postgresql+psycopg")


def shown(url: URL) -> str:
    """A URL as it may be shown and written: without its password."""
    url = URL.create(
        url.drivername, url.username, None, url.host, url.port, url.database, url.query
    )
    return url.difference_update_query(SECRETS).render_as_string()


def open_storage(out: Path, url: URL | None) -> BaseStorage:
    """The storage of a study: the journal in a folder, or the database at a URL.

    Raises:
        InputError: for a journal that is damaged, or a database that cannot be reached, within 10
            seconds.
    """
    if url is None:
        return _journal(out / JOURNAL)
    try:
        with _reach(url) as connection:  # drivers that come at once make the tables one by one
            connection.execute("SELECT pg_advisory_lock(%s)", (TABLES_LOCK,))
            return _storage(url)
    except TimeoutError as error:
        reason = str(error)
    except (DatabaseError, optuna.exceptions.StorageInternalError, OSError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
    for secret in (url.password, *(url.query.get(key) for key in SECRETS)):
        reason = reason.replace(str(secret), "***") if secret else reason
    raise InputError(
        f"--storage {shown(url)} cannot be reached ({reason}); look at host, port and database; a "
        "password may be given in PGPASSWORD or ~/.pgpass."
    ) from None


def _journal(path: Path) -> JournalStorage:
    """The journal at a path, of the one driver that has its folder."""
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    if lines and lines.pop():  # cut short by a kill: what comes next would be part of it
        write_atomic(path, b"".join(line + b"\n" for line in lines))
    for number, line in enumerate(lines, start=1):
        try:
            whole = "op_code" in json.loads(line)
        except (ValueError, TypeError):
            whole = False
        if not whole:
            raise InputError(
                f"Each line of {path} must be an entry of Optuna's journal, but line {number} is "
                f"damaged ({line[:40].decode(errors='replace')!r}); put a copy of the file in its "
                "place, or give another --out."
            )
    return JournalStorage(JournalFileBackend(str(path)))


def _reach(url: URL) -> Any:
    """A connection to a PostgreSQL. Raises TimeoutError or OSError if nobody answers there, or not
    to this user."""
    import psycopg  # an extra

    place = url.set(drivername="postgresql").render_as_string(hide_password=False)
    wait = int(CONNECT_S)
    try:
        return within(wait + 1, lambda: psycopg.connect(place, connect_timeout=wait))
    except psycopg.Error as error:
        raise OSError(str(error)) from None


def _storage(url: URL) -> RDBStorage:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return RDBStorage(
            url.render_as_string(hide_password=False),
            engine_kwargs={
                "pool_pre_ping": True,  # a database that was started anew meanwhile is asked again
                "connect_args": {
                    "connect_timeout": int(CONNECT_S),
                    "application_name": "snr sweep",
                    "tcp_user_timeout": 60_000,
                },
            },
            heartbeat_interval=BEAT_S,
            grace_period=STALE_S,
            heartbeat_stale_trial_callback=_take_over,
        )


def _take_over(study: optuna.Study, trial: FrozenTrial) -> None:
    """Ask for the trial of a driver that died again; whoever gets it begins it anew."""
    study.enqueue_trial(trial.params, user_attrs=dict(trial.user_attrs))


def close(storage: BaseStorage) -> None:
    """End the connections of a storage."""
    if isinstance(storage, RDBStorage):
        storage.remove_session()
        storage.engine.dispose()


def driver_of(out: Path) -> str:
    """What the driver of an output folder is known by in a study of several."""
    path = out / DRIVER_FILE
    if not path.is_file():
        write_atomic(path, f"{uuid.uuid4().hex}\n")
    return path.read_text().strip()


class Heart:
    """Signs of life of the trials of this driver, and what becomes of those without one."""

    def __init__(self, storage: BaseStorage, study: optuna.Study) -> None:
        self.storage = storage if isinstance(storage, RDBStorage) else None
        """None of a journal, which has one driver."""
        self.study, self.last = study, 0.0

    def ask(self) -> Trial:
        """A new trial of the study, with its first sign of life."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Heartbeat of storage is supposed to be used with")
            trial = self.study.ask()
        if self.storage is not None:
            self.storage.record_heartbeat(trial._trial_id)
        return trial

    def beat(self, trials: list[Trial]) -> None:
        """Tell that these trials run, as often as it takes."""
        if self.storage is None or time.monotonic() - self.last < BEAT_S:
            return
        self.last = time.monotonic()
        for trial in trials:
            self.storage.record_heartbeat(trial._trial_id)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            optuna.storages.fail_stale_trials(self.study)


def dashboard(out: Folder, url: URL | None) -> str:
    """The command that opens a study in optuna-dashboard, as a shell takes it."""
    if url is None and out.local is None:
        return f"optuna-dashboard {JOURNAL}, of a copy of {out.join(JOURNAL)},"
    return f"optuna-dashboard {shlex.quote(shown(url) if url else str(out.join(JOURNAL)))}"
