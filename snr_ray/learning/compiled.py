"""The objective of a step as one graph that torch.compile makes: its random numbers come from
outside, since a graph may hold no generator.

    what a batch asks for, once --> numbers of this step --> compiled objective

The numbers are those that the objective would have drawn itself, in the same order.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from snr_ray.config import Config
from snr_ray.learning.batches import Batch, StepNormal

WORTH_STEPS = 1000
"""Steps from which on a run is compiled by itself: compiling takes a minute or so."""


def is_wanted(config: Config, device: torch.device) -> bool:
    """Whether train.compile asks for it on a device."""
    train = config.train
    if train.compile == "auto":
        fits = config.noise.views_per_pixel is None and not config.model.physics
        return fits and device.type == "cuda" and train.steps >= WORTH_STEPS
    return bool(train.compile)


class Drawn:
    """Numbers that were drawn before, in the order in which they are asked for; in place of
    `StepNormal`."""

    def __init__(self, numbers: list[Tensor]) -> None:
        self.numbers, self.given = numbers, 0

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        self.given += 1
        return self.numbers[self.given - 1]

    def uniform(self, n: int) -> Tensor:
        """[n] values in [0, 1)."""
        return self((n,))


class _Asked:
    """Remembers what is asked for, and gives nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.shapes: list[tuple[int, ...] | int] = []

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        self.shapes.append(shape)
        return torch.zeros(shape, device=self.device)

    def uniform(self, n: int) -> Tensor:
        self.shapes.append(n)
        return torch.zeros(n, device=self.device)


class Compiled:
    """Compiles an objective in place, and draws for it."""

    def __init__(
        self, objective: nn.Module, *, backend: str | Callable[..., Any] = "inductor"
    ) -> None:
        self.objective = objective
        self._asked: dict[tuple[int, ...], list[tuple[int, ...] | int]] = {}
        objective.compile(fullgraph=True, dynamic=False, backend=backend)

    def draw(self, batch: Batch, normal: StepNormal) -> Drawn:
        """The numbers that the objective asks for with a batch of this shape."""
        key = tuple(batch.clean.shape)
        if key not in self._asked:
            asked = _Asked(batch.clean.device)
            with torch.no_grad():
                self.objective.forward(batch, asked, torch.ones((), device=batch.clean.device))
            self._asked[key] = asked.shapes
        shapes = self._asked[key]
        return Drawn([normal.uniform(s) if isinstance(s, int) else normal(s) for s in shapes])

    def undo(self, error: Exception) -> None:
        """Go on without, and say why."""
        self.objective._compiled_call_impl = None
        cause = getattr(error, "inner_exception", error)
        reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        print(
            f"train: torch.compile does not work here, so training goes on without it ({reason}); "
            "train.compile=false leaves it out.",
            file=sys.stderr,
            flush=True,
        )
