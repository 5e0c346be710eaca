"""The noise operator on tensors, with gradients. Equal to `operator` to 1e-4."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from snr_ray.noise.operator import NoiseSpec, noise_operator


def noise_of_spec(images: Tensor, spec: NoiseSpec) -> Tensor:
    """Noisy versions [..., H, W] float32 of clean images [..., H, W]; of photons, the mean."""
    return _alike(torch.ops.snr_ray.times, images, spec)


def adjoint_of_spec(images: Tensor, spec: NoiseSpec) -> Tensor:
    """The adjoint of the linear map `noise_of_spec`, of images [..., H, W] of any values."""
    return _alike(torch.ops.snr_ray.transposed, images, spec)


def _alike(apply: Callable[..., Tensor], images: Tensor, spec: NoiseSpec) -> Tensor:
    n, flat = spec.n_views, images.float().reshape(-1, *images.shape[-2:])
    n_views = torch.full((len(flat),), n, device=images.device)
    return apply(flat, n_views, n, n, spec.filter, spec.angle_range).reshape(images.shape)


@dataclass
class Counts:
    """View counts of images, which only their device knows."""

    each: Tensor
    """[B] int64; 0 leaves an image as it is."""
    least: int
    most: int
    """Bounds of those above 0, which the host does know."""


def noise_of_each(images: Tensor, counts: Counts, filter: str, angle_range: float) -> Tensor:
    """Noisy versions [B, C, H, W] float32 of clean images that have view counts of their own."""
    return _each(torch.ops.snr_ray.times, images, counts, filter, angle_range)


def adjoint_of_each(images: Tensor, counts: Counts, filter: str, angle_range: float) -> Tensor:
    """The adjoint of the linear map `noise_of_each`."""
    return _each(torch.ops.snr_ray.transposed, images, counts, filter, angle_range)


def _each(
    apply: Callable[..., Tensor], images: Tensor, counts: Counts, filter: str, angle_range: float
) -> Tensor:
    flat, each = images.float().flatten(0, 1), counts.each.repeat_interleave(images.shape[1])
    bounds = counts.least, counts.most
    return apply(flat, each, *bounds, filter, angle_range).reshape(images.shape)


# Operators of torch's own kind, with plain arguments: torch.compile takes them as they are. Defined
# step by step, since torch.library.custom_op imports the compiler, 1.5 s, at the first call.
_ARGUMENTS = (
    "(Tensor images, Tensor n_views, int least, int most, str filter, float angle_range) -> Tensor"
)
torch.library.define("snr_ray::times", _ARGUMENTS)
torch.library.define("snr_ray::transposed", _ARGUMENTS)


@torch.library.impl("snr_ray::times", "default")
def _times(images: Tensor, n_views: Tensor, *settings: Any) -> Tensor:
    """The linear map, of images [B, H, W] with view counts [B]: by kernels where they are on a GPU
    that Triton knows, else by the compiled loops."""
    return _applied("times", images, n_views, *settings)


@torch.library.impl("snr_ray::transposed", "default")
def _transposed(images: Tensor, n_views: Tensor, *settings: Any) -> Tensor:
    """Its exact transpose: each is the other's gradient."""
    return _applied("transposed", images, n_views, *settings)


@torch.library.register_fake("snr_ray::times")
@torch.library.register_fake("snr_ray::transposed")
def _shaped(images: Tensor, n_views: Tensor, *settings: Any) -> Tensor:
    return images.new_empty(images.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.settings = inputs[2:]


def _back(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    back = torch.ops.snr_ray.transposed(gradient, *ctx.saved_tensors, *ctx.settings)
    return back, None, None, None, None, None


def _forth(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    forth = torch.ops.snr_ray.times(gradient, *ctx.saved_tensors, *ctx.settings)
    return forth, None, None, None, None, None


torch.library.register_autograd("snr_ray::times", _back, setup_context=_keep)
torch.library.register_autograd("snr_ray::transposed", _forth, setup_context=_keep)


def _applied(
    name: str,
    images: Tensor,
    n_views: Tensor,
    least: int,
    most: int,
    filter: str,
    angle_range: float,
) -> Tensor:
    if images.is_cuda and importlib.util.find_spec("triton") is not None:
        from snr_ray.noise import kernels

        with torch.cuda.device(images.device), torch.autocast("cuda", enabled=False):
            made: Tensor = getattr(kernels, name)(images, n_views, least, most, filter, angle_range)
        return made
    pixels, counts = images.detach().cpu().numpy(), n_views.cpu().numpy()
    out = pixels.copy()
    for n in np.unique(counts[counts > 0]).tolist():
        rows: Any = counts == n
        rows = slice(None) if rows.all() else rows
        noise = noise_operator(NoiseSpec(n, filter, angle_range), *pixels.shape[1:])
        out[rows] = getattr(noise, name)(pixels[rows])
    return torch.from_numpy(out).to(images.device)
