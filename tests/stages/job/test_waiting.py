"""Whoever waits is told what for."""

import re
import time
from typing import Any

import pytest
import ray

from snr_ray.stages.job import waiting
from snr_ray.stages.job.waiting import patience, waited_for


@pytest.mark.ray
def test_silence_is_explained_and_news_are_not(
    ray_2_cpus: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(waiting, "SAY_S", 0.2)
    done = 0

    def count() -> int:
        return done

    with patience("simulate", count):
        time.sleep(0.7)
    said = capsys.readouterr().err.splitlines()
    assert 1 <= len(said) <= 4
    assert re.fullmatch(r"simulate: nothing new for 0 s; .* 2 cores are .*", said[0])

    def busy() -> int:
        nonlocal done
        done += 1
        return done

    with patience("simulate", busy):
        time.sleep(0.7)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("cores", "free", "alive", "said"),
    [
        (0, 0, [True], "waiting for a node with processor cores: the cluster has none yet"),
        (4, 0, [True, True], "all 8 cores are in use, by its own tasks or other jobs"),
        (4, 3, [True, True], "its tasks are starting: 3 of 8 cores are free"),
        (4, 0, [True, False], "all 4 cores are in use, by its own tasks or other jobs, 1 of 2"),
    ],
)
def test_states_of_a_cluster(
    cores: int, free: int, alive: list[bool], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes: list[dict[str, Any]] = [{"Alive": a, "Resources": {"CPU": cores}} for a in alive]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": free})
    assert waited_for().startswith(said)
