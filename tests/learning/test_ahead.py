"""Batches made ahead: the same, in order; errors where they are asked for; no thread left."""

import itertools
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from snr_ray.learning.ahead import AHEAD, ahead
from snr_ray.learning.batches import Batch


def batches(n: int, made: list[int] | None = None) -> Iterator[Batch]:
    for k in range(n):
        if made is not None:
            made.append(k)
        yield Batch(torch.full((2, 1, 1, 1), float(k)))


def threads() -> int:
    return sum(thread.name == "batches ahead" for thread in threading.enumerate())


def until(holds: object, seconds: float = 5.0) -> bool:
    late = time.monotonic() + seconds
    while not holds() and time.monotonic() < late:  # type: ignore[operator]
        time.sleep(0.01)
    return bool(holds())  # type: ignore[operator]


@pytest.mark.parametrize("n", [0, 1, AHEAD, 40])
def test_all_batches_come_in_order(n: int) -> None:
    assert [int(batch.clean[0]) for batch in ahead(batches(n))] == list(range(n))
    assert until(lambda: not threads())


def test_some_are_made_ahead_and_no_more_than_are_kept() -> None:
    made: list[int] = []
    coming = ahead(batches(1000, made))
    for k, _ in zip(range(5), coming, strict=False):
        assert until(lambda k=k: len(made) >= k + 2)  # type: ignore[misc]
    time.sleep(0.2)
    assert len(made) <= 5 + AHEAD + 1
    coming.close()
    assert until(lambda: not threads())
    assert len(made) < 20


def test_what_goes_wrong_is_raised_where_it_is_asked_for() -> None:
    def broken() -> Iterator[Batch]:
        yield from batches(2)
        raise ValueError("the third")

    coming = ahead(broken())
    assert len(list(itertools.islice(coming, 2))) == 2
    with pytest.raises(ValueError, match="the third"):
        next(coming)
    assert until(lambda: not threads())
