"""Hierarchical VAE whose latent splits, at every level, in a content code and a noise code.

    image --bottom_up--> features of each level --noise heads--> noise codes
    top level ... finest level: state + features -> content code; content -> next state
    content code and state of the finest level --> clean image --noise codes--> image

Only codes reach the decoder: there is no skip around them, so exchanging codes exchanges all there
is to know. The decoder knows the noise operator, so the noise code need only say which noise it is.
The encoder uses that decoder: at the finest level it makes noise of the clean image it guesses, by
the image's own noise codes, and learns from what that leaves of the image unexplained.

With model.decoder=network it learns what noise is: noise codes are merged into the state of every
level, (content, noise) -> next state, and the last state gives the image. The content posterior of
a level is then inferred against the state that the noise codes in use produced; with a donor's
noise codes this is the swap, in one pass. A model that was never trained on that infers content
against its own noise codes, and they are exchanged afterwards.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from snr_ray.config import ModelConfig
from snr_ray.network.blocks import (
    PIXEL_OFFSET,
    BottomUp,
    Gaussian,
    NoiseHead,
    Normal,
    PixelLevel,
    Stem,
    TopDownLevel,
    Up,
    residual_blocks,
)
from snr_ray.network.noisemaker import Alike, NoiseMaker
from snr_ray.network.physics import LinearInverse
from snr_ray.network.viewcount import ViewCountMaker
from snr_ray.noise.operator import NoiseSpec
from snr_ray.noise.viewrange import ViewRange


@dataclass
class Codes:
    """All that the decoder gets. Lists run from the finest level to the top."""

    content: list[Tensor]
    """[B, C_content, h, w] per level."""
    noise: list[Tensor]
    """[B, C_noise, 1, 1] (vector) or [B, C_noise, h, w] (map) per level."""
    size: tuple[int, int]
    """Height and width of the image."""


@dataclass
class Inference:
    """What one pass over images computes."""

    image: Tensor
    """[B, C, H, W] float32 decoded from `codes`, not clipped."""
    codes: Codes
    content: list[tuple[Gaussian, Gaussian]]
    """Content posterior and prior per level."""
    noise: list[Gaussian]
    """Noise posterior of the image itself per level (also where donors replaced the code)."""


class HVAE(nn.Module):
    """The model. `channels` is 1 (grey) or 3 (RGB); images of any size, of which the noise operator
    takes those from 4 pixels on."""

    def __init__(
        self,
        config: ModelConfig,
        channels: int,
        noise: list[NoiseSpec] | ViewRange,
        inverse: LinearInverse | None = None,
        *,
        one_pass: bool = True,
    ) -> None:
        """`noise` is what a decoder that knows the operator makes, one spec for each noise id or
        all of a range; `inverse` gives the second input
        of a model with model.physics; `one_pass` says that the swap is trained, and so how it is
        done."""
        super().__init__()
        self.channels, self.one_pass = channels, one_pass
        self.noise_maker: NoiseMaker | ViewCountMaker | None = None
        if isinstance(noise, ViewRange):
            self.noise_maker = ViewCountMaker(noise, sum(config.noise_channels))
        elif config.decoder == "operator":
            self.noise_maker = NoiseMaker(noise, sum(config.noise_channels))
        self.unrolls = self.noise_maker is not None and config.unrolled > 0
        self.correction = config.correction if self.unrolls else 0
        widths = (config.stem_channels, *config.channels)
        self.stem = Stem(config, channels, inverse)
        self.down = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(narrow, wide, 3, stride=config.finest_stride if k == 0 else 2, padding=1),
                residual_blocks(wide, config.blocks),
            )
            for k, (narrow, wide) in enumerate(itertools.pairwise(widths))
        )
        spatial = config.noise_code == "map"
        self.noise_heads = nn.ModuleList(
            NoiseHead(width, n_noise, spatial=spatial, compares=isinstance(noise, ViewRange))
            for width, n_noise in zip(config.channels, config.noise_channels, strict=True)
        )
        self.levels = nn.ModuleList(
            PixelLevel(config, channels)
            if self.noise_maker is not None and level == 0
            else TopDownLevel(config, level)
            for level in range(len(config.channels))
        )
        self.up = nn.ModuleList(
            Up(wide, narrow, config.upsampling, config.finest_stride if k == 0 else 2)
            for k, (narrow, wide) in enumerate(itertools.pairwise(widths))
        )
        self.top = nn.Parameter(torch.zeros(1, widths[-1], 1, 1))
        refine: list[nn.Module] = []
        if self.noise_maker is None:
            refine = [residual_blocks(widths[0], config.blocks), nn.SiLU()]
        self.head = nn.Sequential(*refine, nn.Conv2d(widths[0], channels, 3, padding=1))

    def bottom_up(self, x: Tensor, noise_ids: Tensor | None = None) -> BottomUp:
        """What the encoder sees of images [B, C, H, W] before any code is known."""
        pixels, estimate = self.stem(x, noise_ids)
        h, levels = pixels, []
        for down in self.down:
            h = down(h)
            levels.append(h)
        return BottomUp(levels, pixels, x, estimate)

    def noise_posteriors(self, seen: BottomUp) -> list[Gaussian]:
        """Noise posterior per level from bottom-up features."""
        return [head(h) for head, h in zip(self.noise_heads, seen.levels, strict=True)]

    def forward(
        self,
        x: Tensor,
        noise: list[Tensor] | None = None,
        donors: Tensor | None = None,
        normal: Normal | None = None,
        noise_ids: Tensor | None = None,
        geometry: NoiseSpec | None = None,
        prior_levels: int = 0,
        told: Tensor | None = None,
        wanted: Tensor | None = None,
    ) -> Inference:
        """Encode images and decode them again, with their own noise codes or others.

        Args:
            x: [B, C, H, W] float, not clipped.
            noise: noise codes per level to use in place of the images' own; [B or 1, ...].
            donors: [B] indices into the batch: image b takes the noise code of image donors[b].
            normal: source of the sampling noise; None uses posterior means.
            noise_ids: [B] known noise ids, for a model with model.physics; None, and 0 where only
                some are known, leaves the encoder with the image alone.
            geometry: how all of the images were made, for a model that `unrolls`; also of a view
                count that no training image had. None: as their noise codes say.
            prior_levels: so many of the finest levels take their content from the prior, not from
                the image.
            told: [B] view counts of the images, where they differ, for a model of a range of them:
                0 of clean ones, below 0 where it is for their noise codes to say.
            wanted: [B] the same of the noise that is made of the content, in place of what the
                noise codes in use say: whole counts have no gradient to learn from.
        """
        seen = self.bottom_up(x, noise_ids)
        posteriors = self.noise_posteriors(seen)
        if geometry is not None:
            seen.noisy = Alike(geometry)
        elif self.noise_maker is not None:
            own = self.noise_maker.shares([q.mu for q in posteriors])
            own = self._known(own, told, x)
            seen.noisy = self.noise_maker.of(own, max(x.shape[-2:]))
        if noise is None:
            noise = [q.sample(normal) for q in posteriors]
        if donors is not None:
            noise = [code[donors] for code in noise]
        noise = [code.expand(len(x), -1, -1, -1) for code in noise]
        content: list[tuple[Gaussian, Gaussian]] = []
        z: list[Tensor] = []
        state = self.top.expand(len(x), -1, *seen.levels[-1].shape[-2:])
        for level in reversed(range(len(self.levels))):
            layer = self._level(level)
            q, p = layer.infer(state, seen), layer.expect(state)
            content.insert(0, (q, p))
            z.insert(0, (p if level < prior_levels else q).sample(normal))
            state = layer.advance(state, z[0], noise[level])
            finer = seen.levels[level - 1].shape if level else x.shape
            state = self._up(level, state, finer[-2:])
        codes = Codes(z, noise, (x.shape[-2], x.shape[-1]))
        image = self._image(state, codes, wanted)
        return Inference(image, codes, content, posteriors)

    def encode(self, x: Tensor, noise: list[Tensor] | None = None) -> Codes:
        """Posterior-mean codes of images [B, C, H, W]; with `noise`, the codes of the swap."""
        return self(x, noise=noise).codes

    def decode(self, codes: Codes, wanted: Tensor | None = None) -> Tensor:
        """Images [B, C, H, W] of codes, and of nothing else; but for `wanted`, as of `forward`."""
        batch = len(codes.content[-1])
        noise = [code.expand(batch, -1, -1, -1) for code in codes.noise]
        codes = Codes(codes.content, noise, codes.size)
        state = self.top.expand(batch, -1, *codes.content[-1].shape[-2:])
        for level in reversed(range(len(self.levels))):
            layer = self._level(level)
            state = layer.advance(state, codes.content[level], noise[level])
            finer = codes.content[level - 1].shape[-2:] if level else torch.Size(codes.size)
            state = self._up(level, state, finer)
        return self._image(state, codes, wanted)

    def _up(self, level: int, state: Tensor, size: torch.Size) -> Tensor:
        up = self.up[level]
        assert isinstance(up, Up)
        return up.at(state, size)

    def _level(self, level: int) -> TopDownLevel:
        layer = self.levels[level]
        assert isinstance(layer, TopDownLevel)
        return layer

    def _known(self, shares: Tensor, n_views: Tensor | None, images: Tensor) -> Tensor:
        if n_views is None:
            return shares
        assert isinstance(self.noise_maker, ViewCountMaker)
        return self.noise_maker.told(shares, n_views, max(images.shape[-2:]))

    def _image(
        self,
        state: Tensor,
        codes: Codes,
        n_views: Tensor | None = None,
    ) -> Tensor:
        image = self.head(F.silu(state)).float() + PIXEL_OFFSET
        if self.noise_maker is None:
            return image
        finest = self._level(0)
        assert isinstance(finest, PixelLevel)
        clean = image + finest.pixels(codes.content[0], codes.size)
        shares = self._known(self.noise_maker.shares(codes.noise), n_views, clean)
        return self.noise_maker.of(shares, max(codes.size))(clean)
