"""The last step of a decoder that knows the noise of every view count: `noisemaker` for a range.

Two numbers are read from the noise codes: whether there is noise, and the logarithm of its views
per pixel. That is a scale on which equal steps change the streaks alike, whatever the size.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from snr_ray.config import VIEWS_PER_PIXEL
from snr_ray.network.noisemaker import Mixed, Noise
from snr_ray.noise.tensors import Counts
from snr_ray.noise.viewrange import ViewRange

CERTAIN = 0.02
"""Shares of noise nearer than this to none or all are taken for that."""
BEYOND = 1.5
"""Readings go no further beyond the range than by this factor."""


class ViewCountMaker(nn.Module):
    """image = (1 - share) clean + share noise_n(clean), n whole.

    What was read from codes, or told, is a tensor [B, 2]: the share of noise, and the logarithm of
    views per pixel of the longer side.
    """

    def __init__(self, views: ViewRange, noise_channels: int) -> None:
        """`noise_channels` is the sum over levels."""
        super().__init__()
        self.views = views
        self.middle = 0.5 * math.log(views.low * views.high)
        self.reading = nn.Linear(noise_channels, 2)
        nn.init.zeros_(self.reading.weight)
        nn.init.zeros_(self.reading.bias)

    def read(self, codes: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Logit of noise, and logarithm of views per pixel, by noise codes [B, C, h, w] per level:
        each [B]."""
        means = torch.cat([code.float().mean((2, 3)) for code in codes], dim=1)
        with torch.autocast(means.device.type, enabled=False):
            logit, views = self.reading(means).unbind(1)
        return logit, views + self.middle

    def shares(self, codes: list[Tensor]) -> Tensor:
        """What noise codes [B, C, h, w] per level say: [B, 2]."""
        logit, views = self.read(codes)
        share = logit.sigmoid()
        share = torch.where(share < CERTAIN, 0.0, torch.where(share > 1 - CERTAIN, 1.0, share))
        within = math.log(self.views.low / BEYOND), math.log(self.views.high * BEYOND)
        return torch.stack([share, views.clamp(*within)], dim=1)

    def told(self, shares: Tensor, n_views: Tensor, side: int) -> Tensor:
        """What was read [B, 2], but where counts [B] are known: 0 clean, below 0 unknown."""
        known = torch.stack([(n_views > 0).float(), (n_views.clamp(min=1) / side).log()], dim=1)
        return torch.where(n_views[:, None] < 0, shares, known.to(shares.dtype))

    def counts(self, shares: Tensor, side: int) -> Tensor:
        """Whole view counts [B], 0 of clean images, of images of a longer side in pixels."""
        return self._whole(shares[:, 1], side) * (shares[:, 0] > 0.5)

    def _whole(self, views: Tensor, side: int) -> Tensor:
        """Counts [B] of logarithms of views per pixel, those that images can hold."""
        return (views.exp() * side).round().clamp(1, VIEWS_PER_PIXEL * side).long()

    def of(self, shares: Tensor, side: int) -> Noise:
        """The noise of what was read or told of images [B, 2], of a longer side in pixels."""
        share = shares[:, 0]
        each = self._whole(shares[:, 1].detach(), side) * (share > 0)
        if self.training:  # the host does not look at what was read
            least, most = self._within(side)
        else:
            least, most = torch.stack(torch.aminmax(each.clamp(min=1))).tolist()
        both = torch.stack([1 - share, share], dim=1)
        return Mixed(both, Counts(each, least, most), self.views.filter, self.views.angle_range)

    def _within(self, side: int) -> tuple[int, int]:
        """The least and the most views that are read of images of a longer side in pixels."""
        low, high = self.views.low / BEYOND * side, self.views.high * BEYOND * side
        most = VIEWS_PER_PIXEL * side
        return min(max(1, math.floor(low)), most), min(math.ceil(high), most)

    def loss(self, codes: list[Tensor], n_views: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """Cross-entropy of noise or none, in nats, and mean error of the logarithm of the view
        counts of noisy images: scalars.

        Args:
            codes: noise codes [B, C, h, w] per level.
            n_views: true counts [B], 0 of clean images.
            side: longer side of the images, in pixels.
        """
        logit, views = self.read(codes)
        noisy = (n_views > 0).float()
        error = (views - (n_views.clamp(min=1) / side).log()).abs()
        entropy = F.binary_cross_entropy_with_logits(logit, noisy)
        return entropy, (error * noisy).sum() / noisy.sum().clamp(min=1)
