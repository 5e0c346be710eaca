"""Images for tests of learning."""

import numpy as np
import pytest

from snr_ray.config import Config
from snr_ray.images.sources import open_source
from snr_ray.learning.batches import Pairs
from snr_ray.noise.operator import noise_operator, noise_specs


@pytest.fixture(scope="session")
def pairs(tiny: Config) -> Pairs:
    source = open_source("glyphs")
    rows = source.select("train", 250)
    clean = np.stack([source.load(row, tiny.images) for row in rows])
    noisy = [[noise_operator(spec, 16, 16)(clean)] for spec in noise_specs(tiny.noise)]
    return Pairs([source.ids[row] for row in rows], [clean], noisy)
