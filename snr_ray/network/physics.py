"""Known geometry: the linear estimate that the encoder sees beside the image, if the user wants."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from snr_ray.errors import InputError
from snr_ray.noise.lmmse import ImagePrior, Lmmse
from snr_ray.noise.operator import RadonNoise

Array = npt.NDArray[np.float32]


class LinearInverse(nn.Module):
    """Linear MMSE estimates of clean images, one linear map per noise id, kept with the weights.

    Of noise id 0, the clean one, the estimate is the image itself; so it is where the id is not
    known. Only images of the size it was fitted for.
    """

    gain: Tensor
    """[n_ids, H*W, H*W]"""
    bias: Tensor
    """[n_ids, H*W]"""

    def __init__(self, n_ids: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("gain", torch.zeros(n_ids, size**2, size**2))
        self.register_buffer("bias", torch.zeros(n_ids, size**2))

    def fit(self, clean: Array, noise: list[RadonNoise]) -> None:
        """Fit to clean images [B, C, H, W] and the noise operator of each noisy id."""
        prior = ImagePrior(clean)
        for k, operator in enumerate(noise):
            estimate = Lmmse(prior, operator)
            self.gain[k].copy_(torch.from_numpy(estimate.gain))
            self.bias[k].copy_(torch.from_numpy(estimate.mean - estimate.gain @ estimate.offset))

    def forward(self, x: Tensor, noise_ids: Tensor | None) -> Tensor:
        """Estimates [B, C, H, W] of images [B, C, H, W]; noise_ids is [B] int64.

        Raises:
            InputError: if the images have another size.
        """
        if x.shape[-2:] != (self.size, self.size):
            raise InputError(
                f"A model with model.physics takes images of the size it was trained on "
                f"({self.size}x{self.size}), but got {x.shape[-2]}x{x.shape[-1]}; use one without."
            )
        if noise_ids is None:
            return x
        out = x.clone()
        with torch.autocast(x.device.type, enabled=False):  # large weights cancel in these sums
            for k in range(len(self.gain)):
                rows = noise_ids == k + 1
                if rows.any():
                    flat = x[rows].flatten(2)  # [b, C, H*W]
                    out[rows] = (flat @ self.gain[k].T + self.bias[k]).reshape(x[rows].shape)
        return out
