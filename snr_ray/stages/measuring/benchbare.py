"""What bench measures beside a job: the same work without Ray, in processes of its own."""

import multiprocessing
from collections.abc import Callable
from typing import Any

from snr_ray.errors import InputError

TIMEOUT_S = 600
"""Longest wait of processes for each other before they start."""


def in_processes(run: Callable[..., Any], arguments: tuple[Any, ...], count: int = 1) -> list[Any]:
    """What a function answers in fresh processes that begin their work together.

    Args:
        run: takes the arguments and a barrier, where it waits before what is measured.
        arguments: for each of the processes.
        count: how many.

    Raises:
        InputError: if one of them ended with an error.
    """
    context = multiprocessing.get_context("spawn")
    answers, start = context.SimpleQueue(), context.Barrier(count, timeout=TIMEOUT_S)
    processes = [
        context.Process(target=_answer, args=(run, arguments, start, answers)) for _ in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            raise InputError("A process beside the job ended with an error; see above.")
    return [answers.get() for _ in processes]


def _answer(run: Callable[..., Any], arguments: tuple[Any, ...], start: Any, answers: Any) -> None:
    answers.put(run(*arguments, start))
