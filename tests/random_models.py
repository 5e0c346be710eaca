"""Models of random weights and random images, for tests of several rooms."""

import numpy as np
import torch

from snr_ray.config import Config
from snr_ray.learning.build import build_model
from snr_ray.network.hvae import HVAE


def model_of(config: Config, *, seed: int = 0) -> HVAE:
    """A model whose weights are large enough for every code to matter."""
    model = build_model(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def images(n: int = 4, *size: int, channels: int = 1) -> np.ndarray:
    shape = (n, channels, *(size or (16, 16)))
    return np.random.default_rng(sum(shape)).random(shape, dtype=np.float32)
