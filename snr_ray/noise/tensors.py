"""The noise operator on tensors, with gradients. Equal to `operator` to 1e-4."""

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from snr_ray.config import InputError, check
from snr_ray.noise.operator import NoiseSpec, RadonNoise, noise_operator


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
        return noise_of_spec(images, self.noise.spec)


def noise_of_spec(images: Tensor, spec: NoiseSpec) -> Tensor:
    """Noisy versions [..., H, W] float32 of clean images [..., H, W]; of photons, the mean."""
    arguments = spec.n_views, spec.filter, spec.angle_range
    noisy: Tensor = torch.ops.snr_ray.times(images.float(), *arguments)
    return noisy


# Operators of torch's own kind, with plain arguments: torch.compile takes them as they are. Defined
# step by step, since torch.library.custom_op imports the compiler, 1.5 s, at the first call.
_ARGUMENTS = "(Tensor images, int n_views, str filter, float angle_range) -> Tensor"
torch.library.define("snr_ray::times", _ARGUMENTS)
torch.library.define("snr_ray::transposed", _ARGUMENTS)


@torch.library.impl("snr_ray::times", "default")
def _times(images: Tensor, n_views: int, filter: str, angle_range: float) -> Tensor:
    """The linear map: by kernels where the images are on a GPU that Triton knows, else by the
    compiled loops."""
    return _applied("times", images, NoiseSpec(n_views, filter, angle_range))


@torch.library.impl("snr_ray::transposed", "default")
def _transposed(images: Tensor, n_views: int, filter: str, angle_range: float) -> Tensor:
    """Its exact transpose, for the gradients."""
    return _applied("transposed", images, NoiseSpec(n_views, filter, angle_range))


@torch.library.register_fake("snr_ray::times")
@torch.library.register_fake("snr_ray::transposed")
def _shaped(images: Tensor, n_views: int, filter: str, angle_range: float) -> Tensor:
    return images.new_empty(images.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.spec = inputs[1:]


def _back(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    return torch.ops.snr_ray.transposed(gradient, *ctx.spec), None, None, None


torch.library.register_autograd("snr_ray::times", _back, setup_context=_keep)


def _applied(name: str, images: Tensor, spec: NoiseSpec) -> Tensor:
    noise = noise_operator(spec, images.shape[-2], images.shape[-1])
    if images.is_cuda and importlib.util.find_spec("triton") is not None:
        from snr_ray.noise import kernels

        with torch.cuda.device(images.device):
            made: Tensor = getattr(kernels, name)(noise, images.flatten(0, -3))
        return made.reshape(images.shape)
    made = torch.from_numpy(getattr(noise, name)(images.detach().cpu().numpy()))
    return made.to(images.device)
