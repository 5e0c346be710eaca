"""What the nodes of a cluster do to a block of images: all in one task, or a GPU between two.

    without GPUs   read, decode, exchange, encode, write: one task, whose process keeps its model
    with GPUs      task: read, decode --stacks--> actor that holds a GPU and the model --answers-->
                   task: encode, write

Tasks around a GPU load neither torch nor the model, and the next stacks are copied to the GPU while
it works on those before. A block that was under way when a process was killed is done anew on
cores, by a process that serves no other block.
"""

import contextlib
import gc
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
from ray import cloudpickle
from ray.core.generated.gcs_pb2 import ActorTableData

from snr_ray.config import ImagesConfig
from snr_ray.errors import InputError, Lost
from snr_ray.images.collection import Source
from snr_ray.stages.denoising.bulk import RAMP, Block, Indices, Work
from snr_ray.stages.denoising.imagefiles import (
    HELD_PIXELS,
    PASS_PIXELS,
    ROW_SCHEMA,
    Answer,
    ImageFile,
    Opened,
    Row,
    Stack,
    Target,
    failure,
    open_files,
    read_files,
    write_files,
)
from snr_ray.stages.job.connection import ON_CORES, cpus, gpus
from snr_ray.stages.job.waiting import SAY_S

if TYPE_CHECKING:  # torch is slow to import, and most of what is here does without
    from snr_ray.stages.denoising.fileswap import FileSwapper

BLOCKS_PER_CORE = 2
"""Blocks under way for each core: the next is there when one is finished."""
QUEUED = 4
"""Blocks that wait for each GPU at most: what they hold is on its node when their turn comes."""
GPU_SHARE = 0.25
"""Of the free memory of a GPU, what a stack may take."""
GPU_BYTES = 2048
"""Of its memory for each value of an image, at the least."""
LOOK_AT = 8
"""Files of which one should be readable."""
LOOK_S = 5.0
"""Seconds after which the number of cores is asked for anew."""
LOST_LOOK_S = 0.5
"""Seconds between two looks for a GPU, where all are lost."""
STAND_IN = "SNR_RAY_GPU_IS_CPU"
"""Set in the environment, a Ray GPU is served by the processor: for tests of the pipeline alone."""


Maker = Callable[[str], "FileSwapper"]
"""device name -> what has the model on it."""
Packed = npt.NDArray[np.uint8]


def packed(maker: Maker) -> Packed:
    """A maker as bytes that the processes of a node share, and unpack only to hold a model."""
    return np.frombuffer(cloudpickle.dumps(maker), np.uint8)


@dataclass(frozen=True)
class Cleaning:
    """All that tasks need to know of a job."""

    key: str
    """Changes with the model and with what is asked of it: a process that has it keeps it."""
    source: Source
    images: ImagesConfig
    target: Target
    per_value: int
    """Bytes of memory that cleaning takes for each value of an image."""
    pass_values: int = PASS_PIXELS
    """Values of images that pass the network together."""
    finds_over: float | None = None
    """Degrees that the views of images are spread over, whose counts are to be found; None: they
    are not."""


def on_cores(job: Cleaning, maker: Maker) -> Work:
    """Blocks as one task each."""
    ref, model = ray.put(job), ray.put(packed(maker))

    def start(block: Block) -> "ray.ObjectRef":
        return (_clean_alone if block.alone else _clean).remote(ref, model, block.indices)

    return Work(start, _Width(), _failed(job))


