"""Building blocks of the HVAE: Gaussians, residual blocks, noise head, top-down levels."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from snr_ray.config import ModelConfig
from snr_ray.network.physics import LinearInverse

LOGVAR_RANGE = (-10.0, 4.0)
PIXEL_OFFSET = 0.4
"""Subtracted from pixels before the network and added after it: images are centred, not clipped."""

PIXEL_SCALE = 4.0
"""Units of a content code per unit of the pixels it holds: the finest code spreads as others do."""

Normal = Callable[[tuple[int, ...]], Tensor]
"""Draws standard normal values of a shape; who calls decides seed, device and share of a batch."""


class Gaussian(NamedTuple):
    """Diagonal Gaussian; logvar is the natural logarithm of the variance. Both float32."""

    mu: Tensor
    logvar: Tensor

    def sample(self, normal: Normal | None) -> Tensor:
        """mu + sigma * noise; the mean where `normal` is None."""
        if normal is None:
            return self.mu
        return self.mu + torch.exp(0.5 * self.logvar) * normal(tuple(self.mu.shape))


def gaussian(parameters: Tensor) -> Gaussian:
    """[B, 2 C, ...] network output as a Gaussian over [B, C, ...], in float32."""
    mu, logvar = parameters.float().chunk(2, dim=1)
    return Gaussian(mu, logvar.clamp(*LOGVAR_RANGE))


def kl_terms(q: Gaussian, p: Gaussian) -> Tensor:
    """KL(q || p) in nats of each dimension.

    Source: Kingma and Welling, Auto-encoding variational Bayes (2014), appendix B.
    """
    wider = q.logvar - p.logvar
    squared = (q.mu - p.mu).square() * torch.exp(-p.logvar)
    return 0.5 * (torch.exp(wider) - wider + squared - 1)


def kl(q: Gaussian, p: Gaussian) -> Tensor:
    """KL(q || p) in nats, summed over all but the first axis: [B]."""
    return kl_terms(q, p).flatten(1).sum(1)


def joined(gaussians: Sequence[Gaussian]) -> Gaussian:
    """Gaussians over [B, ...] as one over [B, all their dimensions]: what is done to many small
    tensors costs more in being asked for than in being done."""
    mus, logvars = zip(*gaussians, strict=True)
    return Gaussian(*(torch.cat([t.flatten(1) for t in part], dim=1) for part in (mus, logvars)))


def standard(like: Gaussian) -> Gaussian:
    """The standard normal of a Gaussian's shape."""
    return Gaussian(torch.zeros_like(like.mu), torch.zeros_like(like.logvar))


class ResidualBlock(nn.Module):
    """Pre-activation residual block of two 3x3 convolutions; near the identity at the start.

    No normalisation: batch norm would tie images of a batch together (and cost 0.5 dB).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        with torch.no_grad():
            self.conv2.weight.mul_(0.3)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.conv2(F.silu(self.conv1(F.silu(h))))


def residual_blocks(channels: int, n_blocks: int) -> nn.Sequential:
    """A chain of residual blocks."""
    return nn.Sequential(*(ResidualBlock(channels) for _ in range(n_blocks)))


class Stem(nn.Module):
    """Image -> features at full resolution; what the encoder of every network begins with."""

    def __init__(self, config: ModelConfig, channels: int, inverse: LinearInverse | None) -> None:
        super().__init__()
        self.inverse = inverse
        seen = channels * (1 if inverse is None else 2)
        kernel = config.stem_kernel
        self.conv = nn.Conv2d(seen, config.stem_channels, kernel, padding=kernel // 2)
        self.blocks = residual_blocks(config.stem_channels, config.blocks)

    def forward(self, x: Tensor, noise_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Features of images [B, C, H, W], and what is closest to clean ones before the network.

        That is the images themselves, or the linear estimates that go along: noise_ids [B].
        """
        seen = estimate = x
        if self.inverse is not None:
            estimate = self.inverse(x, noise_ids)
            seen = torch.cat([x, estimate], dim=1)
        return self.blocks(self.conv(seen - PIXEL_OFFSET)), estimate


class NoiseHead(nn.Module):
    """Noise posterior of one level from bottom-up features alone.

    It does not see the top-down state, so a donor's noise code can be computed once and reused.
    """

    def __init__(
        self, channels: int, noise_channels: int, *, spatial: bool, compares: bool = False
    ) -> None:
        """`compares`: means over the image are also set in relation to each other, so that the
        code of a vector may tell few views of a pale image from many of a strong one."""
        super().__init__()
        self.spatial, self.compares = spatial, compares
        self.features = nn.Conv2d(channels, channels, 3, padding=1)
        self.out = nn.Conv2d(channels, 2 * noise_channels, 1)
        if compares:
            last = nn.Conv2d(2 * channels, channels, 1)
            for parameter in last.parameters():  # at the start, nothing is added
                nn.init.zeros_(parameter)
            wide = nn.Conv2d(channels, 2 * channels, 1)
            self.among = nn.Sequential(nn.GroupNorm(1, channels), wide, nn.SiLU(), last)

    def forward(self, bottom_up: Tensor) -> Gaussian:
        """[B, C, h, w] -> Gaussian over [B, C_noise, h, w] (map) or [B, C_noise, 1, 1] (vector)."""
        h = F.silu(self.features(F.silu(bottom_up)))
        if not self.spatial:
            h = h.mean((2, 3), keepdim=True)
        if self.compares:
            h = h + self.among(h)
        return gaussian(self.out(h))


