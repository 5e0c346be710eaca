"""The last step of a decoder that knows the noise operator: clean image, noise code -> image.

The noise is a function of the image, so a decoder that holds the function need not learn it: the
content code is that of a clean image, and the noise code says what was done to it.
"""

import torch
from torch import Tensor, nn

from snr_ray.noise.operator import NoiseSpec
from snr_ray.noise.tensors import noise_of_spec

NEGLIGIBLE = 1e-3
"""Shares of a noise id below it are not made: most images need one operator or none."""


class NoiseMaker(nn.Module):
    """image = share_0 clean + sum over noise ids k of share_k noise_k(clean).

    The shares are read from the noise codes of all levels. Photon noise is drawn anew in each image
    and no function of it: its mean is made.
    """

    same_shape: bool = False
    """Training makes the noise of every id of every image, also where its share is zero, so that
    what is done does not depend on the shares: a GPU then never waits for a host that looks at
    them. A processor saves the work."""

    def __init__(self, noise: list[NoiseSpec], noise_channels: int) -> None:
        """`noise_channels` is the sum over levels."""
        super().__init__()
        self.noise = noise
        self.logits = nn.Linear(noise_channels, 1 + len(noise))
        nn.init.zeros_(self.logits.weight)
        nn.init.zeros_(self.logits.bias)

    def noise_id(self, codes: list[Tensor]) -> Tensor:
        """Logits of the noise ids, 0 for clean, by noise codes [B, C, h, w] per level: [B, ids]."""
        means = torch.cat([code.float().mean((2, 3)) for code in codes], dim=1)
        with torch.autocast(means.device.type, enabled=False):
            return self.logits(means)

    def shares(self, codes: list[Tensor]) -> Tensor:
        """Shares [B, ids] of the noise ids, 0 for clean, by noise codes as of `noise_id`."""
        shares = self.noise_id(codes).softmax(1)
        shares = shares * (shares > NEGLIGIBLE)
        return shares / shares.sum(1, keepdim=True)

    def counts(self, shares: Tensor, side: int) -> Tensor:
        """View count [B] of the largest share, 0 of clean images; the same at every size."""
        known = torch.tensor([0, *(spec.n_views for spec in self.noise)], device=shares.device)
        return known[shares.argmax(1)]

    def forward(self, clean: Tensor, shares: Tensor) -> Tensor:
        """Images [B, C, H, W] float32 of clean ones and the shares [B, ids] of their noise."""
        same_shape = self.training and self.same_shape
        return with_noise(self.noise, clean, shares, same_shape=same_shape)


def with_noise(
    noise: list[NoiseSpec], clean: Tensor, shares: Tensor, *, same_shape: bool
) -> Tensor:
    """Images [B, C, H, W] float32 of clean ones and the shares [B, 1 + len(noise)] of their noise,
    that of none first. `same_shape`: also where a share is zero."""
    image = clean * shares[:, :1, None, None]
    for noise_id, spec in enumerate(noise, start=1):
        share = shares[:, noise_id]
        if same_shape:
            image = image + share[:, None, None, None] * noise_of(spec, clean)
            continue
        rows = share.nonzero().squeeze(1)
        if len(rows):
            noisy = share[rows, None, None, None] * noise_of(spec, clean[rows])
            image = image.index_add(0, rows, noisy)
    return image


def noise_of(spec: NoiseSpec, clean: Tensor) -> Tensor:
    """Images [B, C, H, W] float32 that an operator makes of clean ones; of photons, the mean."""
    with torch.autocast(clean.device.type, enabled=False):
        return noise_of_spec(clean, spec)
