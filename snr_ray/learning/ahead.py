"""Batches made ahead, by a thread, while a GPU works on those before."""

import queue
import threading
from collections.abc import Generator, Iterator

from snr_ray.learning.batches import Batch

AHEAD = 3
"""Batches that wait at most."""
LOOK_S = 0.1
"""How often a thread with nothing to do asks whether it is still wanted."""


def ahead(batches: Iterator[Batch]) -> Generator[Batch]:
    """The same batches in the same order, in memory that a GPU copies from by itself. What goes
    wrong in making one is raised where it is asked for; the thread ends with the generator."""
    made: queue.Queue[Batch | BaseException | None] = queue.Queue(AHEAD)
    wanted = threading.Event()
    wanted.set()

    def put(what: Batch | BaseException | None) -> None:
        while wanted.is_set():
            try:
                return made.put(what, timeout=LOOK_S)
            except queue.Full:
                continue

    def make() -> None:
        try:
            for batch in batches:
                put(batch.pinned())
                if not wanted.is_set():
                    return
            put(None)
        except BaseException as error:
            put(error)

    threading.Thread(target=make, name="batches ahead", daemon=True).start()
    try:
        while (what := made.get()) is not None:
            if isinstance(what, BaseException):
                raise what
            yield what
    finally:
        wanted.clear()
