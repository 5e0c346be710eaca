"""The noise operator on tensors, for images that are on a GPU already. Equal to `radon` to 1e-4."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor, nn

from snr_ray.config import InputError, check
from snr_ray.noise.operator import OFFSET, RadonNoise


class TorchNoise(nn.Module):
    """An operator's matrices as buffers: `.to(device)` moves it. Exact, so without photon noise.

    Gradients flow to the images.
    """

    projection: Tensor
    """Sparse [A*N, H*W]"""
    order: Tensor
    """[H*W] pixel at each place of their pixel axis, and the other way round `places`"""
    places: Tensor
    filter: Tensor
    """Dense [N, N]"""
    back: Tensor
    """Sparse [H*W, A*N]"""
    flat: Tensor
    """[H*W, 1], what an image that is OFFSET everywhere becomes"""

    def __init__(self, noise: RadonNoise) -> None:
        """Share nothing with `noise`.

        Raises:
            InputError: if it counts photons; their noise is drawn on the CPU.
        """
        super().__init__()
        check(
            not noise.spec.photons,
            f"The noise operator on tensors counts no photons, but got {noise.spec.photons}; "
            "use snr_ray.noise_operator.",
        )
        self.spec, self.height, self.width = noise.spec, noise.height, noise.width
        order = torch.from_numpy(noise.order)
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("places", order.argsort(), persistent=False)
        for name, rows in (("projection", noise.projection), ("back", noise.back)):
            self.register_buffer(name, _sparse(rows.scipy()), persistent=False)
        kernel = torch.from_numpy(noise.filter.scipy().toarray())
        self.register_buffer("filter", kernel, persistent=False)
        middle = np.full((noise.height, noise.width), OFFSET, np.float32)
        flat = torch.from_numpy(noise(middle)).reshape(-1, 1)
        self.register_buffer("flat", flat, persistent=False)
        self.transposes: dict[str, Tensor] = {}
        """Of the sparse matrices: made for the first gradients, twice the memory."""

    def forward(self, images: Tensor) -> Tensor:
        """Noisy versions [..., H, W] float32 of clean images [..., H, W] float in [0, 1].

        Raises:
            InputError: if images have another shape.
        """
        if images.shape[-2:] != (self.height, self.width):
            raise InputError(
                f"This operator is for {self.height}x{self.width} images, but got "
                f"{images.shape[-2]}x{images.shape[-1]}."
            )
        pixels = images.float().reshape(-1, self.height * self.width)
        columns = pixels[:, self.order].T - OFFSET
        sinogram = self._times("projection", columns)  # [A*N, B]
        filtered = self.filter @ sinogram.unflatten(0, (self.spec.n_views, -1))  # [A, N, B]
        noisy = self._times("back", filtered.flatten(0, 1))
        noisy = noisy[self.places] + self.flat
        return noisy.T.reshape(images.shape)

    def _times(self, name: str, columns: Tensor) -> Tensor:
        matrix = self.get_buffer(name)
        if not columns.requires_grad:
            return matrix @ columns
        transpose = self.transposes.get(name)
        if transpose is None or transpose.device != matrix.device:
            transpose = self.transposes[name] = _quiet(lambda: matrix.t().to_sparse_csr())
        product: Tensor = _Times.apply(columns, matrix, transpose)
        return product


class _Times(torch.autograd.Function):
    """matrix @ columns. On a CPU, autograd's own would transpose the matrix at every step, which
    takes ten times as long as the product."""

    @staticmethod
    def forward(ctx: Any, columns: Tensor, matrix: Tensor, transpose: Tensor) -> Tensor:
        ctx.transpose = transpose
        return matrix @ columns

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.transpose @ gradient, None, None


def _sparse(matrix: csr_array) -> Tensor:
    parts = (matrix.indptr, matrix.indices, matrix.data)
    starts, columns, weights = map(torch.tensor, parts)
    kind = torch.int32 if matrix.nnz < 2**31 else torch.int64  # half the memory
    return _quiet(
        lambda: torch.sparse_csr_tensor(
            starts.to(kind), columns.to(kind), weights, size=matrix.shape, dtype=torch.float32
        )
    )


def _quiet(make: Callable[[], Tensor]) -> Tensor:
    with warnings.catch_warnings():  # torch calls the format a beta
        warnings.simplefilter("ignore")
        return make()
