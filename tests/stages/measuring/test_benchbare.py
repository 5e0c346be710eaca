"""Processes beside a job: they work at the same time, answer, and a broken one is told."""

import time
from typing import Any

import pytest

from snr_ray.errors import InputError
from snr_ray.stages.measuring.benchbare import in_processes


def wait_for_the_others(seconds: float, start: Any) -> tuple[float, float]:
    start.wait()
    since = time.time()
    time.sleep(seconds)
    return since, time.time()


def fail(reason: str, start: Any) -> None:
    raise RuntimeError(reason)


def test_all_work_at_the_same_time_and_answer() -> None:
    times = in_processes(wait_for_the_others, (1.0,), 2)
    assert len(times) == 2
    assert max(since for since, _ in times) < min(until for _, until in times)


def test_a_process_that_breaks_is_told() -> None:
    with pytest.raises(InputError, match="A process beside the job ended with an error"):
        in_processes(fail, ("on purpose",))
