"""The training objective: ELBO + triplet loss on the noise codes (+ content pull, trained swap).

Per pixel:  reconstruction / D + beta KL / D + triplet + content_kl * symmetric KL / D
with D = C*H*W. The preset `seed` keeps the first two and the triplet loss as drawn; `paired`, the
default, adds what knowing both the clean and the noisy image allows. A decoder that knows the noise
operator also learns which noise id a noise code stands for.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from snr_ray.config import LossConfig
from snr_ray.learning.batches import Batch, StepNormal
from snr_ray.network.blocks import Gaussian, joined, kl, kl_terms, standard
from snr_ray.network.hvae import HVAE, Inference
from snr_ray.network.noisemaker import NoiseMaker
from snr_ray.network.unet import UNet
from snr_ray.network.viewcount import ViewCountMaker

SIGMA_FLOOR = 0.01
ERROR_FLOOR = 1e-8
"""Mean squared error taken for none: its root has no gradient at zero."""
ROOT_EPSILON = 1e-6
NOISE_ID = 0.1
"""Weight of the cross-entropy of the noise id that a decoder with the operator reads from codes."""
GRAINY = 0.5
"""Share of noisy images that get Gaussian noise on top with loss.grain."""
N_VIEWS = 0.6
"""Weight of the error of the view count, as a logarithm, that codes tell of a range."""
WITHHELD = 0.125
"""Share of images that a model with model.physics sees without their noise id."""


@dataclass(frozen=True)
class Distances:
    """Mean squared differences of noise codes, in units of d. L levels, B images."""

    same: Tensor
    """[L, B, 1 + n_ids] of two images of one id, clean ones first."""
    clean: Tensor
    """[L, B, n_ids] of the clean and the noisy versions of an image."""
    noisy: Tensor
    """[L, B, n_ids] of each noisy version and the one before it."""


def code_distances(mu: Tensor, n_ids: int, dims: Sequence[int] = ()) -> Distances:
    """How far noise codes lie apart.

    Args:
        mu: [B (1 + n_ids), ...] posterior means; of each image first the clean version, then those
            of noise ids 1, 2 ... Images b and b ^ 1 are partners.
        n_ids: noisy ids.
        dims: dimensions of each level, where the codes are of several.
    """
    code = mu.flatten(1).unflatten(0, (-1, 1 + n_ids))  # [B, 1 + n_ids, dims]
    dims = dims or (code.shape[-1],)
    means = torch.block_diag(*(torch.full((n, 1), 1 / n, device=mu.device) for n in dims))
    noisy, clean = code[:, 1:], code[:, :1]
    partner = code.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return ((a - b).square() @ means).movedim(-1, 0)

    return Distances(
        distance(code, partner), distance(noisy, clean), distance(noisy, noisy.roll(1, dims=1))
    )


def triplet_loss(d: Distances, form: str, margin: float, n_views: Tensor | None = None) -> Tensor:
    """Triplet loss on noise codes, mean over levels; a scalar.

    Args:
        d: of the codes.
        form: "drawn": max(0, d(noisy, partner's noisy) - d(noisy, clean) + margin), as the
            original method draws it. "symmetric": pull every pair of equal id, clean ones too, and
            push clean from noisy and noisy ids from each other up to the margin. Without the clean
            pull, clean images hide content in their noise code.
        margin: in units of d, the mean squared difference.
        n_views: [B, n_ids] view counts where they are drawn from a range: two of them are pushed
            apart as far as they differ, by the margin from a factor of two on.
    """
    if form == "drawn":
        return F.relu(d.same[..., 1:] - d.clean + margin).mean()

    def short_of_margin(d: Tensor, share: Tensor | float = 1.0) -> Tensor:
        # The root keeps its slope where codes are still equal, so that they part at once; a
        # squared distance has none there and leaves the codes together for hundreds of steps.
        return F.relu(share * margin - (d + ROOT_EPSILON).sqrt()).mean()

    loss = 0.5 * (d.same[..., 1:].mean() + d.same[..., 0].mean()) + short_of_margin(d.clean)
    if d.noisy.shape[-1] > 1:
        apart: Tensor | float = 1.0
        if n_views is not None:
            octaves = n_views.log2()
            apart = (octaves - octaves.roll(1, dims=1)).abs().clamp(max=1.0)
        loss = loss + short_of_margin(d.noisy, apart)
    return loss


class Likelihood(nn.Module):
    """Gaussian likelihood of images, each with the standard deviation that suits it best.

    Cleaning an image of few views leaves errors many times those of reconstructing a clean one,
    and images of one kind differ as much; with one sigma for all, the hard images alone would
    decide how exact the easy ones get. So there is a learned sigma for each pair of noise ids
    (seen, wanted), and an image that is to be clean has its own: its root mean square error, where
    the likelihood is largest, within a factor of that of its pair. The gradient is then that of the
    logarithm of the error, which PSNR is.

    Clean pixels of 0 and 1 are bounds, not values, with loss.bounds: all that would be cut to them
    is right, so nothing is spent on meeting them exactly.

    Source: Rybkin et al., Simple and effective VAE training with calibrated decoders (2021), who
    take one such sigma per batch.
    """

    def __init__(self, config: LossConfig, n_ids: int) -> None:
        super().__init__()
        self.ratio, self.own, self.bounds = config.sigma_ratio, config.sigma_own, config.bounds
        log_sigma = torch.full((n_ids + 1, n_ids + 1), config.sigma).log()
        self.log_sigma = nn.Parameter(log_sigma, requires_grad=config.sigma_learned)

    def sigma(self) -> Tensor:
        """Standard deviations [n_ids + 1, n_ids + 1] by id seen and id wanted, clamped to a range.

        Of two different noisy ids there is none: no pair of images has them.
        """
        log_sigma = self.log_sigma
        kept = log_sigma.detach().clamp(min=math.log(SIGMA_FLOOR))
        sigma = (kept + (log_sigma - log_sigma.detach())).exp()  # with its slope at the floor, too
        smallest = torch.cat([sigma.diagonal(), sigma[0], sigma[:, 0]]).min().detach()
        return torch.minimum(sigma, self.ratio * smallest)

    @torch.no_grad()
    def keep_in_range(self) -> None:
        """After a step: a logarithm far below the floor would take as many steps to come back."""
        self.log_sigma.clamp_(min=math.log(SIGMA_FLOOR))

    def forward(self, image: Tensor, target: Tensor, seen: Tensor, wanted: Tensor) -> Tensor:
        """Negative log-likelihood of each image per pixel, without its constant: [B]."""
        difference = image - target
        if self.bounds:
            beyond = ((target <= 0) & (image < 0)) | ((target >= 1) & (image > 1))
            cleaned = (wanted == 0)[:, None, None, None]
            difference = difference.masked_fill(beyond & cleaned, 0.0)
        error = difference.square().flatten(1).mean(1) + ERROR_FLOOR
        pair = self.sigma()[seen, wanted]  # [B], learns from errors that do not learn from it
        fit = error.detach() / (2 * pair.square()) + pair.log()
        near = pair.detach()
        own = error.detach().sqrt().clamp(near / self.own, near * self.own)
        # Noisy targets keep the sigma of their pair: with their own, the strong streaks of few
        # views, hardest of all, would weigh so little that they were never learned.
        sigma = torch.where(wanted == 0, own, near)
        return error / (2 * sigma.square()) + sigma.log() + fit - fit.detach()


class Regression(nn.Module):
    """Objective of the supervised baseline: noisy to clean, each noise id with its own sigma."""

    def __init__(self, model: UNet, config: LossConfig, n_ids: int) -> None:
        super().__init__()
        self.model, self.likelihood = model, Likelihood(config, n_ids)
        self.config = config

    def forward(self, batch: Batch, normal: StepNormal, warmup: float) -> dict[str, Tensor]:
        """Loss of one worker's images, a scalar; the sampling noise and the warm-up are unused."""
        assert batch.noisy is not None
        n_ids = batch.noisy.shape[1]
        ids = torch.arange(1, n_ids + 1, device=batch.noisy.device).repeat(len(batch.noisy))
        seen = _as_found(batch.noisy.flatten(0, 1), ids, self.config, normal)
        estimate = self.model(seen, ids)
        target = batch.clean.repeat_interleave(n_ids, dim=0)
        return {"loss": self.likelihood(estimate, target, ids, torch.zeros_like(ids)).mean()}


class Objective(nn.Module):
    """Model and loss as one module, so that data-parallel training wraps both."""

    def __init__(self, model: HVAE, config: LossConfig, n_ids: int, *, told: float = 0.0) -> None:
        """`told`: share of images whose view count a model of a range is told."""
        super().__init__()
        self.model, self.config, self.n_ids, self.told = model, config, n_ids, told
        self.likelihood = Likelihood(config, n_ids)

    def forward(self, batch: Batch, normal: StepNormal, warmup: float) -> dict[str, Tensor]:
        """Loss of one worker's images and its parts; means over images, so workers may average.

        Args:
            batch: clean images and their noisy versions; partners are neighbours.
            normal: sampling noise of the step.
            warmup: 0 at the start of the run, 1 after the warm-up.

        Returns:
            Scalars: loss, recon (per pixel, with the sigma term), kl_content, kl_noise (nats per
            image, also of each level), triplet, distance_same_id, distance_clean_noisy, content_kl
            (nats per image), noise_id (nats; 0 for a decoder that learns the noise), and of a range
            of view counts views_error, that of their logarithm.
        """
        config = self.config
        assert batch.noisy is not None
        n_images, n_versions = len(batch.clean), 1 + self.n_ids
        x = torch.cat([batch.clean[:, None], batch.noisy], dim=1).flatten(0, 1)
        n_pixels = x[0].numel()
        row = torch.arange(len(x), device=x.device)
        image, ids = row // n_versions, row % n_versions
        # A swapped image takes the noise code of its partner's version of another id, clean for
        # noisy and a random noisy id for clean, and its target is its own version of that id.
        swapped = normal.uniform(len(x)) < config.swap_probability
        noisy_id = _any_id(normal.uniform(n_images), self.n_ids)[image]
        wanted = torch.where(swapped, torch.where(ids == 0, noisy_id, 0), ids)
        donor = torch.where(swapped, image ^ 1, image) * n_versions + wanted
        target = image * n_versions + wanted
        known = ids
        if self.model.stem.inverse is not None:
            # Sometimes the id is withheld: that is how ids are detected and unknown ones cleaned.
            known = ids.masked_fill(normal.uniform(len(x)) < WITHHELD, 0)
        seen = _as_found(x, ids, config, normal)
        counts = told = None
        if batch.n_views is not None:
            counts = F.pad(batch.n_views, (1, 0)).flatten()  # of every row of x
            told = counts.masked_fill(normal.uniform(len(x)) >= self.told, -1)
        result = self.model(
            seen,
            donors=donor,
            normal=normal,
            noise_ids=known,
            told=told,
            wanted=None if counts is None else counts[target],
        )

        weight = torch.where((ids == 0) & (wanted > 0), config.injection, 1.0)
        recon = (weight * self.likelihood(result.image, x[target], ids, wanted)).mean()
        content, noise = joined([q for q, _ in result.content]), joined(result.noise)
        prior = joined([p for _, p in result.content])
        terms = kl_terms(joined([content, noise]), joined([prior, standard(noise)]))
        posteriors = [*(q for q, _ in result.content), *result.noise]
        levels = [q.mu[0].numel() for q in posteriors]
        nats = torch.stack([level.sum(1) for level in terms.split(levels, dim=1)])
        paid = F.relu(nats - config.free_bits).mean(1).sum()
        distances = code_distances(noise.mu, self.n_ids, levels[len(result.content) :])
        triplet = triplet_loss(distances, config.triplet_form, config.margin, batch.n_views)
        content_kl = _symmetric_kl(content, self.n_ids)
        loss = recon + warmup * config.beta * paid / n_pixels + config.triplet * triplet
        if config.content_kl:
            loss = loss + warmup * config.content_kl * content_kl.mean() / n_pixels
        noise_id = torch.zeros_like(loss)
        views_error: dict[str, Tensor] = {}
        if counts is not None:
            noise_id, error = self._reading(result, counts, counts[target])
            loss = loss + NOISE_ID * noise_id + N_VIEWS * error
            views_error = {"views_error": error.detach()}
        elif isinstance(self.model.noise_maker, NoiseMaker):
            logits = self.model.noise_maker.noise_id(result.codes.noise)
            noise_id = F.cross_entropy(logits, wanted)
            loss = loss + NOISE_ID * noise_id
        return {
            "loss": loss,
            "recon": recon.detach(),
            **_by_level("kl_content", nats[: len(result.content)]),
            **_by_level("kl_noise", nats[len(result.content) :]),
            "triplet": triplet.detach(),
            "distance_same_id": distances.same.detach().mean().sqrt(),
            "distance_clean_noisy": distances.clean.detach().mean().sqrt(),
            "content_kl": content_kl.mean().detach(),
            "noise_id": noise_id.detach(),
            **views_error,
        }

    def _reading(self, result: Inference, counts: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """What the images' own codes, and those in use, tell of view counts [rows]: losses of
        `ViewCountMaker.loss`."""
        maker, side = self.model.noise_maker, max(result.codes.size)
        assert isinstance(maker, ViewCountMaker)
        own = maker.loss([q.mu for q in result.noise], counts, side)
        used = maker.loss(result.codes.noise, wanted, side)
        return 0.5 * (own[0] + used[0]), 0.5 * (own[1] + used[1])


def _by_level(name: str, nats: Tensor) -> dict[str, Tensor]:
    """Mean KL of images, in all and of each level, finest first, from [levels, B]."""
    levels = nats.detach().mean(1)
    return {name: levels.sum(), **{f"{name}_{k}": level for k, level in enumerate(levels.unbind())}}


def _any_id(uniform: Tensor, n_ids: int) -> Tensor:
    """A noisy id in 1 to n_ids for each value in [0, 1)."""
    # The sum of float32 is rounded, up to n_ids + 1 where a value is next to 1.
    return (1 + uniform * n_ids).long().clamp(max=n_ids)


def _as_found(x: Tensor, ids: Tensor, config: LossConfig, normal: StepNormal) -> Tensor:
    """What the network sees of images [B, C, H, W] of noise ids [B]: noisy ones as files hold them.

    Some have Gaussian noise on top, of a standard deviation between 0 and loss.grain that differs
    from image to image; a share of loss.stored is cut to [0, 1] and rounded to 8 bits.
    """
    if config.grain:
        chosen = (normal.uniform(len(x)) < GRAINY) & (ids > 0)
        sigma = config.grain * normal.uniform(len(x)) * chosen
        x = x + sigma[:, None, None, None] * normal(tuple(x.shape))
    if config.stored:
        chosen = (normal.uniform(len(x)) < config.stored) & (ids > 0)
        x = torch.where(chosen[:, None, None, None], stored(x), x)
    return x


def stored(x: Tensor) -> Tensor:
    """Images as a file of 8 bits holds them: cut to [0, 1], rounded to 256 levels."""
    return (x.clamp(0, 1) * 255).round() / 255


def _symmetric_kl(q: Gaussian, n_ids: int) -> Tensor:
    """Mean of both KL directions between the clean and each noisy version, in nats: [B n_ids]."""
    mu, logvar = (t.unflatten(0, (-1, 1 + n_ids)) for t in q)
    clean = Gaussian(*(t[:, :1].expand_as(t[:, 1:]).flatten(0, 1) for t in (mu, logvar)))
    noisy = Gaussian(*(t[:, 1:].flatten(0, 1) for t in (mu, logvar)))
    return 0.5 * (kl(clean, noisy) + kl(noisy, clean))
