"""A real PostgreSQL on loopback for the tests, of the binaries that the machine has."""

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

USER, PASSWORD = "searcher", "pass{w}ord"


def binaries() -> Path | None:
    """The folder of initdb and postgres, on PATH or where Debian has them; None without."""
    found = shutil.which("initdb")
    places = [Path(found).resolve().parent] if found else []
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((place for place in places if (place / "postgres").exists()), None)


@contextmanager
def server(port: int | None = None) -> Iterator[str]:
    """The URL of an empty database `optuna`, with its password; PostgreSQL ends with the block."""
    place = binaries()
    assert place is not None
    # PostgreSQL does not run as root: then as nobody, in a folder that nobody reaches.
    root = os.getuid() == 0
    owner = {"user": "nobody", "group": "nogroup", "extra_groups": []} if root else {}
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        (folder / "password").write_text(PASSWORD)
        folder.chmod(0o700)
        if root:
            for path in (folder, folder / "password"):
                shutil.chown(path, "nobody", "nogroup")
        data = folder / "data"
        subprocess.run(
            [place / "initdb", "-D", data, "-U", USER, "--auth=scram-sha-256", "--no-sync",
             f"--pwfile={folder / 'password'}", "--encoding=UTF8", "--locale=C"],
            check=True, cwd="/", stdout=subprocess.DEVNULL, **owner,
        )  # fmt: skip
        port = port or free_port()
        process = subprocess.Popen(
            [place / "postgres", "-D", data, "-p", str(port), "-h", "127.0.0.1", "-k", folder,
             "-F"],
            cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **owner,
        )  # fmt: skip
        try:
            _make_database(port)
            yield f"postgresql://{USER}:{PASSWORD}@127.0.0.1:{port}/optuna"
        finally:
            process.send_signal(2)  # SIGINT: ends without waiting for who is connected
            process.wait(timeout=30)


def _make_database(port: int) -> None:
    import psycopg

    for _ in range(100):
        try:
            with psycopg.connect(
                host="127.0.0.1", port=port, user=USER, password=PASSWORD, dbname="postgres",
                autocommit=True, connect_timeout=5,
            ) as connection:  # fmt: skip
                connection.execute("CREATE DATABASE optuna")
                return
        except psycopg.OperationalError:  # not up yet
            import time

            time.sleep(0.1)
    raise TimeoutError("PostgreSQL did not start within 10 seconds")


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
