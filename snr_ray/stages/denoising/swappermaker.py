"""What a job sends its tasks to make a FileSwapper of: the bytes of a model folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from snr_ray.learning.modelfolder import ModelFolder

if TYPE_CHECKING:  # torch is slow to import, and a driver does without
    from snr_ray.stages.denoising.fileswap import FileSwapper

Array = npt.NDArray[np.float32]

LENT = ("mean", "random")
"""Donors that a model folder has itself."""


@dataclass(frozen=True)
class SwapperMaker:
    """What makes a FileSwapper of a job on any machine and device."""

    folder: ModelFolder
    donor: str | Sequence[Array]
    """One of LENT, or noise codes per level: [n_donors, C_noise, h, w]."""
    options: dict[str, Any]

    def __call__(self, device: str) -> "FileSwapper":
        from snr_ray.learning.checkpoint import hierarchical
        from snr_ray.stages.denoising.fileswap import FileSwapper, lent_codes, on

        trained = hierarchical(self.folder)
        pool = self.donor
        if isinstance(pool, str):
            pool = lent_codes(trained, pool, self.options.get("inject"))
        return FileSwapper(on(trained, device), pool, **self.options)
