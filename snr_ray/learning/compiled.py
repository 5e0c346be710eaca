"""The objective of a step as one graph that torch.compile makes: its random numbers come from
outside, since a graph may hold no generator.

    what a batch asks for, once --> numbers of this step --> compiled objective

The numbers are those that the objective would have drawn itself, in the same order.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from snr_ray.config import Config
from snr_ray.learning.drawing import Drawing

WORTH_STEPS = 1000
"""Steps from which on a run is compiled by itself: compiling takes a minute or so."""


def is_wanted(config: Config, device: torch.device) -> bool:
    """Whether train.compile asks for it on a device."""
    train = config.train
    if train.compile == "auto":
        fits = config.noise.views_per_pixel is None and not config.model.physics
        return fits and device.type == "cuda" and train.steps >= WORTH_STEPS
    return bool(train.compile)


class Compiled:
    """Compiles an objective in place."""

    def __init__(
        self, objective: nn.Module, *, backend: str | Callable[..., Any] = "inductor"
    ) -> None:
        self.objective, self.draw = objective, Drawing(objective)
        objective.compile(fullgraph=True, dynamic=False, backend=backend)

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
