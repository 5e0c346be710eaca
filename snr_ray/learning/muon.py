"""The optimizer: Muon for the kernels of convolutions, which are matrices; Adam for the rest.

Source: Jordan et al., Muon: an optimizer for hidden layers in neural networks (2024). torch.optim
has Muon for two-dimensional parameters only, one after the other. Kernels have four dimensions and
a network has dozens of them, so here all go through the same few products.
"""

import functools
from collections import defaultdict
from collections.abc import Iterable

import numpy as np
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
ROWS_STEP = 32
"""Matrices are padded with zeros to a multiple of so many rows, and those of one height go through
the same products: few products for a network, and few zeros in them."""


class Muon(torch.optim.Optimizer):
    """Gradient descent with momentum in which every kernel's update is made orthogonal.

    Adam scales each weight alone, so a few strong directions of a kernel's gradient decide its
    step; here all directions move alike. A kernel is the matrix [out, in * height * width].

    `found_inf`, as of torch's fused optimizers: a scalar tensor that the caller may set; 1
    leaves kernels and momenta as they are, and the host need not wait to learn which it is.
    """

    found_inf: Tensor | None = None

    def __init__(self, kernels: Iterable[nn.Parameter], lr: float) -> None:
        """`kernels`: parameters [out, in, height, width]."""
        super().__init__(kernels, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the gradients in place; kernels without one stay."""
        for group in self.param_groups:
            kernels: list[Tensor] = [k for k in group["params"] if k.grad is not None]
            if kernels:
                self._step(kernels, group["lr"])

    def _step(self, kernels: list[Tensor], lr: float | Tensor) -> None:
        gradient = _flat([kernel.grad for kernel in kernels if kernel.grad is not None])
        momentum = self._momentum(kernels)
        moves = torch.ones((), device=gradient.device)
        if self.found_inf is not None:
            moves = 1 - self.found_inf
            gradient = torch.where(moves > 0, gradient, momentum)
        momentum.lerp_(gradient, 1 - MOMENTUM)
        stacks = _stacks(tuple(kernel.shape for kernel in kernels), gradient.device)
        update = stacks.orthogonal(gradient.lerp(momentum, MOMENTUM), lr * moves)
        torch._foreach_mul_(kernels, 1 - lr * WEIGHT_DECAY * moves)
        torch._foreach_sub_(kernels, _like(update, kernels))

    def _momentum(self, kernels: list[Tensor]) -> Tensor:
        """The momenta of kernels as one tensor, of which the states of the kernels are parts."""
        states = [self.state[kernel] for kernel in kernels]
        if any(not state for state in states) or not _adjacent([s["momentum"] for s in states]):
            momenta = [
                s.get("momentum", torch.zeros_like(k)) for s, k in zip(states, kernels, strict=True)
            ]
            for state, part in zip(states, _like(_flat(momenta), kernels), strict=True):
                state["momentum"] = part
        first = states[0]["momentum"]
        return first.as_strided((sum(kernel.numel() for kernel in kernels),), (1,))


def orthogonal(matrices: Tensor, scale: Tensor | float = 1.0, out: Tensor | None = None) -> Tensor:
    """Matrices [n, rows, columns] with all singular values moved near `scale` (0.7 to 1.2 of it).

    The polynomial is iterated on the smaller Gram matrix, which is cheaper than on the matrix. Rows
    and columns of zeros stay, and change nothing in the others.
    """
    wide = matrices.shape[1] <= matrices.shape[2]
    gram = matrices @ matrices.mT if wide else matrices.mT @ matrices
    norm = gram.diagonal(dim1=1, dim2=2).sum(1)[:, None, None].sqrt() + 1e-12
    gram = gram / norm.square()
    a, b, c = NEWTON_SCHULZ
    factor = None
    for left in reversed(range(N_ITERATIONS)):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=1, dim2=2).add_(a)
        factor = polynomial if factor is None else polynomial @ factor
        if left:
            gram = polynomial @ gram @ polynomial
    assert factor is not None
    factor = factor * (scale / norm)
    return torch.bmm(factor, matrices, out=out) if wide else torch.bmm(matrices, factor, out=out)


class Stacks:
    """Kernels as a few stacks of padded matrices: where their values lie in each other.

    Wide matrices lie as they are and tall ones on their side, so that rows are the smaller number.
    """

    def __init__(self, shapes: tuple[torch.Size, ...], device: torch.device) -> None:
        """`shapes` of kernels [out, in, height, width], in the order of their values."""
        starts = np.cumsum([0, *(shape.numel() for shape in shapes)])
        nowhere = starts[-1]
        by_height = defaultdict(list)
        for k, shape in enumerate(shapes):
            places = np.arange(starts[k], starts[k + 1], dtype=np.int32).reshape(shape[0], -1)
            places = places if places.shape[0] <= places.shape[1] else places.T
            by_height[-(-len(places) // ROWS_STEP) * ROWS_STEP].append(places)
        self.shapes: list[tuple[int, int, int]] = []
        self.lengths = []
        """Per stack [n, 1, 1]: what makes an update of a kernel's shape as long as Adam's."""
        into = []
        for height, members in sorted(by_height.items()):
            width = max(places.shape[1] for places in members)
            stack = np.full((len(members), height, width), nowhere, np.int32)
            for matrix, places in zip(stack, members, strict=True):
                matrix[: places.shape[0], : places.shape[1]] = places
            self.shapes.append(stack.shape)
            into.append(stack.ravel())
            rms = [RMS * max(places.shape) ** 0.5 for places in members]
            self.lengths.append(torch.tensor(rms, device=device)[:, None, None])
        index = np.concatenate(into)
        back = np.empty(nowhere, np.int32)
        held = np.flatnonzero(index < nowhere)
        back[index[held]] = held
        self.into, self.back = (torch.from_numpy(x).to(device) for x in (index, back))
        # Kept from step to step: on a CPU, new memory of this size costs more than the products.
        self.padded, self.spread, self.updates = (
            torch.zeros(n, device=device) for n in (nowhere + 1, len(index), len(index))
        )

    def orthogonal(self, flat: Tensor, scale: Tensor) -> Tensor:
        """Flat kernels -> their orthogonal updates times `scale`, a scalar, in the same order."""
        self.padded[:-1].copy_(flat)
        torch.index_select(self.padded, 0, self.into, out=self.spread)
        sizes = [n * rows * columns for n, rows, columns in self.shapes]
        stacks = zip(self.spread.split(sizes), self.updates.split(sizes), strict=True)
        for shape, lengths, (stack, update) in zip(self.shapes, self.lengths, stacks, strict=True):
            orthogonal(stack.view(shape), scale * lengths, out=update.view(shape))
        return self.updates.index_select(0, self.back)


_stacks = functools.lru_cache(maxsize=16)(Stacks)


def _flat(kernels: list[Tensor]) -> Tensor:
    """All values of kernels, row by row. Within a row they come in the order of channels_last,
    which kernels are kept in: an order of columns does not matter to `orthogonal`."""
    return torch.cat([kernel.permute(0, 2, 3, 1).flatten() for kernel in kernels])


def _like(flat: Tensor, kernels: list[Tensor]) -> list[Tensor]:
    """Parts of flat values in the shapes of the kernels."""
    parts = flat.split([kernel.numel() for kernel in kernels])
    return [
        part.view(kernel.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
        for part, kernel in zip(parts, kernels, strict=True)
    ]


def _adjacent(parts: list[Tensor]) -> bool:
    """Whether tensors lie one behind the other in one storage, in the order of `_flat`."""
    storage, end = parts[0].untyped_storage().data_ptr(), parts[0].data_ptr()
    for part in parts:
        mine = part.untyped_storage().data_ptr() == storage and part.data_ptr() == end
        if not mine or not part.permute(0, 2, 3, 1).is_contiguous():
            return False
        end += part.nbytes
    return True
