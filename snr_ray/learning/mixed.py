"""Training batches of many sizes and view counts: clean images of their own sizes in memory.

A batch has one size, and each pair of partners its own view counts: a hash of (seed, step), so
every worker draws the same, and resuming needs no state. The noise is made where the step runs, of
the whole image at the size of the batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from snr_ray.config import Config
from snr_ray.errors import InputError
from snr_ray.learning.batches import Array, Batch, Share
from snr_ray.noise.viewrange import ViewRange


@dataclass(frozen=True)
class Pictures:
    """Clean square images by their side in pixels."""

    by_side: dict[int, tuple[list[str], list[Array]]]
    """Ids and images [C, side, side] of each side."""

    def __len__(self) -> int:
        return sum(len(ids) for ids, _ in self.by_side.values())

    def of_at_least(self, side: int) -> list[Array]:
        """All images of a side or more, in the order of sides and ids."""
        found: list[Array] = []
        for own in sorted(own for own in self.by_side if own >= side):
            ids, images = self.by_side[own]
            found += [images[k] for k in np.argsort(np.array(ids, dtype=str), kind="stable")]
        return found


def own_side(height: int, width: int, config: Config) -> int:
    """The largest training size that an image fills: the one at which it is kept."""
    sizes = training_sizes(config)
    return max((size for size in sizes if size <= min(height, width)), default=min(sizes))


def training_sizes(config: Config) -> tuple[int, ...]:
    """Sizes of the batches of a run."""
    return config.train.sizes or (config.images.size,)


def batch_size(config: Config, size: int) -> int:
    """Clean images of a batch of a size, over all workers: about as many pixels as
    train.batch_size images of images.size have, and pairs of images for every part."""
    unit = 2 * config.train.n_parts
    alike = config.train.batch_size * (config.images.size / size) ** 2
    return max(unit, round(alike / unit) * unit)


class MixedFeed:
    """Batches of one size each, sizes mixed over the run; counterpart of `PairFeed`."""

    def __init__(self, pictures: Pictures, config: Config, share: Share) -> None:
        """
        Raises:
            InputError: if some size has fewer images than its batch.
        """
        self.config, self.share = config, share
        views = ViewRange.of(config.noise)
        assert views is not None
        self.views, self.sizes = views, training_sizes(config)
        weights = np.array(config.train.size_weights or [1.0] * len(self.sizes))
        self.weights = weights / weights.sum()
        self.images = {size: pictures.of_at_least(size) for size in self.sizes}
        for size, images in self.images.items():
            enough = batch_size(config, size)
            if len(images) < enough:
                raise InputError(
                    f"A batch of {size} pixels needs {enough} images of at least that size, but "
                    f"the train split holds {len(images)}; leave {size} out of train.sizes, give "
                    "more images or lower train.batch_size."
                )

    def batch(self, step: int) -> Batch:
        """This worker's part of the global batch of a step."""
        rng = np.random.default_rng([self.config.seed, step, 0])
        size = self.sizes[int(rng.choice(len(self.sizes), p=self.weights))]
        images = self.images[size]
        n_images = batch_size(self.config, size)
        mine = self.share.slice(n_images)
        drawn = rng.choice(len(images), n_images, replace=False)[mine]
        clean = torch.cat([resized(images[k], size) for k in drawn])
        n_views = self.views.draw(size, (n_images // 2, self.config.train.versions), rng)
        return Batch(clean, n_views=torch.from_numpy(n_views.repeat(2, axis=0)[mine]))

    def batches(self, start: int) -> Iterator[Batch]:
        """Batches from step `start` on, without end."""
        step = start
        while True:
            yield self.batch(step)
            step += 1


def resized(image: Array, size: int) -> torch.Tensor:
    """An image [C, side, side] at a smaller size, each pixel the mean of those it covers:
    [1, C, size, size]."""
    whole = torch.from_numpy(np.array(image, np.float32))[None]
    return whole if whole.shape[-1] == size else F.interpolate(whole, size=size, mode="area")
