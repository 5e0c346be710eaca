"""What training leaves on disk to be used: the model folder.

A model folder holds `model.safetensors` (weights and donors' noise codes), `config.yaml`,
`metrics.json` and `README.md`. Nothing is ever unpickled.
"""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor

from snr_ray import __version__
from snr_ray import configfile as configs
from snr_ray.config import Config
from snr_ray.errors import InputError, check
from snr_ray.learning.build import build_model
from snr_ray.learning.modelfolder import (
    BF16_COSTS,
    WEIGHTS_FILE,
    Knowledge,
    ModelFolder,
    least_metrics,
    least_of,
    read_metrics,
    read_model,
)
from snr_ray.metrics import as_json
from snr_ray.network.hvae import HVAE
from snr_ray.network.itnet import ItNet
from snr_ray.network.swap import NoiseCodes, detect, read_views
from snr_ray.network.unet import UNet

if TYPE_CHECKING:
    from snr_ray.learning.validation import Metrics

Array = npt.NDArray[np.float32]

WEIGHTS = "model."
DONORS = "donors."
BF16_DB = 0.02
"""Mean costs of bfloat16 in dB below which a model cleans images in it."""


def multiplies_bf16(device: str) -> bool:
    """Whether bfloat16 is the faster arithmetic: 1.2 times on GPUs and 2 to 3 times on processors
    with units for its matrix products (from Ampere on; AMX); others were not measured."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # torch 2.11 may not have it
    told: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return device == "cpu" and bool(told.get("amx_bf16"))


@dataclass(frozen=True)
class TrainedModel(Knowledge):
    """A model folder in memory; `model` is in eval mode."""

    config: Config
    model: HVAE
    codes: NoiseCodes
    least_explained: dict[float, float] = field(default_factory=dict)
    """What good answers explain at the least, dB, by views per pixel; empty where it was not
    measured. See `snr_ray.network.trust`."""
    bf16: bool = False
    """Whether bfloat16 costs less than BF16_DB of what the model cleans, as was measured on
    validation images when it was trained."""

    def arithmetic(self) -> contextlib.AbstractContextManager[None]:
        """In which the model cleans images: bfloat16 where it may and its device is faster at that,
        else float32. Noise is made in float32 all the same."""
        device = self.model.top.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.bf16 and multiplies_bf16(device))

    def guess_views(self, images: Array) -> npt.NDArray[np.int64]:
        """View count of each of images [B, C, H, W] by its noise code, 0 of clean ones: [B].

        A model of a range reads a number, which is near the true one and seldom equal to it; one of
        a few view counts takes the nearest of them.
        """
        if self.model.noise_maker is not None:
            return read_views(self.model, images)
        return np.array((0, *self.config.noise.n_views))[detect(self.model, self.codes, images)]

    def donors(self, n_views: int) -> list[Tensor]:
        """Noise codes of donors of a view count, in images of the size of training: per level
        [n_donors, C_noise, h, w]. 0 is clean. Of a range, they come near it.

        Raises:
            InputError: of a model of a few view counts, if it was not trained on it.
        """
        if n_views == 0 or self.views is None:
            noise_id = self.noise_id(n_views) if n_views else 0
            return [level[noise_id] for level in self.codes.donors]
        check(n_views >= 1, f"A view count must be at least 1, but got {n_views}.")
        return self.codes.between(np.log(self.config.noise.n_views), math.log(n_views))


@dataclass(frozen=True)
class TrainedUNet:
    """The same of a supervised baseline, which has no codes."""

    config: Config
    model: UNet


def save_model(
    folder: Path,
    config: Config,
    model: HVAE | UNet,
    codes: NoiseCodes | None,
    metrics: "Metrics",
    origin: str,
    *,
    steps: int,
) -> None:
    """Write a model folder; it appears complete or not at all, replacing an older one.

    Args:
        folder: where; its parent must exist.
        config: of the run.
        model: the weights to keep.
        codes: donors' noise codes; None for a U-Net.
        metrics: validation metrics of the last checkpoint.
        origin: the command or function that trained it, for the model card.
        steps: that it was trained for; less than train.steps where it was stopped before.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    tensors: dict[str, Tensor] = {WEIGHTS + k: v for k, v in model.state_dict().items()}
    donors = codes.donors if codes else []
    tensors |= {f"{DONORS}{level}": code for level, code in enumerate(donors)}
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    (partial / WEIGHTS_FILE).write_bytes(save(tensors, {"snr_ray": __version__}))
    configs.save(config, partial / "config.yaml")
    (partial / "metrics.json").write_text(as_json(metrics, indent=2) + "\n")
    (partial / "README.md").write_text(_card(config, model, metrics, origin, steps))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def ship(folder: Path, report: Path, target: Path) -> None:
    """Copy a model folder with weights of 16 bits and its test scores in the card.

    Args:
        folder: model folder.
        report: folder of `snr evaluate` for this model.
        target: new folder, such as snr_ray/shipped/NAME; `model_path` finds it by its name there.
    """
    trained = load_model(folder)
    target.mkdir(parents=True)
    tensors = {name: tensor.half() for name, tensor in load_file(folder / WEIGHTS_FILE).items()}
    save_file(tensors, target / WEIGHTS_FILE, {"snr_ray": __version__})
    shutil.copy(folder / "config.yaml", target)
    scored = json.loads((report / "metrics.json").read_text())
    least = least_metrics(trained.least_explained)
    costs = {name: v for name, v in read_metrics(folder).items() if name == BF16_COSTS}
    (target / "metrics.json").write_text(as_json(scored | least | costs, indent=2) + "\n")
    scores = (report / "metrics.md").read_text().replace("# ", "## ")
    (target / "README.md").write_text((folder / "README.md").read_text() + "\n" + scores)


