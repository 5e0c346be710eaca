"""The learning step: batches -> gradients -> weights and their moving average. Runs without Ray.

`Learner` holds everything that a checkpoint must hold; `fit` drives it from its current step to
the last one, and tells its caller when to log, validate and save.
"""

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from snr_ray.config import Config
from snr_ray.learning.ahead import ahead
from snr_ray.learning.batches import Batch, Pairs, Share, StepNormal
from snr_ray.learning.captured import Captured, is_capturable
from snr_ray.learning.compiled import Compiled, is_wanted
from snr_ray.learning.drawing import Drawing, Drawn
from snr_ray.learning.health import Health
from snr_ray.learning.losses import Objective, Regression
from snr_ray.learning.muon import Muon
from snr_ray.learning.recipe import peak_share
from snr_ray.metrics import psnr
from snr_ray.network.blocks import PixelLevel
from snr_ray.network.hvae import HVAE
from snr_ray.network.itnet import ItNet
from snr_ray.network.physics import LinearInverse
from snr_ray.network.swap import N_DONORS, NoiseCodes, collect, swap
from snr_ray.network.trust import least_explained
from snr_ray.network.unet import UNet, regress
from snr_ray.noise.operator import noise_operator, noise_specs
from snr_ray.noise.tensors import Counts, noise_of_each
from snr_ray.noise.viewrange import ViewRange

LOG_EVERY_STEPS = 25
OWN = ("capturable",)
"""What of an optimizer is a matter of its device, not of the run."""
SCORE_BATCH = 256
SCORE_BOTH_WAYS = 32
"""Validation images that are also rebuilt and injected with noise: for a curve, not for a table."""

