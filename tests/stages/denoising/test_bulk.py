"""The engine of bulk jobs: every image once, whatever is killed, and nothing kept of those done."""

import contextlib
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray

from snr_ray.errors import InputError, Lost
from snr_ray.stages.denoising.bulk import FIRST, Block, Work, plan, tables

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_2_cpus")]


Rows = Callable[[np.ndarray], pa.Table]


def work(rows: Rows) -> Work:
    # Processes of their own: one that is interrupted in the middle of an import serves no other.
    own = {"env_vars": {"SNR_RAY_TEST": "bulk"}}
    task = ray.remote(num_cpus=1, max_retries=0, runtime_env=own)(rows)
    return Work(
        start=lambda block: task.remote(block.indices),
        width=lambda: 3,
        failed=lambda index, kind, why: pa.table(
            {"index": np.array([index]), "why": [f"{kind}: {why}"]}
        ),
    )


def indices_of(poison: tuple[int, ...] = (), *, odd: int = -1, sleep: float = 0.0) -> Rows:
    """Tables of indices; a worker that meets a poisonous one is killed as by the kernel."""

    def rows(indices: np.ndarray) -> pa.Table:
        for index in indices:
            if index in poison:
                os.kill(os.getpid(), signal.SIGKILL)
            if index == odd:
                raise KeyError("nobody thought of this")
        time.sleep(sleep)
        return pa.table({"index": indices, "why": [""] * len(indices)})

    return rows


def test_blocks_have_the_same_borders_whatever_is_done() -> None:
    done = np.zeros(61, bool)
    whole = [block.indices.tolist() for block in plan(61, done, 16)]
    assert list(itertools.chain(*whole)) == list(range(61))
    assert [len(block) for block in whole] == [2] * FIRST + [16, 13]
    done[[0, 1, 3, *range(5, 30), 40, *range(48, 61)]] = True
    left = [block.indices.tolist() for block in plan(61, done, 16)]
    assert left == [[2], [4], [30, 31], [*range(32, 40), *range(41, 48)]]


def test_an_image_that_kills_its_process_takes_no_other_with_it() -> None:
    blocks = plan(40, np.zeros(40, bool), 10)
    found = pa.concat_tables(tables(blocks, work(indices_of((17,), odd=31)))).to_pylist()
    assert sorted(row["index"] for row in found) == list(range(40))
    why = {row["index"]: row["why"] for row in found if row["why"]}
    assert set(why) == {17, 31}
    assert "killed: Its process was killed each time" in why[17]
    assert "error: It ended in an error that is not known here (KeyError" in why[31]


def test_a_block_whose_process_was_killed_is_done_again_as_it_was(tmp_path: Path) -> None:
    def rows(indices: np.ndarray) -> pa.Table:
        with contextlib.suppress(FileExistsError):
            (tmp_path / f"{indices[0]}").touch(exist_ok=False)
            os.kill(os.getpid(), signal.SIGKILL)
        return pa.table({"index": indices, "why": [f"one of {len(indices)}"] * len(indices)})

    blocks = iter([Block(np.arange(7)), Block(np.arange(7, 10))])
    found = pa.concat_tables(tables(blocks, work(rows))).to_pylist()
    said = {row["index"]: row["why"] for row in found}
    assert said == dict.fromkeys(range(7), "one of 7") | dict.fromkeys(range(7, 10), "one of 3")


def test_blocks_are_planned_as_they_are_needed() -> None:
    planned: list[int] = []

    def endless() -> Iterator[Block]:
        for k in range(10**9):
            planned.append(k)
            yield Block(np.array([k]))

    taken = tables(endless(), work(indices_of()))
    for n_done in range(1, 20):
        next(taken)
        assert len(planned) <= n_done + 2 * 3
    taken.close()


def test_a_job_that_finishes_nothing_is_ended() -> None:
    since = time.monotonic()
    with pytest.raises(Lost, match=r"within 0\.01 minutes, but none of 2 blocks"):
        list(tables(plan(2, np.zeros(2, bool), 1), work(indices_of(sleep=8)), stall_minutes=0.01))
    assert time.monotonic() - since < 8


def test_what_a_task_says_of_the_whole_job_ends_it() -> None:
    def refuse(indices: np.ndarray) -> pa.Table:
        raise InputError("--out must have room.")

    task = ray.remote(num_cpus=1, max_retries=0)(refuse)
    with pytest.raises(InputError, match=r"^--out must have room\.$"):
        list(
            tables(
                plan(9, np.zeros(9, bool), 3),
                Work(
                    lambda block: task.remote(block.indices), lambda: 2, lambda i, kind, why: None
                ),
            )
        )