@dataclass
class BottomUp:
    """What the encoder sees of images before any code is known."""

    levels: list[Tensor]
    """Features [B, C_l, H/2^l, W/2^l] per level, finest first."""
    pixels: Tensor
    """Features [B, C_stem, H, W] at full resolution."""
    image: Tensor
    """[B, C, H, W]."""
    estimate: Tensor
    """[B, C, H, W] the images, or the linear estimates of a model with model.physics."""
    noisy: Callable[[Tensor], Tensor] | None = None
    """Clean images [B, C, H, W] with the noise that the images' own noise codes stand for."""


class TopDownLevel(nn.Module):
    """One level of the top-down pass: content prior and posterior, then z into the state."""

    def __init__(self, config: ModelConfig, level: int, n_pixels: int = 0) -> None:
        """`n_pixels` are channels of the content code beyond those of the configuration."""
        super().__init__()
        self.level, channels = level, config.channels[level]
        n_content = n_pixels + config.content_channels[level]
        self.merges_noise = config.decoder == "network"
        n_noise = config.noise_channels[level] if self.merges_noise else 0
        self.prior = nn.Conv2d(channels, 2 * n_content, 3, padding=1)
        self.posterior = nn.Sequential(
            nn.Conv2d(2 * channels, channels, 1),
            residual_blocks(channels, 1),
            nn.SiLU(),
            nn.Conv2d(channels, 2 * n_content, 1),
        )
        self.merge = nn.Conv2d(n_content + n_noise, channels, 3, padding=1)
        self.blocks = residual_blocks(channels, config.blocks)

    def infer(self, state: Tensor, seen: BottomUp) -> Gaussian:
        """Content posterior q(z | image, levels above), each tensor [B, C_content, h, w]."""
        return gaussian(self.posterior(torch.cat([state, seen.levels[self.level]], dim=1)))

    def expect(self, state: Tensor) -> Gaussian:
        """Content prior p(z | levels above), each tensor [B, C_content, h, w]."""
        return gaussian(self.prior(state))

    def advance(self, state: Tensor, content: Tensor, noise: Tensor) -> Tensor:
        """The state [B, C, h, w] after this level's content and noise codes."""
        if self.merges_noise:
            content = torch.cat([content, fit_code(noise, content.shape[-2:])], dim=1)
        return self.blocks(state + self.merge(content))


def unexplained(image: Tensor, again: Tensor) -> Tensor:
    """What images have that their simulation has not, both [B, C, H, W].

    Pixels of exactly 0 and 1 are bounds: files are cut to that range, and all that lies beyond
    explains them.
    """
    cut = ((image == 0) & (again < 0)) | ((image == 1) & (again > 1))
    return (image - again).masked_fill(cut, 0.0)


class ConsistencyStep(nn.Module):
    """One step of an unrolled solver: guess a clean image, and see what its noisy version leaves
    unexplained of the image.

    Source: Adler and Öktem, Learned primal-dual reconstruction (2018); as the inference of a VAE,
    Marino, Yue and Mandt, Iterative amortized inference (2018).
    """

    def __init__(
        self, width: int, channels: int, *, bounded: bool = False, coarser: Sequence[int] = ()
    ) -> None:
        """`bounded`: noise is made of the guess cut to [0, 1]; `coarser`: widths of the levels that
        the step also looks at."""
        super().__init__()
        self.bounded = bounded
        self.around = Around(width, coarser) if coarser else None
        self.guess = nn.Conv2d(width, channels, 3, padding=1)
        self.see = nn.Conv2d(2 * channels, width, 3, padding=1)
        self.blocks = residual_blocks(width, 1)

    def forward(self, h: Tensor, guess: Tensor, seen: BottomUp) -> tuple[Tensor, Tensor]:
        """Features [B, width, H, W] and guess [B, C, H, W] after the step, from those before."""
        assert seen.noisy is not None
        guess = guess + self.guess(F.silu(h)).float()
        possible = guess.clamp(0, 1) if self.bounded else guess
        left = unexplained(seen.image, seen.noisy(possible))
        news = torch.cat([guess - PIXEL_OFFSET, left], dim=1)
        h = h + self.see(news)
        if self.around is not None:
            h = h + self.around(h)
        return self.blocks(h), guess