def on_gpus(job: Cleaning, maker: Maker, n_gpus: int, wait_minutes: float, per_block: int) -> Work:
    """Blocks of at most so many images through actors with a GPU each.

    Raises:
        InputError: if Ray counts GPUs that torch cannot use, or that others do not give back.
        Lost: from a start, if all of them are lost for so many minutes.
    """
    ref, model = ray.put(job), ray.put(packed(maker))
    gpu = ray.remote(_Gpu).options(num_gpus=1, num_cpus=0, max_restarts=-1)
    actors = [gpu.remote() for _ in range(n_gpus)]
    asked = [actor.problem.remote(ref, model) for actor in actors]
    late = time.monotonic() + 60 * wait_minutes
    while True:
        left = late - time.monotonic()
        ready, _ = ray.wait(asked, num_returns=n_gpus, timeout=max(0.0, min(SAY_S, left)))
        if len(ready) == n_gpus:
            break
        if left <= SAY_S:
            why = "others hold them" if gpus() >= n_gpus else f"only {gpus()} are there"
            raise InputError(
                f"{n_gpus} GPUs must be free within {wait_minutes:g} minutes, but {why}; ask for "
                "fewer with --gpus, or give --stall more minutes."
            )
        print(
            f"denoise: waiting for {n_gpus - len(ready)} of {n_gpus} GPUs; {gpus()} are there",
            file=sys.stderr,
            flush=True,
        )
    problems = [said for said in ray.get(asked) if said]
    if problems:
        raise InputError(problems[0])
    fitting = min(ray.get([actor.fitting.remote(job.per_value) for actor in actors]))
    ref = ray.put(replace(job, pass_values=fitting))
    for actor in actors:  # while the first blocks are read
        actor.warm.remote(ref, model, per_block)
    turns = _Turns(actors, wait_minutes)

    def start(block: Block) -> "ray.ObjectRef":
        if block.alone:  # what waits for a GPU dies with its process, whichever block is to blame
            return _clean_alone.remote(ref, model, block.indices)
        opened, stacks = _read.remote(ref, block.indices)
        answers = turns.next().answer.remote(ref, model, stacks)
        return _write.remote(ref, opened, stacks, answers)

    return Work(start, _Width(more=QUEUED * n_gpus), _failed(job))


class _Turns:
    """Actors in turn, but for those that are lost: Ray starts them anew where it finds a GPU, and
    what they are asked until then fails at once."""

    def __init__(self, actors: Sequence[Any], wait_minutes: float) -> None:
        self.actors, self.wait_minutes, self.turn = actors, wait_minutes, 0

    def next(self) -> Any:
        """An actor that lives. Raises Lost if there is none for so many minutes."""
        begun = said = time.monotonic()
        while True:
            for _ in self.actors:
                self.turn = (self.turn + 1) % len(self.actors)
                actor = self.actors[self.turn]
                if actor._get_local_state() == ActorTableData.ALIVE:
                    return actor
            now = time.monotonic()
            if now - begun > 60 * self.wait_minutes:
                raise Lost(
                    f"A GPU must be there within {self.wait_minutes:g} minutes, but all "
                    f"{len(self.actors)} are lost"
                )
            if now - said > SAY_S:
                said = now
                print("denoise: waiting for a GPU; all are lost", file=sys.stderr, flush=True)
            time.sleep(LOST_LOOK_S)


class _Width:
    """How many blocks a cluster of the present size has work for."""

    def __init__(self, more: int = 0) -> None:
        self.more, self.asked, self.width = more, 0.0, 0

    def __call__(self) -> int:
        now = time.monotonic()
        if now - self.asked > LOOK_S:
            self.asked, self.width = now, BLOCKS_PER_CORE * cpus() + self.more
        return self.width


def _failed(job: Cleaning) -> Callable[[int, str, str], pa.Table]:
    def row(index: int, stage: str, reason: str) -> pa.Table:
        return _table([failure(ImageFile(job.source.ids[index], "", "", b""), stage, reason)])

    return row


def _table(rows: list[Row]) -> pa.Table:
    return pa.Table.from_pylist(rows, ROW_SCHEMA)


# Ray never starts a task again: the driver knows what to try next. What tasks need comes as
# arguments: one that waits for an object lends its core to another, and then two share it.
_TASK: dict[str, Any] = {"num_cpus": 1, "max_retries": 0, **ON_CORES}


def _clean_block(job: Cleaning, model: Packed, indices: Indices) -> pa.Table:
    """All of a block: its rows and failures."""
    files = read_files(job.source, indices.tolist())
    return _table(_swapper(job, model).run(files, job.images, job.target, job.per_value))


_clean = ray.remote(**_TASK)(_clean_block)
_clean_alone = ray.remote(**_TASK, max_calls=1)(_clean_block)

_KEPT: dict[str, "FileSwapper"] = {}