def load_model(folder: str | Path, device: torch.device | None = None) -> TrainedModel:
    """Read a model folder, or a model that comes with snr_ray by its name.

    Raises:
        InputError: if the folder is missing, is not a model folder, its weights do not fit its
            config, or it holds a U-Net.
    """
    return hierarchical(read_model(folder), device)


def hierarchical(folder: ModelFolder, device: torch.device | None = None) -> TrainedModel:
    """A model with codes of the contents of its folder; raises as `load_model`."""
    trained = built(folder, device)
    if isinstance(trained, TrainedUNet):
        raise InputError(
            f"A model with noise and content codes (model.kind=hvae) is needed, but "
            f"{folder.path} holds a supervised "
            f"{'ItNet, a' if isinstance(trained.model, ItNet) else 'U-Net, the'} baseline; `snr "
            "evaluate --beside` scores it."
        )
    return trained


def load_any(folder: str | Path, device: torch.device | None = None) -> TrainedModel | TrainedUNet:
    """Read a model folder of either kind; raises as `load_model`."""
    return built(read_model(folder), device)


def built(folder: ModelFolder, device: torch.device | None = None) -> TrainedModel | TrainedUNet:
    """A model of the contents of its folder.

    Raises:
        InputError: if the weights do not fit the config.
    """
    config, path = folder.config, folder.path
    model, tensors = _network(folder)
    if isinstance(model, UNet):
        return TrainedUNet(config, model)
    n_levels, n_ids = len(config.model.channels), len(config.noise.n_views) + 1
    donors = [tensors.get(f"{DONORS}{level}") for level in range(n_levels)]
    kept = [
        level.float()
        for level, width in zip(donors, config.model.noise_channels, strict=True)
        if level is not None
        and level.ndim == 5
        and (level.shape[0], level.shape[2]) == (n_ids, width)
        and level.shape[1] > 0
    ]
    if len(kept) < n_levels:
        raise InputError(
            f"A model folder holds noise codes of {n_ids} noise ids at {n_levels} levels, but "
            f"{path} does not; train it again."
        )
    place = device or torch.device("cpu")
    model = model.to(place).to(memory_format=torch.channels_last)
    codes = NoiseCodes([level.to(place) for level in kept])
    bf16 = folder.metrics.get(BF16_COSTS, BF16_DB) < BF16_DB
    return TrainedModel(config, model, codes, least_of(folder.metrics), bf16)