class Around(nn.Module):
    """What lies around each pixel: features at coarser levels, brought back to full resolution; a
    U-Net without its finest level. Zero at the start, so that a trained step may be given one."""

    def __init__(self, width: int, coarser: Sequence[int]) -> None:
        super().__init__()
        pairs = list(itertools.pairwise((width, *coarser)))
        self.down = nn.ModuleList(
            nn.Conv2d(narrow, wide, 3, stride=2, padding=1) for narrow, wide in pairs
        )
        self.blocks = nn.ModuleList(ResidualBlock(wide) for wide in coarser)
        self.up = nn.ModuleList(Up(wide, narrow, "shuffle") for narrow, wide in pairs)
        for parameter in self.up[0].parameters():
            nn.init.zeros_(parameter)

    def forward(self, h: Tensor) -> Tensor:
        """[B, width, H, W] -> the same shape."""
        levels = [h]
        for down in self.down:
            levels.append(down(F.silu(levels[-1])))
        state = levels.pop()
        for k in reversed(range(len(self.up))):
            finer = levels.pop()
            up = self.up[k]
            assert isinstance(up, Up)
            state = up.at(self.blocks[k](state), finer.shape[-2:])
            state = finer + state if k else state
        return state


class PixelLevel(TopDownLevel):
    """The finest level of a decoder that knows the noise: its content code holds a clean image.

    A straight way leads pixels into the first channels of the code and out of them, each block of
    stride x stride pixels at one place. The posterior adds what differs from the clean image: it
    merges coarse features with those at full resolution, as a U-Net does, and then takes steps of
    an unrolled solver, since what makes the noise is known.
    """

    def __init__(self, config: ModelConfig, channels: int) -> None:
        stride, narrow = config.finest_stride, config.stem_channels
        n_pixels = channels * stride**2
        super().__init__(config, 0, n_pixels)
        self.stride, self.n_pixels = stride, n_pixels
        self.posterior = self.posterior[:-1]
        self.up = Up(config.channels[0], narrow, "shuffle", stride)
        self.refine = nn.Sequential(
            nn.Conv2d(2 * narrow, narrow, 3, padding=1), residual_blocks(narrow, 1)
        )
        self.steps = nn.ModuleList(
            ConsistencyStep(narrow, channels, bounded=config.bounded, coarser=config.step_channels)
            for _ in range(config.unrolled)
        )
        n_content = n_pixels + config.content_channels[0]
        self.code = nn.Conv2d(stride**2 * narrow, 2 * n_content, 1)

    def infer(self, state: Tensor, seen: BottomUp) -> Gaussian:
        """Content posterior q(z | image, levels above), each tensor [B, C_content, h, w]."""
        h = self.posterior(torch.cat([state, seen.levels[0]], dim=1))
        h = self.up.at(h, seen.pixels.shape[-2:])
        h = self.refine(torch.cat([seen.pixels, h], dim=1))
        guess = seen.estimate
        for step in self.steps:
            h, guess = step(h, guess, seen)
        mu, logvar = gaussian(self.code(self._blocks(F.silu(h))))
        pixels = PIXEL_SCALE * self._blocks(guess - PIXEL_OFFSET)
        return Gaussian(mu + F.pad(pixels, (0, 0, 0, 0, 0, mu.shape[1] - self.n_pixels)), logvar)

    def pixels(self, content: Tensor, size: tuple[int, int]) -> Tensor:
        """The pixels [B, C, H, W] that a code [B, C_content, h, w] holds, less PIXEL_OFFSET."""
        image = F.pixel_shuffle(content[:, : self.n_pixels].float(), self.stride) / PIXEL_SCALE
        return image[..., : size[0], : size[1]]

    def _blocks(self, h: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C stride^2, h, w]; what odd sizes lack is zero."""
        height, width = (-side % self.stride for side in h.shape[-2:])
        return F.pixel_unshuffle(F.pad(h, (0, width, 0, height)), self.stride)


def fit_code(code: Tensor, size: torch.Size) -> Tensor:
    """A noise code [B, C, *, *] at another size: a vector is broadcast, a map is resampled."""
    if code.shape[-2:] == (1, 1):
        return code.expand(-1, -1, *size)
    if code.shape[-2:] == size:
        return code
    return F.interpolate(code, size=tuple(size), mode="nearest")


class Up(nn.Conv2d):
    """Features of a level at the size of the next finer one: [B, wide, h, w] -> [B, narrow, *size].

    With "shuffle" each of the four finer pixels gets channels of its own; with "nearest" all get
    the same, and the layers behind must tell them apart by what lies around.
    Source: Shi et al., Real-time single image and video super-resolution using an efficient
    sub-pixel convolutional neural network (2016).
    """

    def __init__(self, wide: int, narrow: int, upsampling: str, stride: int = 2) -> None:
        """`stride` 1 where the finer level has the same size."""
        shuffles = upsampling == "shuffle" and stride == 2
        super().__init__(wide, 4 * narrow if shuffles else narrow, 1)
        self.shuffles = shuffles

    def at(self, h: Tensor, size: torch.Size) -> Tensor:
        """The features at a size of at most twice that of `h`; odd ones cut the last row."""
        h = self(h)
        if self.shuffles:
            h = F.pixel_shuffle(h, 2)
        elif h.shape[-2:] != size:
            h = F.interpolate(h, scale_factor=2.0, mode="nearest")
        return h[..., : size[0], : size[1]].contiguous(memory_format=torch.channels_last)
