"""What a configuration makes: an untrained model, its objective, and what moves its weights."""

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from snr_ray.config import Config
from snr_ray.learning.losses import Objective, Regression
from snr_ray.learning.muon import Muon
from snr_ray.network.hvae import HVAE
from snr_ray.network.itnet import ItNet
from snr_ray.network.physics import LinearInverse
from snr_ray.network.unet import UNet
from snr_ray.noise.operator import noise_specs
from snr_ray.noise.viewrange import ViewRange


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
