"""A line every half minute that says what a stage waits for, while nothing of it gets done."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray

SAY_S = 30.0
"""Seconds without news after which the user is told why."""


@contextmanager
def patience(stage: str, done: Callable[[], int]) -> Iterator[None]:
    """Tell on standard error what is waited for, as long as `done()` stays the same.

    Args:
        stage: the verb, for the line.
        done: units done so far, asked from another thread.
    """
    ended = threading.Event()
    thread = threading.Thread(target=_tell, args=(stage, done, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _tell(stage: str, done: Callable[[], int], ended: threading.Event) -> None:
    before, quiet = done(), 0.0
    while not ended.wait(SAY_S):
        now = done()
        quiet = quiet + SAY_S if now == before else 0.0
        before = now
        if quiet:
            line = f"{stage}: nothing new for {quiet:.0f} s; {waited_for()}"
            print(line, file=sys.stderr, flush=True)


def waited_for() -> str:
    """What the cluster is busy with or short of, in words."""
    nodes = ray.nodes()
    alive = [node for node in nodes if node["Alive"]]
    cores = int(sum(node["Resources"].get("CPU", 0) for node in alive))
    lost = len(nodes) - len(alive)
    gone = f", {lost} of {len(nodes)} nodes are gone" if lost else ""
    if not cores:
        return f"waiting for a node with processor cores: the cluster has none yet{gone}"
    free = int(ray.available_resources().get("CPU", 0))
    if free:
        return f"its tasks are starting: {free} of {cores} cores are free{gone}"
    return f"all {cores} cores are in use, by its own tasks or other jobs{gone}"
