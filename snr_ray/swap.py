"""The swap: decode the content of one image with the noise code of another.

A clean donor's noise code removes noise, a noisy donor's injects it.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from snr_ray.blocks import Normal
from snr_ray.hvae import HVAE

Array = npt.NDArray[np.float32]

N_DONORS = 64
"""Noise codes of single images kept per noise id, for random donors without their images."""


@dataclass(frozen=True)
class NoiseCodes:
    """Noise codes of donor images, per level and noise id (0 is clean).

    `donors[level]` is [n_ids + 1, n_donors, C_noise, h, w]; vectors have h = w = 1.
    """

    donors: list[Tensor]

    @property
    def n_donors(self) -> int:
        """Donors kept per noise id."""
        return int(self.donors[0].shape[1])

    def mean(self, noise_id: int) -> list[Tensor]:
        """Mean noise code of one id per level: [1, C_noise, h, w]."""
        return [level[noise_id].mean(0, keepdim=True) for level in self.donors]

    def pick(self, noise_id: int, donor: npt.NDArray[np.int64]) -> list[Tensor]:
        """Noise codes of chosen donors per level: [len(donor), C_noise, h, w]."""
        index = torch.from_numpy(donor)
        return [level[noise_id][index.to(level.device)] for level in self.donors]


@torch.inference_mode()
def noise_code(model: HVAE, images: Array) -> list[Tensor]:
    """Mean noise code of donor images [B, C, H, W] per level: [1, C_noise, h, w]."""
    features = model.bottom_up(_tensor(model, images))
    return [q.mu.mean(0, keepdim=True) for q in model.noise_posteriors(features)]


@torch.inference_mode()
def collect(model: HVAE, by_noise_id: list[Array]) -> NoiseCodes:
    """Noise codes of donor images; entry k of the list holds [n_donors, C, H, W] of noise id k."""
    per_id = []
    for images in by_noise_id:
        features = model.bottom_up(_tensor(model, images))
        per_id.append([q.mu for q in model.noise_posteriors(features)])
    return NoiseCodes([torch.stack(level) for level in zip(*per_id, strict=True)])


@torch.inference_mode()
def swap(
    model: HVAE, images: Array, noise: list[Tensor] | None, *, normal: Normal | None = None
) -> Array:
    """Images [B, C, H, W] with other noise codes, or their own where `noise` is None.

    Args:
        model: in eval mode, on any device.
        images: float32, not clipped: the network sees the range that the noise has.
        noise: codes per level, [1 or B, C_noise, h, w].
        normal: source of sampling noise; None decodes posterior means.

    Returns:
        [B, C, H, W] float32, not clipped.
    """
    return model(_tensor(model, images), noise=noise, normal=normal).image.cpu().numpy()


def _tensor(model: HVAE, images: Array) -> Tensor:
    """Images on the model's device, in the memory layout its convolutions are fastest in."""
    tensor = torch.from_numpy(np.ascontiguousarray(images, np.float32)).to(model.top.device)
    return tensor.contiguous(memory_format=torch.channels_last)
