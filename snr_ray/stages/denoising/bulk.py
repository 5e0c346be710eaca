"""Any number of images through a cluster: blocks of indices in, tables of rows out.

    plan --blocks--> work, a bounded number at once --tables--> who asked

The driver keeps no list of images or blocks, so its memory and its time to the first result do not
grow with the collection. A block that ends in an error, or whose worker is killed twice, is halved
until the image that does it is alone; that fails, if a process of its own is killed too.
"""

import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
from ray import exceptions as lost

from snr_ray.errors import InputError, Lost, RunError

Indices = npt.NDArray[np.int64]
KILLS = 2
"""How often the process of a lone image may be killed before it is given up."""
STALL_MINUTES = 30.0
"""A job in which nothing was finished for so long is ended."""
FIRST, RAMP = 16, 8
"""So many blocks at the beginning are so many times smaller: what they say is there soon."""
LOOK_S = 1.0
"""Seconds between looks at the cluster while nothing is finished."""
_LOST = (
    lost.WorkerCrashedError,
    lost.OutOfMemoryError,
    lost.NodeDiedError,
    lost.ObjectLostError,
    lost.ActorDiedError,
    lost.ActorUnavailableError,
)


@dataclass(frozen=True)
class Block:
    """Images that are done together."""

    indices: Indices
    kills: int = 0
    """How often its process was killed, as it is or in a larger block."""

    @property
    def alone(self) -> bool:
        """Whether it needs a process of its own."""
        return self.kills > 0


@dataclass(frozen=True)
class Work:
    """How blocks are done."""

    start: Callable[[Block], "ray.ObjectRef"]
    """Starts a block; the reference is to its table."""
    width: Callable[[], int]
    """How many blocks should be under way."""
    failed: Callable[[int, str, str], pa.Table]
    """The table of an image that cannot be done: `killed` or `error`, and the reason."""


def ramp_of(per_block: int) -> int:
    """Images of the small blocks at the beginning of a job."""
    return FIRST * max(1, per_block // RAMP)


def plan(n_images: int, done: npt.NDArray[np.bool_], per_block: int) -> Iterator[Block]:
    """Blocks of neighbours that are not done; the borders are the same whatever is done."""
    small, ramp = max(1, per_block // RAMP), min(ramp_of(per_block), n_images)
    starts = itertools.chain(range(0, ramp, small), range(ramp, n_images, per_block))
    for start, stop in itertools.pairwise(itertools.chain(starts, [n_images])):
        left = start + np.flatnonzero(~done[start:stop])
        if len(left):
            yield Block(left)


def tables(
    blocks: Iterator[Block], work: Work, *, stall_minutes: float = STALL_MINUTES
) -> Generator[pa.Table]:
    """Do all blocks; their tables as they come.

    Raises:
        InputError, RunError: what a task raised, which ends the job.
        Lost: if nothing was finished for `stall_minutes`.
    """
    again: deque[Block] = deque()
    under_way: dict[ray.ObjectRef, Block] = {}
    moved = time.monotonic()
    try:
        while True:
            width = work.width()
            while len(under_way) < width:
                block = again.popleft() if again else next(blocks, None)
                if block is None:
                    break
                under_way[work.start(block)] = block
            if not under_way:
                return
            ready, _ = ray.wait(list(under_way), timeout=LOOK_S)
            if ready and len(under_way) > 1:  # all that are
                ready, _ = ray.wait(list(under_way), num_returns=len(under_way), timeout=0)
            for ref in ready:
                block = under_way.pop(ref)
                moved = time.monotonic()
                try:
                    yield ray.get(ref)
                except (*_LOST, lost.RayTaskError) as error:
                    cause = error.cause if isinstance(error, lost.RayTaskError) else error
                    if isinstance(cause, InputError | RunError):
                        raise cause from None
                    rest, table = _after(block, cause, work)
                    again.extend(rest)
                    if table is not None:
                        yield table
            if time.monotonic() - moved > 60 * stall_minutes:
                raise Lost(_stalled(under_way, stall_minutes))
    finally:
        for ref in under_way:
            ray.cancel(ref, force=False)


def _after(block: Block, error: Exception, work: Work) -> tuple[list[Block], pa.Table | None]:
    """What is tried next of a block that ended in an error, and what is given up."""
    killed = isinstance(error, _LOST)
    if killed and not block.kills:  # as it was: in other company a pixel may be rounded otherwise
        return [Block(block.indices, kills=1)], None
    if len(block.indices) > 1:
        halves = np.array_split(block.indices, 2)
        return [Block(half, kills=int(killed)) for half in halves], None
    if killed and block.kills < KILLS:
        return [Block(block.indices, block.kills + 1)], None
    if not killed:
        said = " ".join(str(error).split())[:300]
        reason = f"It ended in an error that is not known here ({type(error).__name__}: {said})."
    elif isinstance(error, lost.OutOfMemoryError):
        reason = "Its process was killed each time it was tried: the node ran out of memory."
    else:
        reason = (
            "Its process was killed each time it was tried, as those are that crash or need more "
            "memory than there is."
        )
    return [], work.failed(int(block.indices[0]), "killed" if killed else "error", reason)


def _stalled(under_way: "dict[ray.ObjectRef, Block]", minutes: float) -> str:
    free, there = ray.available_resources(), ray.cluster_resources()
    cores = f"{free.get('CPU', 0):.0f} of {there.get('CPU', 0):.0f} cores are free"
    return (
        f"A job must get on within {minutes:g} minutes, but none of {len(under_way)} blocks under "
        f"way was finished ({cores}); look at the nodes and the storage, or give --stall more "
        "minutes"
    )
