"""The learning step: batches -> gradients -> weights and their moving average. Runs without Ray.

`Learner` holds everything that a checkpoint must hold; `fit` drives it.
"""

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from snr_ray.config import Config
from snr_ray.errors import InputError
from snr_ray.learning.batches import Batch, Pairs, Share, StepNormal
from snr_ray.learning.build import build_objective, build_optimizers
from snr_ray.learning.captured import Captured, is_capturable
from snr_ray.learning.drawing import Drawing, Drawn
from snr_ray.learning.modelfolder import BF16_COSTS, least_metrics
from snr_ray.learning.recipe import rate_share
from snr_ray.learning.validation import SCORE_BATCH, Metrics, donor_codes, validate
from snr_ray.network.blocks import PixelLevel
from snr_ray.network.hvae import HVAE
from snr_ray.network.noisemaker import NoiseMaker
from snr_ray.network.swap import NoiseCodes
from snr_ray.network.trust import least_explained
from snr_ray.network.unet import UNet
from snr_ray.network.viewcount import ViewCountMaker
from snr_ray.noise.operator import noise_operator, noise_specs
from snr_ray.noise.tensors import Counts, noise_of_each
from snr_ray.noise.viewrange import ViewRange

BACKEND = "inductor"
"""What torch.compile makes a step's graph into."""


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
        if config.train.compile is True:
            self.objective.compile(fullgraph=True, dynamic=False, backend=BACKEND)
        self.parallel = wrap(self.objective)
        self.optimizers = build_optimizers(self.objective, config)
        self._rates = [
            torch.zeros((), device=self.device)
            for optimizer in self.optimizers
            for _ in optimizer.param_groups
        ]
        self.drawing = Drawing(self.objective)
        self.captured = self._capturing()
        self.step = 0
        self.first_loss = torch.full((), torch.nan, device=self.device)
        """Of the first step that was taken with a loss that is a number."""
        # Counted where the gradients are: the host would have to wait for every step otherwise.
        self._skipped, self._in_a_row, self._longest = torch.zeros(3, device=self.device)

    def _capturing(self) -> Captured | None:
        alone = self.parallel is self.objective
        if self.device.type == "cuda" and is_capturable(self.config) and alone:
            return Captured(self._step, self.drawing)
        return None

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
        guess of the clean image is the estimate. It may lack model.step_channels, too: what they
        see adds nothing at first.
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
        its, mine = (getattr(model, "noise_maker", None) for model in (other, self.average))
        if isinstance(its, ViewCountMaker) and isinstance(mine, ViewCountMaker):
            bias = weights["noise_maker.reading.bias"].clone()
            bias[1] += its.middle - mine.middle  # the same code reads as the same count
            weights["noise_maker.reading.bias"] = bias
        elif isinstance(its, NoiseMaker) and isinstance(mine, NoiseMaker):
            # As many counts in another order: the code of the fewest views reads as the fewest.
            place = its.n_views.argsort()[mine.n_views.argsort().argsort()]
            for name in ("noise_maker.logits.weight", "noise_maker.logits.bias"):
                weights[name] = weights[name][place]
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
        known = torch.isfinite(self.first_loss) | (parts["taken"] == 0)
        self.first_loss = torch.where(known, self.first_loss, parts["loss"])
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
            if self.config.train.compile is not True:
                return self.parallel(part, normal, warmup)
            if isinstance(normal, StepNormal):
                normal = self.drawing(part, normal)
            try:
                # As a tensor: a graph is made anew for every other number.
                return self.parallel(part, normal, torch.as_tensor(warmup, device=self.device))
            except torch._dynamo.exc.TorchDynamoException as error:
                cause = getattr(error, "inner_exception", error)
                reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
                raise InputError(
                    f"train.compile=true needs a compiler that torch can use, but got: {reason}; "
                    "leave it out."
                ) from error

    def _set_rates(self) -> None:
        """On a GPU as tensors: a captured step reads them anew."""
        rate = self.config.train.lr * rate_share(self.config, self.step)
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
        self.objective.likelihood.keep_in_range()
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
        return least_metrics(least)

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
            optimizer.load_state_dict(saved)
            for group in optimizer.param_groups:
                if "capturable" in group:  # as this device wants it, not the one of the state
                    group["capturable"] = self.device.type == "cuda"
        self.captured = self._capturing()  # graphs write to the states that were
        self.step = int(state["step"])
        first = state.get("first_loss")
        self.first_loss = torch.as_tensor(torch.nan if first is None else first, device=self.device)
        self._skipped.fill_(state["skipped"])

    def _alone(self, holds: bool) -> contextlib.AbstractContextManager[None]:
        """Where gradients wait for further parts of the batch before workers share them."""
        if holds and isinstance(self.parallel, nn.parallel.DistributedDataParallel):
            return self.parallel.no_sync()
        return contextlib.nullcontext()


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """State of an optimizer whose rates may be tensors, which every step sets anew."""
    groups = [group | {"lr": float(group["lr"])} for group in state["param_groups"]]
    return state | {"param_groups": groups}
