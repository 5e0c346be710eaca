"""Training steps as CUDA graphs: what a GPU is to do is said once for each shape of a batch, and
replayed. A step of small images is a thousand operations that take longer to ask for than to do.

    batch, random numbers, rates --> their place in memory --> replay: loss, gradients, new weights

The first steps of a shape run as others do: they set up what is set up once.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from snr_ray.config import Config
from snr_ray.learning.batches import Batch, StepNormal
from snr_ray.learning.drawing import Drawing, Drawn

FIRST_STEPS = 3
"""Steps of each shape before it is captured."""

Step = Callable[[Batch, Drawn, Tensor], dict[str, Tensor]]
"""batch, numbers, warm-up -> values: up to the new weights, the same whatever the numbers are."""


def is_capturable(config: Config) -> bool:
    """Whether steps of a run do the same whatever the numbers: all but those that ask which rows
    have which noise id, and those in parts. train.compile=false leaves it out."""
    train = config.train
    return train.compile is not False and not config.model.physics and train.n_parts == 1


class Captured:
    """Runs steps on a GPU, captured where their shape recurs."""

    def __init__(self, step: Step, drawing: Drawing) -> None:
        self.step, self.drawing = step, drawing
        self._seen: dict[tuple[int, ...], int] = {}
        self._graphs: dict[tuple[int, ...], _Graph] = {}
        self._memory = torch.cuda.graph_pool_handle()

    def __call__(self, batch: Batch, normal: StepNormal, warmup: float) -> dict[str, Tensor]:
        """The values of a step that was taken."""
        drawn = self.drawing(batch, normal)
        share = torch.full((), warmup, device=batch.clean.device)
        key = tuple(batch.clean.shape)
        self._seen[key] = self._seen.get(key, 0) + 1
        if self._seen[key] <= FIRST_STEPS:
            return self.step(batch, drawn, share)
        if key not in self._graphs:
            self._graphs[key] = _Graph(self.step, batch, drawn, share, self._memory)
        return self._graphs[key].replay(batch, drawn, share)


class _Graph:
    """One shape."""

    def __init__(self, step: Step, batch: Batch, drawn: Drawn, warmup: Tensor, memory: Any) -> None:
        self.batch = batch.copied()
        self.numbers = [number.clone() for number in drawn.numbers]
        self.warmup = warmup.clone()
        self.graph = torch.cuda.CUDAGraph()
        # Of this thread alone: others may copy batches meanwhile.
        with torch.cuda.graph(self.graph, pool=memory, capture_error_mode="thread_local"):
            values = step(self.batch, Drawn(self.numbers), self.warmup)
            self.names, self.values = list(values), torch.stack(list(values.values()))

    def replay(self, batch: Batch, drawn: Drawn, warmup: Tensor) -> dict[str, Tensor]:
        """The step of other numbers of the same shapes."""
        given = [*batch.tensors(), *drawn.numbers, warmup]
        places = [*self.batch.tensors(), *self.numbers, self.warmup]
        for place, numbers in zip(places, given, strict=True):
            if place is not None and numbers is not None:
                place.copy_(numbers, non_blocking=True)
        self.graph.replay()
        # The next replay, of whatever shape, writes where these are.
        return dict(zip(self.names, self.values.clone().unbind(), strict=True))
