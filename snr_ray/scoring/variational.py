"""Total variation reconstruction: the image of least variation that explains a noisy one.

    min over x in [0, 1] of  weight TV(x) + 1/2 |M x - y|^2,  M the noise operator, y a noisy image

Nothing is learned, but the operator and its view count are known. Where pixels of y are exactly 0
or 1, as files cut them, they are bounds: all of M x beyond them explains them.
"""

import functools

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from snr_ray.network.blocks import unexplained
from snr_ray.network.noisemaker import Alike
from snr_ray.noise.operator import NoiseSpec

Array = npt.NDArray[np.float32]

ITERATIONS = 500
DUAL_STEPS = 3
"""Steps of the inner solver, which goes on from where the last iteration left it."""
POWER_STEPS = 30
MARGIN = 1.05
"""By how much the norm of the operator may be above what these steps say."""
GRADIENT_NORM = 8.0
"""Largest squared norm of the differences of neighbours in two directions."""


def reconstruct(
    noisy: Array, spec: NoiseSpec, weight: float, iterations: int = ITERATIONS
) -> Array:
    """Images [B, C, H, W] in [0, 1] of noisy ones; the channels of a pixel vary together.

    The operator's part is a gradient step with its exact adjoint, the variation a projected
    gradient on its dual; momentum over both. In 100 iterations it is where the primal-dual method
    of Chambolle and Pock is in 800.
    Sources: Beck and Teboulle, Fast gradient-based algorithms for constrained total variation image
    denoising and deblurring problems, IEEE Transactions on Image Processing 18(11), 2009; Bresson
    and Chan, Fast dual minimization of the vectorial total variation norm (2008), for channels.

    Args:
        noisy: [B, C, H, W], not clipped.
        spec: how the noise was made.
        weight: of the total variation.
        iterations: of the outer loop, two calls of the operator each.
    """
    if not len(noisy):
        return noisy
    y = torch.from_numpy(np.ascontiguousarray(noisy, np.float32))
    noise = Alike(spec)
    tau = 1 / _squared_norm(spec, y.shape[-2], y.shape[-1])
    dual_step = 1 / (GRADIENT_NORM * tau)
    x = ahead = y.clamp(0, 1)
    momentum = 1.0
    p = torch.zeros(len(y), 2 * y.shape[1], *y.shape[2:])
    for _ in range(iterations):
        step = ahead + tau * noise.adjoint(unexplained(y, noise(ahead)))
        for _ in range(DUAL_STEPS):
            slope = _differences((step - tau * _adjoint_differences(p)).clamp(0, 1))
            p = _within(p + dual_step * slope, weight)
        new = (step - tau * _adjoint_differences(p)).clamp(0, 1)
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = new + (momentum - 1) / following * (new - x)
        x, momentum = new, following
    return x.numpy()


@functools.lru_cache(maxsize=64)
def _squared_norm(spec: NoiseSpec, height: int, width: int) -> float:
    """Largest eigenvalue of M^T M, by power iteration, and a margin."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, height, width, generator=generator)
    noise, norm = Alike(spec), 1.0
    for _ in range(POWER_STEPS):
        x = noise.adjoint(noise(x))
        norm = float(x.norm())
        x /= norm
    return MARGIN * norm


def _differences(x: Tensor) -> Tensor:
    """To the next pixel below and to the right, 0 at the edge: [B, 2 C, H, W] of [B, C, H, W]."""
    out = torch.zeros(len(x), 2 * x.shape[1], *x.shape[2:])
    down, right = out.chunk(2, dim=1)
    torch.sub(x[:, :, 1:], x[:, :, :-1], out=down[:, :, :-1])
    torch.sub(x[..., 1:], x[..., :-1], out=right[..., :-1])
    return out


def _adjoint_differences(p: Tensor) -> Tensor:
    """[B, C, H, W] of [B, 2 C, H, W], which is 0 at the far edges."""
    down, right = p.chunk(2, dim=1)
    out = -(down + right)
    out[:, :, 1:] += down[:, :, :-1]
    out[..., 1:] += right[..., :-1]
    return out


def _within(p: Tensor, radius: float) -> Tensor:
    """The nearest field whose vector at each pixel, over directions and channels, is that short."""
    length = p.square().sum(1, keepdim=True).sqrt()
    return p / (length / radius).clamp(min=1)
