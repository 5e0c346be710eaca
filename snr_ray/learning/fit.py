"""The learning step: batches -> gradients -> weights and their moving average. Runs without Ray.

`Learner` holds everything that a checkpoint must hold; `fit` drives it from its current step to
the last one, and tells its caller when to log, validate and save.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from snr_ray.config import Config
from snr_ray.learning.batches import Batch, Pairs, Share, StepNormal
from snr_ray.learning.losses import Objective, Regression
from snr_ray.learning.muon import Muon
from snr_ray.metrics import psnr
from snr_ray.network.blocks import PixelLevel
from snr_ray.network.hvae import HVAE
from snr_ray.network.noisemaker import noise_of
from snr_ray.network.physics import LinearInverse
from snr_ray.network.swap import N_DONORS, NoiseCodes, collect, swap
from snr_ray.network.trust import least_explained
from snr_ray.network.unet import UNet, regress
from snr_ray.noise.operator import noise_operator, noise_specs
from snr_ray.noise.viewrange import ViewRange

LOG_EVERY_STEPS = 25
SCORE_BATCH = 256
LR_STEPS = 1000
"""Steps of the run that train.lr was chosen for. It is too high for a HVAE in longer ones: at 3500
steps half of it cleaned 0.3 dB better. A U-Net keeps it: at 14000 steps a quarter of it cost half a
dB on notMNIST (shipped/choices.md)."""

LEAST_EXPLAINED = "least_explained_"
"""Metrics of this name and a number of views per pixel bound what `denoise` trusts."""

Metrics = dict[str, float]


def build_model(config: Config) -> HVAE | UNet:
    """An untrained model; the same weights for the same seed."""
    channels, one_pass = config.images.channels, config.loss.swap_probability > 0
    inverse = None
    if config.model.physics:
        inverse = LinearInverse(len(config.noise.n_views), config.images.size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if config.model.kind == "unet":
            return UNet(config.model, channels, inverse)
        noise = ViewRange.of(config.noise) or noise_specs(config.noise)
        return HVAE(config.model, channels, noise, inverse, one_pass=one_pass)


def build_objective(config: Config) -> Objective | Regression:
    """An untrained model in its training objective."""
    model, n_ids = build_model(config), len(config.noise.n_views)
    if isinstance(model, UNet):
        return Regression(model, config.loss, n_ids)
    if config.noise.views_per_pixel is not None:
        return Objective(model, config.loss, config.train.versions, told=config.train.told)
    return Objective(model, config.loss, n_ids)


def build_optimizers(objective: Objective | Regression, config: Config) -> list[Optimizer]:
    """Optimizers that share the weights and sigma of an objective among them."""
    weights = list(objective.model.parameters())
    optimizers: list[Optimizer] = []
    if config.train.optimizer == "muon":
        layers = [m for m in objective.model.modules() if isinstance(m, nn.Conv2d)]
        kernels = {id(layer.weight) for layer in layers}
        optimizers.append(Muon([w for w in weights if id(w) in kernels], lr=config.train.lr))
        weights = [w for w in weights if id(w) not in kernels]
    groups: list[dict[str, Any]] = [{"params": weights}]
    if config.loss.sigma_learned:
        # Few steps and one scalar each: sigma must move faster than the weights.
        groups.append({"params": [objective.likelihood.log_sigma], "scale": 5.0})
    optimizers.append(torch.optim.Adam(groups, lr=config.train.lr, betas=(0.9, 0.99)))
    return optimizers


class Learner:
    """Model, objective, optimizers, moving average and step counter of one worker."""

    def __init__(
        self,
        config: Config,
        *,
        device: torch.device | None = None,
        share: Share | None = None,
        wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
    ) -> None:
        """`wrap` turns the objective into its data-parallel form."""
        self.config = config
        self.device = device or torch.device("cpu")
        self.share = share or Share()
        self.objective = build_objective(config).to(self.device)
        self.objective.to(memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.objective.model).eval().requires_grad_(False)
        self.parallel = wrap(self.objective)
        self.optimizers = build_optimizers(self.objective, config)
        self.step = 0
        self.skipped = 0

    def fit_physics(self, pairs: Pairs) -> None:
        """Fit the linear estimates of a model with model.physics to clean training images."""
        size = self.config.images.size
        noise = [noise_operator(spec, size, size) for spec in noise_specs(self.config.noise)]
        inverse, average = self.objective.model.stem.inverse, self.average.stem.inverse
        assert inverse is not None
        assert average is not None
        inverse.fit(pairs.take(np.arange(len(pairs)), 0), noise)
        average.load_state_dict(inverse.state_dict())

    def start_from(self, other: HVAE | UNet) -> None:
        """Begin with the weights of a trained model of the same network.

        It may lack model.physics: what reads the linear estimate then begins at zero, and the first
        guess of the clean image is the estimate.
        """
        weights = {k: v for k, v in other.state_dict().items() if "stem.inverse." not in k}
        known = weights["stem.conv.weight"]
        finest = self.average.levels[0] if isinstance(self.average, HVAE) else None
        news = self.config.model.physics and other.stem.inverse is None
        if news and isinstance(finest, PixelLevel):
            corrects = "levels.0.steps.0.guess" if finest.steps else "levels.0.code"
            for name in (f"{corrects}.weight", f"{corrects}.bias"):
                weights[name] = weights[name].clone()
                weights[name][: finest.n_pixels] = 0
        for model in (self.objective.model, self.average):
            kernel = torch.zeros_like(model.stem.conv.weight)
            kernel[:, : known.shape[1]] = known
            model.load_state_dict({**weights, "stem.conv.weight": kernel}, strict=False)

    def with_noise(self, batch: Batch) -> Batch:
        """A batch with the noise of its view counts, made on its device."""
        views = ViewRange.of(self.config.noise)
        if batch.noisy is not None or views is None:
            return batch
        with torch.no_grad():
            noisy = [noise_of(views.spec(n_views), batch.clean) for n_views in batch.n_views]
        return Batch(batch.clean, torch.stack(noisy, dim=1), batch.n_views)

    def train_step(self, batch: Batch) -> dict[str, Tensor]:
        """One optimizer step; returns the loss and its parts.

        A step whose gradient is not finite is skipped and counted: gradients are shared, so every
        worker skips the same one.
        """
        config = self.config.train
        batch = self.with_noise(batch.to(self.device))
        normal = StepNormal(self.config.seed, self.step, self.share, self.device)
        progress = self.step / max(1, self.config.loss.warmup * config.steps)
        rate = config.lr * self._schedule()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("scale", 1.0)
            optimizer.zero_grad(set_to_none=True)
        bf16 = config.precision == "bf16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16):
            parts = self.parallel(batch, normal, min(1.0, progress))
        parts["loss"].backward()
        norm = nn.utils.clip_grad_norm_(self.objective.parameters(), config.grad_clip)
        if torch.isfinite(norm):
            for optimizer in self.optimizers:
                optimizer.step()
            # A young average would otherwise remember the untrained weights.
            decay = min(config.ema, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                averages, weights = self.average.parameters(), self.objective.model.parameters()
                torch._foreach_lerp_(list(averages), list(weights), 1 - decay)
        else:
            self.skipped += 1
        self.step += 1
        return parts

    def validate(self, donors: Pairs, val: Pairs) -> tuple[NoiseCodes | None, Metrics]:
        """Noise codes of the moving average (None of a U-Net) and its validation PSNR."""
        n_views, model = self.config.noise.n_views, self.average
        codes = None if isinstance(model, UNet) else donor_codes(model, donors)
        views = ViewRange.of(self.config.noise)
        return codes, validate(model, codes, val, n_views, views)

    def least_explained(self, codes: NoiseCodes | None, val: Pairs) -> Metrics:
        """What good answers to validation images explain at the least, by views per pixel, dB.

        Nothing of a model that cannot say so, and of one with model.physics, which is told.
        """
        model = self.average
        if codes is None or isinstance(model, UNet) or not model.unrolls or model.stem.inverse:
            return {}
        rows = np.arange(len(val))
        parts = [rows[k : k + SCORE_BATCH] for k in range(0, len(rows), SCORE_BATCH)]
        side = self.config.images.size
        counts = enumerate((math.inf, *self.config.noise.n_views))
        sets = (
            (n_views / side, val.take(part, noise_id), val.take(part, 0))
            for noise_id, n_views in counts
            for part in parts
        )
        least = least_explained(model, codes.mean(0), sets)
        return {f"{LEAST_EXPLAINED}{known:.4g}": value for known, value in least.items()}

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs, as tensors and plain values."""
        return {
            "objective": self.objective.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "skipped": self.skipped,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self.objective.load_state_dict(state["objective"])
        self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.skipped = state["step"], state["skipped"]

    def _schedule(self) -> float:
        """Share of train.lr: linear warm-up to the peak of this run, then cosine to 2 % of it."""
        config = self.config.train
        hvae = self.config.model.kind == "hvae"
        peak = math.sqrt(min(1.0, LR_STEPS / config.steps)) if hvae else 1.0
        if self.step < config.warmup_steps:
            return peak * (self.step + 1) / config.warmup_steps
        done = (self.step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
        return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def fit(
    learner: Learner,
    batches: Iterator[Batch],
    *,
    log: Callable[[Metrics], None],
    checkpoint: Callable[[bool], bool],
) -> None:
    """Train from the learner's step to the last one of its config.

    Args:
        learner: fresh, or loaded from a checkpoint.
        batches: this worker's batches from `learner.step` on.
        log: called every LOG_EVERY_STEPS steps with the step, mean losses and images per second
            (clean images over all workers).
        checkpoint: called every train.checkpoint_every_steps steps and at the end, with whether
            this is the end; returns True to stop early.
    """
    config = learner.config.train
    sums: dict[str, Tensor] = {}
    counted, since = 0, time.perf_counter()
    while learner.step < config.steps:
        parts = learner.train_step(next(batches))
        for name, value in parts.items():
            sums[name] = sums.get(name, torch.zeros((), device=value.device)) + value.detach()
        counted += 1
        last = learner.step == config.steps
        if learner.step % LOG_EVERY_STEPS == 0 or last:
            means = {name: float(value) / counted for name, value in sums.items()}
            elapsed = time.perf_counter() - since
            rate = counted * config.batch_size / max(elapsed, 1e-9)
            log({"step": learner.step, **means, "images_per_s": rate})
            sums, counted, since = {}, 0, time.perf_counter()
        if learner.step % config.checkpoint_every_steps == 0 or last:
            paused = time.perf_counter()
            if checkpoint(last):
                return
            since += time.perf_counter() - paused  # validation is not training time


def donor_codes(model: HVAE, pairs: Pairs) -> NoiseCodes:
    """Noise codes of the first N_DONORS images of a set, clean and under every noise id."""
    rows = np.arange(min(N_DONORS, len(pairs)))
    return collect(model, [pairs.take(rows, k) for k in range(len(pairs.noisy) + 1)])


def validate(
    model: HVAE | UNet,
    codes: NoiseCodes | None,
    pairs: Pairs,
    n_views: tuple[int, ...],
    told: ViewRange | None = None,
) -> Metrics:
    """PSNR in dB of cleaned images for each noise id and their mean, under `swap_psnr`.

    Args:
        model: in eval mode; of a HVAE also reconstructed clean images are scored.
        codes: noise codes of training images; the mean clean code does the swap. None for a U-Net,
            whose scores are named `unet_psnr`.
        pairs: validation images.
        n_views: view count of each noise id, for the names of the metrics.
        told: of a model of a range; images are then scored told their view count as well, under
            `told_psnr`.
    """
    rows = np.arange(len(pairs))
    name = "unet_psnr" if codes is None else "swap_psnr"
    sums: Metrics = {}
    for start in range(0, len(rows), SCORE_BATCH):
        part = rows[start : start + SCORE_BATCH]
        clean = pairs.take(part, 0)
        scored = {}
        if isinstance(model, HVAE):
            scored["recon_clean_psnr"] = psnr(swap(model, clean, None), clean)
        for noise_id, views in enumerate(n_views, start=1):
            noisy, ids = pairs.take(part, noise_id), np.full(len(part), noise_id)
            if isinstance(model, HVAE):
                assert codes is not None
                image = swap(model, noisy, codes.mean(0), noise_ids=ids)
                if told is not None:
                    known = swap(model, noisy, codes.mean(0), geometry=told.spec(views))
                    scored[f"told_psnr_{views}"] = psnr(known, clean)
            else:
                image = regress(model, noisy, ids)
            scored[f"{name}_{views}"] = psnr(image, clean)
        for metric, values in scored.items():
            sums[metric] = sums.get(metric, 0.0) + float(values.sum()) / len(rows)
    for total in (name, "told_psnr") if told is not None else (name,):
        sums[total] = float(np.mean([sums[f"{total}_{views}"] for views in n_views]))
    return sums
