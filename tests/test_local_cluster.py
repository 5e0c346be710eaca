"""cluster/local.sh for real: a stranger stays out, jobs find shipped models, a stop leaves none."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
SCRIPT = REPOSITORY / "cluster" / "local.sh"


def _free_port(low: int) -> int:
    """The first of three ports in a row that are free, below those that Ray gives to workers."""
    for port in range(low, 9990, 10):
        try:
            for k in range(3):
                socket.create_server(("127.0.0.1", port + k)).close()
        except OSError:
            continue
        return port
    raise AssertionError("no free ports")


@pytest.fixture(scope="module")
def shell() -> Iterator[dict[str, str]]:
    """A running cluster that was started without ray on PATH and without a token: the environment
    of a shell after `eval "$(cluster/local.sh env)"`."""
    above = Path(tempfile.mkdtemp(prefix="snr-", dir="/tmp"))  # short, for Ray's sockets
    folder = above / "c"
    plain = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    plain |= {
        "PATH": "/usr/bin:/bin",
        "RAY": str(Path(sys.executable).with_name("ray")),
        "SNR_RAY_DIR": str(folder),
        "SNR_DASHBOARD": f"127.0.0.1:{_free_port(8300)}",
        "SNR_RAY_PORT": str(_free_port(6500)),
    }
    arguments = ["start", "--num-cpus=2", "--object-store-memory=200000000"]
    started = subprocess.run([SCRIPT, *arguments], env=plain, capture_output=True, text=True)
    assert started.returncode == 0, started.stderr
    setting = subprocess.run(
        ["bash", "-c", f'eval "$({SCRIPT} env)" && env -0'],
        env=plain, check=True, capture_output=True, text=True,
    )  # fmt: skip
    yield dict(line.split("=", 1) for line in setting.stdout.split("\0") if "=" in line)
    done = subprocess.run([SCRIPT, "stop"], env=plain, check=True, capture_output=True, text=True)
    assert "Stopped" in done.stdout
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    assert str(folder) not in left.stdout
    shutil.rmtree(above)


def _submit(shell: dict[str, str], command: str) -> subprocess.Popen[str]:
    words = ["ray", "job", "submit", "--runtime-env", "cluster/runtime_env.yaml"]
    return subprocess.Popen(
        [*words, "--working-dir", ".", "--", "bash", "-c", command],
        env=shell, cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.mark.ray
@pytest.mark.slow
def test_jobs_find_shipped_models_and_keep_their_results(
    shell: dict[str, str], image_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    jobs = [
        f"python jobs/denoise.py --model notmnist --images {image_folder} --out {out}",
        # Found by name as the others are, and refused for another reason.
        f"python jobs/train.py --images glyphs --out {tmp_path}/run --set train.start=cifar10-rgb;"
        f" python jobs/evaluate.py --model notmnist --beside cifar10 --images glyphs --out {out}2;"
        " python jobs/denoise.py --model notmnist --images glyphs --out cleaned",
    ]
    done = [job.communicate()[0] for job in [_submit(shell, job) for job in jobs]]
    assert f"24 images in {out}" in done[0]
    assert len(list(out.rglob("*.png"))) == 24
    assert "train.start needs a model of the same images.channels, but cifar10-rgb has 3" in done[1]
    assert "Models of one table need the same images and noise, but cifar10 has" in done[1]
    assert f"such as {Path('/mnt/share/cleaned')}" in done[1]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_of_the_machine_stays_out(shell: dict[str, str]) -> None:
    folder = Path(shell["SNR_RAY_DIR"])
    token = Path(shell["RAY_AUTH_TOKEN_PATH"])
    assert (folder / "ray").stat().st_mode & 0o777 == 0o777  # as Ray would have it
    for place in (folder, folder / "ray", token, folder / "ray" / "session_latest"):
        for test in ("-r", "-w", "-x"):
            tried = subprocess.run(
                ["setpriv", "--reuid=65534", "--clear-groups", "test", test, place]
            )
            assert tried.returncode == 1, f"nobody may {test} {place}"
    # The ports are open to all of this machine, but answer to the token alone.
    ask = ["ray", "job", "list", "--address", shell["RAY_API_SERVER_ADDRESS"]]
    for sent in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "feed" * 16}):
        stranger = {k: v for k, v in shell.items() if not k.startswith("RAY_")} | sent
        stranger["HOME"] = "/nonexistent"
        refused = subprocess.run(ask, env=stranger, capture_output=True, text=True, check=False)
        assert refused.returncode != 0
        assert "uthentication" in refused.stderr


@pytest.fixture
def short_path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="snr-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.mark.parametrize("bad", ["link", "another's"])
def test_a_folder_that_is_not_ours_is_refused(bad: str, short_path: Path) -> None:
    folder = short_path / "c"
    if bad == "link":
        (short_path / "theirs").mkdir(mode=0o755)
        folder.symlink_to(short_path / "theirs")
    elif os.getuid() != 0:
        pytest.skip("only root can give a folder away")
    else:
        folder.mkdir()
        shutil.chown(folder, 65534)
    run = _local("start", SNR_RAY_DIR=folder, RAY=sys.executable)
    assert run.returncode == 1
    assert "is a link or belongs to someone else; set SNR_RAY_DIR" in run.stderr
    assert not any(folder.iterdir())
    if bad == "link":
        assert folder.stat().st_mode & 0o777 == 0o755


def test_no_ray_and_no_token_are_sentences(short_path: Path) -> None:
    for verb in ("start", "env"):
        run = _local(verb, SNR_RAY_DIR=short_path / "c", HOME=short_path)
        found = (REPOSITORY / ".venv" / "bin" / "ray").exists()
        assert found or "Ray is needed, but no ray program is found; make an" in run.stderr
    run = _local(
        "start", SNR_RAY_DIR=short_path / "c", RAY=sys.executable, RAY_AUTH_TOKEN_PATH="no"
    )
    assert "RAY_AUTH_TOKEN_PATH must be a file with a token, but no is missing" in run.stderr
    assert run.returncode == 1


def _local(verb: str, **environment: object) -> subprocess.CompletedProcess[str]:
    settings = {"PATH": "/usr/bin:/bin", "SNR_DASHBOARD": f"127.0.0.1:{_free_port(8600)}"}
    settings |= {key: str(value) for key, value in environment.items()}
    return subprocess.run([SCRIPT, verb], env=settings, capture_output=True, text=True, check=False)


def test_a_folder_too_long_for_sockets_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 40)
    run = _local("start", SNR_RAY_DIR=folder, RAY=sys.executable)
    assert run.returncode == 1
    assert f"but has {len(str(folder))}; set a shorter one" in run.stderr
    assert not folder.exists()