BF16_COSTS = "bf16_costs_psnr"
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
        if config.model.kind == "itnet":
            return ItNet(config.model, channels, noise_specs(config.noise))
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
    optimizers.append(
        torch.optim.Adam(
            groups,
            lr=config.train.lr,
            betas=(0.9, 0.99),
            fused=True,
            capturable=weights[0].is_cuda,
        )
    )
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
        compiles = is_wanted(config, self.device)
        self.average = copy.deepcopy(self.objective.model).eval().requires_grad_(False)
        self.compiled = Compiled(self.objective) if compiles else None
        self.parallel = wrap(self.objective)
        self.optimizers = build_optimizers(self.objective, config)
        self._rates = [
            torch.zeros((), device=self.device)
            for optimizer in self.optimizers
            for _ in optimizer.param_groups
        ]
        self.captured: Captured | None = None
        if self.device.type == "cuda" and is_capturable(config) and self.parallel is self.objective:
            self.captured = Captured(self._step, Drawing(self.objective))
        self.step = 0
        self.first_loss: Tensor | None = None
        # Counted where the gradients are: the host would have to wait for every step otherwise.
        self._skipped, self._in_a_row, self._longest = torch.zeros(3, device=self.device)

    @property
    def skipped(self) -> int:
        """Steps of the run whose gradient was not finite."""
        return int(self._skipped)

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

    @torch.no_grad()
    def with_noise(self, batch: Batch) -> Batch:
        """A batch with the noise of its view counts, made on its device."""
        views, n_views = ViewRange.of(self.config.noise), batch.n_views
        if batch.noisy is not None or views is None:
            return batch
        assert n_views is not None
        clean = batch.clean.repeat_interleave(n_views.shape[1], dim=0)
        counts = Counts(n_views.flatten(), *views.counts(max(clean.shape[-2:])))
        noisy = noise_of_each(clean, counts, views.filter, views.angle_range)
        return Batch(batch.clean, noisy.unflatten(0, n_views.shape), n_views)

    def train_step(self, batch: Batch) -> dict[str, Tensor]:
        """One optimizer step; returns the loss and its parts, `grad_norm` before it is clipped, and
        `taken`: 1, or 0 if the step was skipped.

        A step whose gradient is not finite is skipped and counted: gradients are shared, so every
        worker skips the same one. The moving average moves towards weights that stayed.
        """
        batch = batch.to(self.device)
        if self.captured is not None:
            self._set_rates()
            normal = StepNormal(self.config.seed, self.step, Share(), self.device)
            parts = self.captured(batch, normal, self._warmup)
            self._follow(parts["taken"])
        else:
            parts = self.gradients(self.with_noise(batch))
            parts |= self.update()
        if self.first_loss is None:
            self.first_loss = parts["loss"].clone()
        self.step += 1
        return parts

    def gradients(self, batch: Batch) -> dict[str, Tensor]:
        """Give every weight the gradient of this step's loss; returns the loss and its parts."""
        self._forget()
        n = max(1, self.config.train.n_parts // self.share.world_size)
        found: list[dict[str, Tensor]] = []
        for k, part in enumerate(batch.parts(n)):
            share = Share(self.share.rank * n + k, self.share.world_size * n)
            normal = StepNormal(self.config.seed, self.step, share, self.device)
            with self._alone(k < n - 1):
                found.append(self._losses(part, normal, self._warmup))
                (found[-1]["loss"] / n).backward()
        values = torch.stack([torch.stack(list(one.values())).detach() for one in found]).mean(0)
        return dict(zip(found[0], values.unbind(), strict=True))

    def update(self) -> dict[str, Tensor]:
        """Move the weights by their gradients, and the moving average after them. Nothing here
        depends on what the numbers are, so the host does not wait for them."""
        self._set_rates()
        parts = self._descend()
        self._follow(parts["taken"])
        return parts

    def _step(self, batch: Batch, drawn: Drawn, warmup: Tensor) -> dict[str, Tensor]:
        """What is captured: from clean images to new weights."""
        self._forget()
        parts = self._losses(self.with_noise(batch), drawn, warmup)
        parts["loss"].backward()
        return {name: value.detach() for name, value in parts.items()} | self._descend()

    def _forget(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    @property
    def _warmup(self) -> float:
        return min(1.0, self.step / max(1, self.config.loss.warmup * self.config.train.steps))

    def _losses(
        self, part: Batch, normal: StepNormal | Drawn, warmup: float | Tensor
    ) -> dict[str, Tensor]:
        """The loss and its parts, of a part of the batch."""
        bf16 = self.config.train.precision == "bf16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16):
            if self.compiled is None:
                return self.parallel(part, normal, warmup)
            drawn = normal if isinstance(normal, Drawn) else self.compiled.draw(part, normal)
            try:
                # As a tensor: a graph is made anew for every other number.
                return self.parallel(part, drawn, torch.as_tensor(warmup, device=self.device))
            except torch._dynamo.exc.TorchDynamoException as error:
                if self.config.train.compile != "auto":
                    raise
                self.compiled.undo(error)
                self.compiled = None
                return self.parallel(part, Drawn(drawn.numbers), warmup)

    def _set_rates(self) -> None:
        """On a GPU as tensors: a captured step reads them anew."""
        rate = self.config.train.lr * self._schedule()
        groups = (group for optimizer in self.optimizers for group in optimizer.param_groups)
        for group, held in zip(groups, self._rates, strict=True):
            value = rate * group.get("scale", 1.0)
            group["lr"] = held.fill_(value) if held.is_cuda else value

    def _descend(self) -> dict[str, Tensor]:
        """The step of the optimizers, along gradients of a bounded norm."""
        weights = self.objective.parameters()
        norm = nn.utils.clip_grad_norm_(weights, self.config.train.grad_clip, foreach=True)
        taken = torch.isfinite(norm).float()
        for optimizer in self.optimizers:
            optimizer.found_inf = 1 - taken  # type: ignore[attr-defined]
            optimizer.step()
        return {"grad_norm": norm.detach(), "taken": taken}

    @torch.no_grad()
    def _follow(self, taken: Tensor) -> None:
        """Move the average after the weights, and count."""
        # A young average would otherwise remember the untrained weights.
        decay = min(self.config.train.ema, (1 + self.step) / (10 + self.step))
        averages, weights = self.average.parameters(), self.objective.model.parameters()
        torch._foreach_lerp_(list(averages), list(weights), 1 - decay)
        self._skipped += 1 - taken
        self._in_a_row.add_(1).mul_(1 - taken)
        torch.maximum(self._longest, self._in_a_row, out=self._longest)

    def longest_skip(self) -> int:
        """Most steps in a row that were skipped since the last call."""
        longest = int(self._longest)
        self._longest.zero_()
        return longest

    def first_loss_of_all(self) -> float:
        """Loss of the first step that this run knows of, over all workers."""
        assert self.first_loss is not None
        return float(over_workers(self.first_loss))

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
        counts = enumerate(self.config.noise.n_views, start=1)
        sets = (
            (n_views / side, val.take(part, noise_id), val.take(part, 0))
            for noise_id, n_views in counts
            for part in parts
        )
        least = least_explained(model, codes.mean(0), sets)
        return {f"{LEAST_EXPLAINED}{known:.4g}": value for known, value in least.items()}

    def bf16_costs(self, donors: Pairs, val: Pairs, whole: Metrics) -> Metrics:
        """PSNR in dB of cleaned images that bfloat16 takes from the metrics of `validate`."""
        with torch.autocast(self.device.type, torch.bfloat16):
            _, half = self.validate(donors, val)
        name = "unet_psnr" if "unet_psnr" in whole else "swap_psnr"
        return {BF16_COSTS: whole[name] - half[name]}

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs, as tensors and plain values."""
        return {
            "objective": self.objective.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [_plain(optimizer.state_dict()) for optimizer in self.optimizers],
            "step": self.step,
            "skipped": self.skipped,
            "first_loss": self.first_loss,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self.objective.load_state_dict(state["objective"])
        self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            own = [{k: g[k] for k in OWN if k in g} for g in optimizer.param_groups]
            optimizer.load_state_dict(saved)
            for group, device_s in zip(optimizer.param_groups, own, strict=True):
                group.update(device_s)
        self.step, self.first_loss = state["step"], state.get("first_loss")
        self._skipped.fill_(state["skipped"])

    def _alone(self, holds: bool) -> contextlib.AbstractContextManager[None]:
        """Where gradients wait for further parts of the batch before workers share them."""
        if holds and isinstance(self.parallel, nn.parallel.DistributedDataParallel):
            return self.parallel.no_sync()
        return contextlib.nullcontext()

    def _schedule(self) -> float:
        """Share of train.lr: linear warm-up to the peak of this run, then cosine to 2 % of it."""
        config = self.config.train
        peak = peak_share(self.config)
        if self.step < config.warmup_steps:
            return peak * (self.step + 1) / config.warmup_steps
        done = (self.step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
        return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """State of an optimizer whose rates may be tensors, which every step sets anew."""
    groups = [group | {"lr": float(group["lr"])} for group in state["param_groups"]]
    return state | {"param_groups": groups}


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
        log: called every LOG_EVERY_STEPS steps with the step, means of what steps return over all
            workers, steps skipped so far and images per second (clean images over all workers).
        checkpoint: called every train.checkpoint_every_steps steps and at the end, with whether
            this is the end, where the weights are worth keeping; returns True to stop early.

    Raises:
        Diverged: if the run cannot come to anything any more.
    """
    config = learner.config.train
    health, tally, since = Health(config.lr), Tally(), time.perf_counter()
    if learner.device.type == "cuda":
        batches = ahead(batches)
    while learner.step < config.steps:
        batch = next(batches)
        tally.add(learner.train_step(batch), len(batch.clean))
        last = learner.step == config.steps
        logs = learner.step % LOG_EVERY_STEPS == 0 or last
        saves = learner.step % config.checkpoint_every_steps == 0 or last
        if not (logs or saves):
            continue
        means = tally.means()
        health.first_loss = learner.first_loss_of_all()
        well = health.judge(learner.step, means["loss"], learner.longest_skip(), last=last)
        if logs:
            elapsed = time.perf_counter() - since
            rate = tally.images * learner.share.world_size / max(elapsed, 1e-9)
            row = {"step": learner.step, **means, "skipped": learner.skipped}
            log(row | {"images_per_s": rate})
            tally, since = Tally(), time.perf_counter()
        if saves and well:
            paused = time.perf_counter()
            if checkpoint(last):
                return
            since += time.perf_counter() - paused  # validation is not training time


class Tally:
    """Means of what steps return, over the steps that were taken, without waiting for any."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.images = 0
        self.sums = torch.zeros(())

    def add(self, parts: dict[str, Tensor], images: int) -> None:
        """Count one step, and the clean images of this worker in it."""
        values = torch.stack([value.detach() for value in parts.values()])
        values = torch.where(parts["taken"] > 0, values, 0.0)
        self.sums = self.sums + values if self.names else values
        self.names = list(parts)
        self.images += images

    def means(self) -> Metrics:
        """Means over the steps since the start, and over all workers; NaN where none was taken."""
        means = dict(zip(self.names, over_workers(self.sums).tolist(), strict=True))
        taken = means.pop("taken")
        return {name: total / taken if taken else math.nan for name, total in means.items()}


def over_workers(values: Tensor) -> Tensor:
    """The mean of every worker's values, the same on all of them."""
    if not dist.is_initialized():
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / dist.get_world_size()


def donor_codes(model: HVAE, pairs: Pairs) -> NoiseCodes:
    """Noise codes of the first N_DONORS images of a set, clean and under every noise id."""
    rows = np.arange(min(N_DONORS, len(pairs)))
    return collect(model, [pairs.take(rows, k) for k in range(len(pairs.noisy) + 1)])


def both_ways(model: HVAE, codes: NoiseCodes, pairs: Pairs, rows: npt.NDArray[np.int64]) -> Metrics:
    """PSNR in dB of the other things that a model does to images, mean over noise ids: of noisy
    images rebuilt from their own codes, and of clean ones with noise injected, which are scored
    unclipped."""
    clean, rebuilt, injected = pairs.take(rows, 0), [], []
    for noise_id in range(1, len(pairs.noisy) + 1):
        noisy, ids = pairs.take(rows, noise_id), np.full(len(rows), noise_id)
        again = swap(model, noisy, None, noise_ids=ids)
        rebuilt.append(psnr(again, noisy, clip=False).mean())
        made = swap(model, clean, codes.mean(noise_id))
        injected.append(psnr(made, noisy, clip=False).mean())
    return {
        "recon_noisy_psnr": float(np.mean(rebuilt)),
        "inject_psnr": float(np.mean(injected)),
    }


def validate(
    model: HVAE | UNet,
    codes: NoiseCodes | None,
    pairs: Pairs,
    n_views: tuple[int, ...],
    told: ViewRange | None = None,
) -> Metrics:
    """PSNR in dB of cleaned images for each noise id and their mean, under `swap_psnr`.

    Args:
        model: in eval mode; of a HVAE also reconstructed clean images are scored, and `both_ways`.
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
            if codes is not None and start == 0:
                sums |= both_ways(model, codes, pairs, part[:SCORE_BOTH_WAYS])
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
