"""What is scored: the kinds of task, and the images of one block under one of them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from snr_ray.hashing import hash64
from snr_ray.learning.losses import stored
from snr_ray.noise.operator import NoiseSpec

Array = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

EXTRA_SIGMA = 0.01
"""Standard deviation of Gaussian noise added to the noisy image, for the rows about it."""
TASKS = {
    "remove": "Cleaned",
    "make": "Made from codes, unclipped where the truth is noisy",
    "remove_grainy": "Cleaned, with Gaussian noise of sigma 0.01 added to the input",
    "remove_stored": "Cleaned, from input cut to [0, 1] and rounded to 8 bits",
    "remove_unseen": "Cleaned, of view counts that no model was trained on",
}
"""Titles of what is scored, in the order of the tables. `remove*`: cleaned images against clean
ones; `make`: images decoded from codes against those that they are meant to give."""
REMOVE = tuple(task for task in TASKS if task.startswith("remove"))


def as_seen(task: str, noisy: Array, names: Sequence[str]) -> Array:
    """Noisy images [B, C, H, W] with what a task adds to their noise, drawn by their ids."""
    if task == "remove_grainy":
        rngs = [np.random.default_rng(hash64(f"grain/{name}")) for name in names]
        grain = [rng.standard_normal(noisy.shape[1:], np.float32) for rng in rngs]
        return noisy + EXTRA_SIGMA * np.stack(grain)
    if task == "remove_stored":
        return stored(torch.from_numpy(noisy)).numpy()
    return noisy


@dataclass(frozen=True)
class Case:
    """The images of one block under one task: what every method gets."""

    task: str
    """Out of TASKS."""
    names: list[str]
    """Ids of the images."""
    clean: Array
    """[B, C, H, W]"""
    noisy: Array
    """The same with noise on, and the clean ones where there is none."""
    noise_ids: Labels
    """[B] of the noisy images, told or detected."""
    spec: NoiseSpec | None = None
    """How the noise was made; None where there is none."""
    elsewhere: bool = False
    """Of a size or view count that was asked for, rather than one that the model was trained on."""
    found: Labels | None = None
    """[B] view counts that the noisy images were found to have, where that was tried."""
    finding: float = 0.0
    """Seconds an image that this took."""
    fitted: "Mapping[str, Restore]" = field(default_factory=dict)
    """Baselines that were asked for and fit this noise, by key."""

    @property
    def n_views(self) -> int:
        """Of the noisy images; 0 where there is no noise."""
        return self.spec.n_views if self.spec else 0

    def take(self, which: npt.NDArray[np.bool_]) -> "Case":
        """The case of some of the images."""
        return dataclasses.replace(
            self,
            names=[name for name, kept in zip(self.names, which, strict=True) if kept],
            clean=self.clean[which],
            noisy=self.noisy[which],
            noise_ids=self.noise_ids[which],
            found=None if self.found is None else self.found[which],
        )


Restore = Callable[[Case], Array]
"""What cleans the noisy images of a case: [B, C, H, W]."""
