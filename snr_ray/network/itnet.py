"""A second supervised baseline: a U-Net and an exact step, four times, by the noise operator.

It is told the view count, as a user of the field would have it, and has no codes and no swap. The
network is `unet`, the same in each step; after each, the last too, what its answer leaves of the
image unexplained is added back.
"""

import torch
from torch import Tensor, nn

from snr_ray.config import ModelConfig
from snr_ray.network.blocks import unexplained
from snr_ray.network.noisemaker import Alike, Noise, mixed, n_views_of
from snr_ray.network.unet import UNet
from snr_ray.noise.operator import NoiseSpec

TINY = 1e-12


class ItNet(UNet):
    """x <- U-Net(x), x <- x + rate_k length (image - noise(x)), model.unrolled times.

    The noise operator is filtered back projection of the projections, so the second half is a
    gradient step of the data term in the filter's norm. Its length is that of the least residual,
    found for each image: the largest eigenvalue of the operator is 1 for many views and 10 for few.
    The learned rates, one for each step, begin at 1.
    Source: Genzel, Gühring, Macdonald and März, Near-exact recovery for tomographic inverse
    problems via deep learning (2022), winner of the AAPM sparse-view challenge; without the memory
    channels between its steps, and with lengths for several view counts.
    """

    n_views: Tensor
    """As of `NoiseMaker`."""

    def __init__(self, config: ModelConfig, channels: int, noise: list[NoiseSpec]) -> None:
        """`noise` has the spec of each noise id."""
        super().__init__(config, channels)
        self.noise = noise
        self.register_buffer("n_views", n_views_of(noise), persistent=False)
        self.rates = nn.Parameter(torch.ones(config.unrolled))

    def forward(
        self, x: Tensor, noise_ids: Tensor | None = None, geometry: NoiseSpec | None = None
    ) -> Tensor:
        """Cleaned images of noisy ones, both [B, C, H, W] float32, not clipped.

        Args:
            x: noisy images; of photons, the mean is explained.
            noise_ids: [B] their noise ids, 0 of clean ones.
            geometry: how all of them were made, in place of their ids.
        """
        noise = self._noise(noise_ids, geometry, max(x.shape[-2:]))
        guess = x
        for rate in self.rates:
            guess = super().forward(guess)
            left = unexplained(x, noise(guess))
            with torch.no_grad():
                made = noise(left)
                power = made.square().sum((1, 2, 3), keepdim=True)
                length = (left * made).sum((1, 2, 3), keepdim=True) / power.clamp(min=TINY)
            guess = guess + rate * length * left
        return guess

    def _noise(self, noise_ids: Tensor | None, geometry: NoiseSpec | None, side: int) -> Noise:
        if geometry is not None:
            return Alike(geometry)
        assert noise_ids is not None
        known = torch.arange(len(self.n_views), device=noise_ids.device)
        return mixed(self.noise, self.n_views, (noise_ids[:, None] == known).float(), side)
