"""The noise operator on tensors, with gradients. Equal to `operator` to 1e-4."""

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from snr_ray.config import InputError, check
from snr_ray.noise.operator import RadonNoise


class TorchNoise(nn.Module):
    """An operator on tensors of any device. Exact, so without photon noise.

    Gradients flow to the images.
    """

    def __init__(self, noise: RadonNoise) -> None:
        """Of an operator on arrays.

        Raises:
            InputError: if it counts photons; their noise is drawn on the CPU.
        """
        super().__init__()
        check(
            not noise.spec.photons,
            f"The noise operator on tensors counts no photons, but got {noise.spec.photons}; "
            "use snr_ray.noise_operator.",
        )
        self.noise = noise

    def forward(self, images: Tensor) -> Tensor:
        """Noisy versions [..., H, W] float32 of clean images [..., H, W] float in [0, 1].

        Raises:
            InputError: if images have another shape.
        """
        shape = (self.noise.height, self.noise.width)
        if images.shape[-2:] != shape:
            raise InputError(
                f"This operator is for {shape[0]}x{shape[1]} images, but got "
                f"{images.shape[-2]}x{images.shape[-1]}."
            )
        noisy: Tensor = _Linear.apply(images.float(), self.noise)
        return noisy


class _Linear(torch.autograd.Function):
    """The linear map, and its exact transpose for the gradients: by kernels where the images are
    on a GPU that Triton knows, else by the compiled loops."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, noise: RadonNoise) -> Tensor:
        ctx.noise = noise
        if _has_kernels(images):
            return _on_gpu("times", noise, images)
        return torch.from_numpy(noise.times(images.detach().cpu().numpy())).to(images.device)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if _has_kernels(gradient):
            return _on_gpu("transposed", ctx.noise, gradient), None
        clean = ctx.noise.transposed(gradient.detach().cpu().numpy())
        return torch.from_numpy(clean).to(gradient.device), None


def _has_kernels(images: Tensor) -> bool:
    return images.is_cuda and importlib.util.find_spec("triton") is not None


def _on_gpu(name: str, noise: RadonNoise, images: Tensor) -> Tensor:
    from snr_ray.noise import kernels

    with torch.cuda.device(images.device):
        out: Tensor = getattr(kernels, name)(noise, images.flatten(0, -3))
    return out.reshape(images.shape)