def _swapper(job: Cleaning, model: Packed, device: str = "cpu") -> "FileSwapper":
    """The model of a job, loaded once in each process."""
    if job.key not in _KEPT:
        _KEPT.clear()
        with _uncollected():
            import torch

            if device == "cpu":
                torch.set_num_threads(1)
            _KEPT[job.key] = cloudpickle.loads(model.tobytes())(device)
    return _KEPT[job.key]


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Without looking for garbage: imports make many objects and hardly any of it."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


Portion = tuple[list[Opened], int, list[Row]]
"""Opened files, how many stacks they have, and the failures before them."""


def _read_block(job: Cleaning, indices: Indices) -> tuple[list[Portion], list[Stack]]:
    """Decoded images: what is to be known of the files, and the pixels."""
    files = read_files(job.source, indices.tolist())
    portions: list[Portion] = []
    stacks: list[Stack] = []
    for opened, some, failed in open_files(files, job.images, job.per_value, job.pass_values):
        portions.append((opened, len(some), failed))
        found = some if job.finds_over is None else [_looked_at(s, job.finds_over) for s in some]
        stacks += found
    return portions, stacks


def _looked_at(stack: Stack, angle_range: float) -> Stack:
    """With what its spectra say: it takes as long as all else of an answer, and here cores share
    it."""
    from snr_ray.noise.likelyviews import SMALLEST_SIDE, likely  # SciPy, which few jobs need

    if min(stack.pixels.shape[2:]) < SMALLEST_SIDE:
        return stack
    return replace(stack, likely=likely(stack.pixels, angle_range))


_read = ray.remote(**_TASK, num_returns=2)(_read_block)


@ray.remote(**_TASK)
def _write(
    job: Cleaning,
    portions: list[Portion],
    stacks: list[Stack],
    answers: list[Answer],
) -> pa.Table:
    rows: list[Row] = []
    first = 0
    for opened, n_stacks, failed in portions:
        some = slice(first, first + n_stacks)
        rows += failed + write_files(opened, stacks[some], answers[some], job.target)
        first += n_stacks
    return _table(rows)


class _Gpu:
    """Holds a GPU and the model on it. One thread does it all: what cuDNN learns of a shape it
    keeps for each thread, and two at once were no faster on an H100."""

    def __init__(self) -> None:
        self._device = "cpu" if STAND_IN in os.environ else "cuda"

    def problem(self, job: Cleaning, model: Packed) -> str:
        """Why the GPU cannot be used, "" if it can; then the model is loaded."""
        import torch

        if self._device == "cuda" and not torch.cuda.is_available():
            return (
                "A GPU that Ray counts must be one that torch can use, but torch finds none on "
                f"{socket.gethostname()}; install a torch for its driver, or give --gpus none."
            )
        _swapper(job, model, self._device)
        return ""

    def fitting(self, per_value: int) -> int:
        """Values of images that fit in the GPU's memory at once."""
        import torch

        if self._device == "cpu":
            return PASS_PIXELS
        free, _ = torch.cuda.mem_get_info()
        values = GPU_SHARE * free / max(per_value, GPU_BYTES)
        return int(np.clip(values, PASS_PIXELS, HELD_PIXELS))

    def warm(self, job: Cleaning, model: Packed, per_block: int) -> None:
        """Answer images like the first that can be read, in stacks as blocks have them: what is
        compiled or chosen once for a shape takes seconds."""
        if self._device == "cpu":
            return
        swapper = _swapper(job, model, self._device)
        files = read_files(job.source, range(min(LOOK_AT, len(job.source.ids))))
        for _, stacks, _ in open_files(files, job.images, job.per_value, job.pass_values):
            for stack in stacks[:1]:
                most = max(1, job.pass_values // stack.pixels[0].size)
                for n in (per_block // RAMP, per_block):
                    swapper.answer(_repeated(stack, min(max(1, n), most)))
                return

    def answer(self, job: Cleaning, model: Packed, stacks: list[Stack]) -> list[Answer]:
        """What becomes of stacks."""
        swapper = _swapper(job, model, self._device)
        return [swapper.answer(stack) for stack in stacks]


def _repeated(stack: Stack, n: int) -> Stack:
    """So many images, all of them the first of a stack."""
    return replace(
        stack,
        pixels=np.repeat(stack.pixels[:1], n, axis=0),
        ids=list(stack.ids[:1]) * n,
        owners=list(stack.owners[:1]) * n,
        likely=stack.likely and stack.likely[:1] * n,
    )