def _network(folder: ModelFolder) -> tuple[HVAE | UNet, dict[str, Tensor]]:
    """Network in eval mode and all tensors of a model folder, checked."""
    config, path, tensors = folder.config, folder.path, load(folder.weights)
    model = build_model(config)
    weights = {k[len(WEIGHTS) :]: v for k, v in tensors.items() if k.startswith(WEIGHTS)}
    expected: dict[str, Any] = model.state_dict()
    for name in sorted(expected.keys() | weights.keys()):
        want = list(expected[name].shape) if name in expected else "no such weight"
        have = list(weights[name].shape) if name in weights else "none"
        if want != have:
            raise InputError(
                f"Weights must fit the config beside them, but {path} has {have} for {name} where "
                f"config.yaml wants {want}; the folder mixes two models."
            )
    broken = [name for name, weight in tensors.items() if not torch.isfinite(weight).all()]
    if broken:
        raise InputError(f"Weights must be finite, but {path} has NaN or infinity in {broken[0]}.")
    model.load_state_dict({k: v.float() for k, v in weights.items()})
    return model.eval().requires_grad_(False), tensors


def _card(config: Config, model: HVAE | UNet, metrics: "Metrics", origin: str, steps: int) -> str:
    n_weights = sum(p.numel() for p in model.parameters())
    whole = config.train.steps
    trained = f"{steps} steps" if steps == whole else f"{steps} steps, stopped before its {whole},"
    size, colour = config.images.size, "grey" if config.images.channels == 1 else "RGB"
    rows = "\n".join(f"| {name} | {value:.2f} |" for name, value in metrics.items())
    what = (
        "A supervised U-Net with an exact step behind it, some times over, from noisy images and\n"
        "their view count to clean ones: a baseline, without codes."
        if isinstance(model, ItNet)
        else "A supervised residual U-Net from noisy images to clean ones: the baseline, without "
        "codes."
        if isinstance(model, UNet)
        else "A hierarchical VAE whose latent splits in a content code and a noise code. The\n"
        "code of a clean image removes the streaks of a sparse-view reconstruction, that of a\n"
        "noisy one adds them."
    )
    photons = "with" if config.noise.photons else "without"
    if config.noise.views_per_pixel is not None:
        low, high = config.noise.views_per_pixel
        sizes = ", ".join(map(str, config.train.sizes or (size,)))
        seen = (
            f"{colour} images of {sizes} pixels; views per pixel of the longer side: {low:g} to "
            f"{high:g}, any whole count"
        )
        limits = (
            "Limits: trained on simulated noise, without photon noise. What it knows is views per\n"
            "pixel, not a size: larger images are cleaned as well where theirs lie in the range; "
            "below\nit, and with other filters, it fails. Its noise code tells the view count to a "
            "few percent,\nwhich is not exact; `--views` says it."
        )
    else:
        crop = config.images.crop
        part = f"crops of {crop}x{crop} pixels of " if crop else ""
        views = ", ".join(map(str, config.noise.n_views))
        seen = f"{part}{size}x{size} {colour} images; views: {views}"
        told = isinstance(model, HVAE) and model.unrolls
        others = (
            ", and other view counts must be told" if told else ", and so are other view counts"
        )
        limits = (
            f"Limits: trained on simulated noise, {photons} photon noise, of images of this size; "
            f"streaks of\nother sizes or filters are outside what it has seen, and {others}."
        )
    return f"""# snr_ray model

{what}

- trained on {seen};
  filter: {config.noise.filter}
- {n_weights:,} weights; {trained} of {config.train.batch_size} images and their
  noisy versions
- made by: {origin}, with the config.yaml beside this card (snr_ray {__version__})

Validation images, PSNR in dB: `swap`, `told`, `unet`, of cleaned images (by the mean clean noise
code, where there are codes), and `recon_clean` clipped to [0, 1]; `recon_noisy` and `inject`, whose
target is noisy, unclipped. Answers that explain less than `least_explained` of their views per
pixel are doubtful; `bf16_costs` is what bfloat16 takes.

| metric | value |
|---|---|
{rows}

{limits}
"""
