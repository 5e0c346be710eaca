"""The optimizer: Muon for the kernels of convolutions, which are matrices; Adam for the rest.

Source: Jordan et al., Muon: an optimizer for hidden layers in neural networks (2024). torch.optim
has Muon for two-dimensional parameters only; kernels have four dimensions.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the polynomial that drives singular values towards 1 (same source)."""
N_ITERATIONS = 5
RMS = 0.2
"""Root mean square of an update of rate 1, that of Adam in practice, so both share one rate.

Source: Liu et al., Muon is scalable for LLM training (2025), section 2.2.
"""
WEIGHT_DECAY = 0.3
"""Share of a kernel that a rate of 1 would take away. Updates do not shrink with the gradient, so
without it kernels that have nothing left to learn would grow for ever, and their features with
them."""


class Muon(torch.optim.Optimizer):
    """Gradient descent with momentum in which every kernel's update is made orthogonal.

    Adam scales each weight alone, so a few strong directions of a kernel's gradient decide its
    step; here all directions move alike. A kernel is the matrix [out, in * height * width].
    """

    def __init__(self, kernels: Iterable[nn.Parameter], lr: float) -> None:
        """`kernels`: parameters [out, in, height, width]."""
        super().__init__(kernels, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the gradients in place; kernels without one stay."""
        for group in self.param_groups:
            same_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for kernel in group["params"]:
                if kernel.grad is None:
                    continue
                state = self.state[kernel]
                if not state:
                    state["momentum"] = torch.zeros_like(kernel)
                state["momentum"].lerp_(kernel.grad, 1 - MOMENTUM)
                ahead = kernel.grad.lerp(state["momentum"], MOMENTUM).flatten(1)
                same_shape[ahead.shape].append((kernel, ahead))
            for shape, kernels in same_shape.items():
                updates = orthogonal(torch.stack([ahead for _, ahead in kernels]))
                rate = group["lr"] * RMS * max(shape) ** 0.5
                for (kernel, _), update in zip(kernels, updates, strict=True):
                    kernel.mul_(1 - group["lr"] * WEIGHT_DECAY)
                    kernel.sub_(update.view_as(kernel), alpha=rate)


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices [n, rows, columns] with all singular values moved near 1 (0.7 to 1.2).

    The polynomial is iterated on the smaller Gram matrix, which is cheaper than on the matrix.
    """
    rows, columns = matrices.shape[1:]
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-12)
    gram = x @ x.mT if rows <= columns else x.mT @ x
    a, b, c = NEWTON_SCHULZ
    identity = torch.eye(gram.shape[-1], device=gram.device)
    factor = identity.expand_as(gram)
    for _ in range(N_ITERATIONS):
        polynomial = torch.baddbmm(b * gram, gram, gram, alpha=c) + a * identity
        factor = polynomial @ factor
        gram = polynomial @ gram @ polynomial
    return factor @ x if rows <= columns else x @ factor
