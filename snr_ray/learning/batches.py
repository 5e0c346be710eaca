"""Clean and noisy arrays -> training batches, the same whatever the number of workers.

A batch is clean images, each with its noisy version of every noise id, so that all ids are seen
equally often. Image i finds a partner at i ^ 1: another image, for codes to be compared and
exchanged with. Workers take whole pairs of one global batch; every random choice is a hash of
(seed, epoch or step). So the gradient, and with it a whole run, does not depend on how many workers
share the batch.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from snr_ray.errors import InputError
from snr_ray.hashing import hash64

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Share:
    """Which part of every global batch this worker takes."""

    rank: int = 0
    world_size: int = 1

    def slice(self, n: int) -> slice:
        """This worker's part of n rows that all workers share."""
        part = n // self.world_size
        return slice(self.rank * part, (self.rank + 1) * part)


@dataclass
class Batch:
    """One worker's images of one step."""

    clean: Tensor
    """[B, C, H, W] float32."""
    noisy: Tensor | None = None
    """[B, n_ids, C, H, W] float32, not clipped: noisy[b, k] is clean[b] under noise id k + 1; None
    where it is still to be made."""
    n_views: Tensor | None = None
    """[B, n_ids] int64 view counts, where they differ from image to image; partners have equal
    ones."""

    def to(self, device: torch.device) -> "Batch":
        """The same images on a device; the host does not wait for what is pinned."""
        return self._each(lambda part: part.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """The same images in memory that a GPU copies from by itself, where there is a GPU."""
        return self._each(Tensor.pin_memory) if torch.cuda.is_available() else self

    def copied(self) -> "Batch":
        """The same images in other memory."""
        return self._each(Tensor.clone)

    def _each(self, of: Callable[[Tensor], Tensor]) -> "Batch":
        clean, *others = self.tensors()
        return Batch(of(clean), *(None if part is None else of(part) for part in others))

    def parts(self, n: int) -> "list[Batch]":
        """The images in n equal parts, partners together."""
        chunks = ([None] * n if part is None else part.chunk(n) for part in self.tensors())
        return [Batch(*part) for part in zip(*chunks, strict=True)]

    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What it is made of, in the order of its fields."""
        return self.clean, self.noisy, self.n_views


@dataclass(frozen=True)
class Pairs:
    """Clean images and every noisy version of each, in memory.

    Arrays come in blocks (as they lie in files or in an object store) and are not copied. Row r is
    the image with the r-th smallest id, so rows mean the same whatever order the blocks came in.
    """

    ids: list[str]
    """Image ids, through all blocks."""
    clean: list[Array]
    """Blocks [n_k, C, H, W]."""
    noisy: list[list[Array]]
    """Per noise id (1 first), blocks as of `clean`."""

    def __post_init__(self) -> None:
        order = np.argsort(np.array(self.ids, dtype=str), kind="stable")
        starts = np.cumsum([0] + [len(block) for block in self.clean])
        object.__setattr__(self, "_order", order)
        object.__setattr__(self, "_starts", starts)

    def __len__(self) -> int:
        return len(self.ids)

    def sample(self, n: int) -> npt.NDArray[np.int64]:
        """Rows of at most n images that stand for the whole set, in ascending order.

        Those with the smallest hashes, as where a source is limited: neighbours by id are images of
        one class, font or patient.
        """
        if n >= len(self):
            return np.arange(len(self))
        return np.sort(self._by_hash[:n])

    def names(self, rows: npt.NDArray[np.int64]) -> list[str]:
        """Ids of images."""
        order: npt.NDArray[np.int64] = self._order  # type: ignore[attr-defined]
        return [self.ids[place] for place in order[rows]]

    @functools.cached_property
    def _by_hash(self) -> npt.NDArray[np.int64]:
        hashes = [hash64(name) for name in self.names(np.arange(len(self)))]
        return np.argsort(np.array(hashes, np.uint64), kind="stable")

    def take(self, rows: npt.NDArray[np.int64], noise_id: int) -> Array:
        """Copies of images, clean (noise_id 0) or noisy: [len(rows), C, H, W]."""
        blocks = self.clean if noise_id == 0 else self.noisy[noise_id - 1]
        order: npt.NDArray[np.int64] = self._order  # type: ignore[attr-defined]
        starts: npt.NDArray[np.int64] = self._starts  # type: ignore[attr-defined]
        places = order[rows]
        block_of = np.searchsorted(starts, places, side="right") - 1
        out = np.empty((len(rows), *blocks[0].shape[1:]), np.float32)
        for k in np.unique(block_of):
            mine = block_of == k
            out[mine] = blocks[k][places[mine] - starts[k]]
        return out


class PairFeed:
    """Batches from pairs in memory; batch(step) is a pure function, so resuming needs no state."""

    def __init__(self, pairs: Pairs, batch_size: int, *, seed: int, share: Share) -> None:
        """`batch_size` counts clean images over all workers.

        Raises:
            InputError: if there are fewer images than one batch.
        """
        if len(pairs) < batch_size:
            raise InputError(
                f"Training needs at least one batch of images (train.batch_size = {batch_size}), "
                f"but the train split holds {len(pairs)}; add images or lower train.batch_size."
            )
        self.pairs, self.batch_size, self.seed, self.share = pairs, batch_size, seed, share
        self.steps_per_epoch = len(pairs) // batch_size
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def batch(self, step: int) -> Batch:
        """This worker's part of the global batch of a step."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.pairs))
            self._epoch = epoch
        mine = self.share.slice(self.batch_size)
        rows = self._order[position * self.batch_size : (position + 1) * self.batch_size][mine]
        ids = range(1, len(self.pairs.noisy) + 1)
        noisy = np.stack([self.pairs.take(rows, noise_id) for noise_id in ids], axis=1)
        return Batch(torch.from_numpy(self.pairs.take(rows, 0)), torch.from_numpy(noisy))

    def batches(self, start: int) -> Iterator[Batch]:
        """Batches from step `start` on, without end."""
        step = start
        while True:
            yield self.batch(step)
            step += 1


class StepNormal:
    """Standard normal values of one step: drawn for the global batch, cut to this worker's part."""

    def __init__(self, seed: int, step: int, share: Share, device: torch.device) -> None:
        self.share, self.device = share, device
        self.generator = torch.Generator(device)
        self.generator.manual_seed(int(np.random.SeedSequence([seed, step]).generate_state(1)[0]))

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        whole = (shape[0] * self.share.world_size, *shape[1:])
        drawn = torch.randn(whole, generator=self.generator, device=self.device)
        return drawn[self.share.slice(whole[0])]

    def uniform(self, n: int) -> Tensor:
        """[n] values in [0, 1)."""
        whole = n * self.share.world_size
        drawn = torch.rand(whole, generator=self.generator, device=self.device)
        return drawn[self.share.slice(whole)]
