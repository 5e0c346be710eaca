"""The last step of a decoder that knows the noise operator: clean image, noise code -> image.

The noise is a function of the image, so a decoder that holds the function need not learn it: the
content code is that of a clean image, and the noise code says what was done to it.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from snr_ray.config import VIEWS_PER_PIXEL
from snr_ray.noise.operator import NoiseSpec
from snr_ray.noise.tensors import (
    Counts,
    adjoint_of_each,
    adjoint_of_spec,
    noise_of_each,
    noise_of_spec,
)

NEGLIGIBLE = 1e-3
"""Shares of a noise id below it are not made: most images need one operator or none."""


class Noise(Protocol):
    """What was done to clean images: a linear map."""

    def __call__(self, clean: Tensor) -> Tensor:
        """Images [B, C, H, W] float32 of clean ones; of photons, the mean."""
        ...

    def adjoint(self, noisy: Tensor) -> Tensor:
        """The adjoint, of images [B, C, H, W] of any values."""
        ...


@dataclass(frozen=True)
class Alike:
    """The same noise in all images."""

    spec: NoiseSpec

    def __call__(self, clean: Tensor) -> Tensor:
        with torch.autocast(clean.device.type, enabled=False):
            return noise_of_spec(clean, self.spec)

    def adjoint(self, noisy: Tensor) -> Tensor:
        return adjoint_of_spec(noisy, self.spec)


@dataclass
class Mixed:
    """image = share_0 clean + sum over k of share_k noise(clean) of image b's k-th view count.

    Nothing here depends on what the shares and counts are, so a GPU never waits for a host that
    looks at them.
    """

    shares: Tensor
    """[B, 1 + K] float32, that of the clean image first."""
    counts: Counts
    """Of each image one after the other, [B K]; 0 where a share is 0: it is not made."""
    filter: str
    angle_range: float

    def __call__(self, clean: Tensor) -> Tensor:
        with torch.autocast(clean.device.type, enabled=False):
            clean = clean.float()
            made = noise_of_each(self._repeated(clean), self.counts, self.filter, self.angle_range)
            return self._share(0) * clean + self._sum(made)

    def adjoint(self, noisy: Tensor) -> Tensor:
        with torch.autocast(noisy.device.type, enabled=False):
            noisy = noisy.float()
            parts = [self._share(k) * noisy for k in range(1, self.shares.shape[1])]
            each = torch.stack(parts, dim=1).flatten(0, 1)
            back = adjoint_of_each(each, self.counts, self.filter, self.angle_range)
            return self._share(0) * noisy + back.unflatten(0, (len(noisy), -1)).sum(1)

    def _share(self, k: int) -> Tensor:
        return self.shares[:, k, None, None, None]

    def _repeated(self, clean: Tensor) -> Tensor:
        k = self.shares.shape[1] - 1
        return clean if k == 1 else clean.repeat_interleave(k, dim=0)

    def _sum(self, made: Tensor) -> Tensor:
        made = made.unflatten(0, (len(self.shares), -1))
        return (self.shares[:, 1:, None, None, None] * made).sum(1)


class NoiseMaker(nn.Module):
    """image = share_0 clean + sum over noise ids k of share_k noise_k(clean).

    The shares are read from the noise codes of all levels. Photon noise is drawn anew in each image
    and no function of it: its mean is made.
    """

    n_views: Tensor
    """View counts [ids], 0 of clean images."""

    def __init__(self, noise: list[NoiseSpec], noise_channels: int) -> None:
        """`noise_channels` is the sum over levels."""
        super().__init__()
        self.noise = noise
        self.register_buffer("n_views", n_views_of(noise), persistent=False)
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
        """View count [B] of the largest share, 0 of clean images; the same at every size that can
        hold it."""
        return self.n_views.clamp(max=VIEWS_PER_PIXEL * side)[shares.argmax(1)]

    def of(self, shares: Tensor, side: int) -> Noise:
        """The noise of shares [B, ids], of images of a longer side in pixels."""
        return mixed(self.noise, self.n_views, shares, side)


def n_views_of(noise: list[NoiseSpec]) -> Tensor:
    """View counts [ids] of noise ids, 0 of clean images."""
    return torch.tensor([0, *(spec.n_views for spec in noise)])


def mixed(noise: list[NoiseSpec], n_views: Tensor, shares: Tensor, side: int) -> Mixed:
    """The noise of shares [B, ids], that of none first, of images of a longer side in pixels; the
    noise differs in its views alone, which are [ids] on the device of the shares, and as many at
    most as such images can hold."""
    most = VIEWS_PER_PIXEL * side
    known = [min(spec.n_views, most) for spec in noise]
    each = n_views[1:].clamp(max=most) * (shares[:, 1:] > 0)
    counts = Counts(each.flatten(), min(known), max(known))
    return Mixed(shares, counts, noise[0].filter, noise[0].angle_range)
