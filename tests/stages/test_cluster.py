"""Connecting to Ray: what goes wrong is said in one sentence."""

import os
import subprocess
import sys

import pytest
import ray

from snr_ray.config import InputError
from snr_ray.stages.cluster import connected


@pytest.mark.parametrize(
    ("problem", "raised", "said"),
    [
        (ConnectionError("refused"), InputError, r"does not answer \(refused\); unset it"),
        (
            Exception("The current node timed out during startup. And so on."),
            InputError,
            "too busy",
        ),
        (Exception("Something else."), Exception, "Something else"),
    ],
)
def test_ray_that_does_not_start(
    problem: Exception, raised: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: object) -> None:
        raise problem

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)  # a machine too busy for it cannot be had in a test
    with pytest.raises(raised, match=said), connected():
        pytest.fail("there is no cluster")


def test_nothing_starts_ray_by_the_way() -> None:
    code = "from snr_ray.cli import prepare_environment as p; p(); import ray; ray.put(0)"
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ENABLE_AUTO_CONNECT"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "Ray has not been started" in done.stderr
