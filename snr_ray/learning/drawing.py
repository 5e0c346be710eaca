"""Random numbers of a step, drawn before it: a graph may hold no generator.

    what a batch of a shape asks for, once --> numbers of this step, in that order

The numbers are those that the objective would have drawn itself.
"""

import torch
from torch import Tensor, nn

from snr_ray.learning.batches import Batch, StepNormal


class Drawn:
    """Numbers in the order in which they are asked for; in place of `StepNormal`."""

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


class Drawing:
    """Draws what an objective asks for."""

    def __init__(self, objective: nn.Module) -> None:
        self.objective = objective
        self._asked: dict[tuple[int, ...], list[tuple[int, ...] | int]] = {}

    def __call__(self, batch: Batch, normal: StepNormal) -> Drawn:
        """The numbers for a batch of this shape; its noisy images may still have to be made."""
        clean, noisy, n_views = batch.tensors()
        key = tuple(clean.shape)
        if key not in self._asked:
            if noisy is None:
                assert n_views is not None
                noisy = clean.new_zeros(*n_views.shape, *clean.shape[1:])
            asked = _Asked(clean.device)
            with torch.no_grad():
                shape = Batch(clean, noisy, n_views)
                self.objective.forward(shape, asked, torch.ones((), device=clean.device))
            self._asked[key] = asked.shapes
        shapes = self._asked[key]
        return Drawn([normal.uniform(s) if isinstance(s, int) else normal(s) for s in shapes])
