"""The supervised baseline: a residual U-Net from noisy to clean, blind to the view count.

It is built of the HVAE's blocks at the HVAE's widths and trained on the same batches with the same
optimizer, so a difference in scores is a difference in method. It has no codes and no swap.
"""

import itertools

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from snr_ray.config import ModelConfig
from snr_ray.network.blocks import Stem, Up, residual_blocks
from snr_ray.network.physics import LinearInverse
from snr_ray.noise.operator import NoiseSpec

Array = npt.NDArray[np.float32]

WIDTH = 1.25
"""Widths of the levels over those of the HVAE: with it, both have as many weights within 13 %."""


class UNet(nn.Module):
    """x + f(x), where f is a U-Net with one skip per level; images of any size.

    Features rise by repeating pixels: the skips hold what is finer (pixel shuffle: no better).
    Source: Ronneberger, Fischer and Brox, U-Net: convolutional networks for biomedical image
    segmentation (2015); the residual form for sparse-view streaks is that of Jin et al., Deep
    convolutional neural network for inverse problems in imaging (2017).
    """

    def __init__(
        self, config: ModelConfig, channels: int, inverse: LinearInverse | None = None
    ) -> None:
        super().__init__()
        self.channels = channels
        levels = (round(WIDTH * width) for width in config.channels)
        widths = (config.stem_channels, *levels)
        self.stem = Stem(config, channels, inverse)
        self.down = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(narrow, wide, 3, stride=2, padding=1),
                residual_blocks(wide, config.blocks),
            )
            for narrow, wide in itertools.pairwise(widths)
        )
        self.middle = residual_blocks(widths[-1], config.blocks)
        self.up = nn.ModuleList(
            Up(wide, narrow, "nearest") for narrow, wide in itertools.pairwise(widths)
        )
        self.merge = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(2 * width, width, 3, padding=1), residual_blocks(width, config.blocks)
            )
            for width in widths[:-1]
        )
        self.head = nn.Conv2d(widths[0], channels, 3, padding=1)

    def forward(self, x: Tensor, noise_ids: Tensor | None = None) -> Tensor:
        """Cleaned images of noisy ones, both [B, C, H, W] float32, not clipped.

        With model.physics, `noise_ids` [B] pick the linear estimate that is corrected instead of x.
        """
        h, estimate = self.stem(x, noise_ids)
        skips = [h]
        for down in self.down:
            h = down(h)
            skips.append(h)
        h = self.middle(skips.pop())
        for level in reversed(range(len(self.up))):
            skip = skips[level]
            up = self.up[level]
            assert isinstance(up, Up)
            h = up.at(h, skip.shape[-2:])
            h = self.merge[level](torch.cat([skip, h], dim=1))
        return estimate + self.head(F.silu(h)).float()


@torch.inference_mode()
def regress(
    model: UNet, noisy: Array, noise_ids: npt.NDArray[np.int64], **told: NoiseSpec | None
) -> Array:
    """Cleaned images of noisy ones, both [B, C, H, W] float32; noise_ids [B] for those that are
    told them. A grey network takes RGB channel by channel; `told` goes to the model.
    """
    device = next(model.parameters()).device
    apart = noisy.shape[1] // model.channels
    rows = noisy.reshape(-1, model.channels, *noisy.shape[2:])
    x = torch.from_numpy(np.ascontiguousarray(rows, np.float32)).to(device)
    image = model(x, torch.from_numpy(noise_ids.repeat(apart)).to(device), **told)
    return image.cpu().numpy().reshape(noisy.shape)
