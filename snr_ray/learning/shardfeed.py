"""Training batches from the shards of a data folder that is too large for memory.

Every epoch has its own order: row groups are drawn in a random order, as many at a time as fit in
a window, and the rows of a window are mixed. The order is a hash of (seed, epoch), so batch(step)
is a pure function: resuming needs no state, and any number of workers sees the same batches.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from snr_ray.config import Config
from snr_ray.images.datafolder import (
    Array,
    DataFolder,
    image_columns,
    read_metadata,
    row_bytes,
    tensors,
)
from snr_ray.learning.batches import Batch, Share

WINDOW_BYTES = 128 * 2**20
"""Tensors that are mixed with each other. A worker holds up to three windows: that of the batch,
the one before where a batch spans both, and the next, which is read meanwhile."""


@dataclass
class Window:
    """Row groups, mixed; its arrays are whole once `reading` is done."""

    clean: Array
    """[n, C, H, W]"""
    noisy: Array
    """[n, n_ids, C, H, W]"""
    reading: list[Future[None]]


class ShardFeed:
    """Batches of the train split; counterpart of `PairFeed` for sets in files.

    Row groups are read by train.cpus_per_worker threads, ahead of the batches.
    """

    def __init__(self, folder: DataFolder, config: Config, share: Share) -> None:
        self.columns, self.seed, self.share = image_columns(config), config.seed, share
        self.batch_size = config.train.batch_size
        self.shape = (config.images.channels, config.images.side, config.images.side)
        self.folder = folder
        self.groups, sizes = [], []
        for shard in folder.shards("train"):
            metadata = read_metadata(folder.place, shard)
            for group in range(metadata.num_row_groups):
                self.groups.append((shard, group))
                sizes.append(metadata.row_group(group).num_rows)
        self.sizes = np.array(sizes)
        self.n_rows = int(self.sizes.sum())
        self.steps_per_epoch = self.n_rows // self.batch_size
        mean_bytes = row_bytes(config.images, len(config.noise.n_views)) * self.sizes.mean()
        self.groups_per_window = max(1, round(WINDOW_BYTES / mean_bytes))
        self._epoch = -1
        self._drawn: list[npt.NDArray[np.int64]] = []  # groups of each window of the epoch
        self._ends = np.empty(0, np.int64)  # position in the epoch at which each window ends
        self._windows: dict[tuple[int, int], Window] = {}
        self._readers = ThreadPoolExecutor(config.train.cpus_per_worker, "shards")

    def batch(self, step: int) -> Batch:
        """This worker's part of the global batch of a step."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._shuffle(epoch)
        share = self.share.slice(self.batch_size)
        first, end = (position * self.batch_size + place for place in (share.start, share.stop))
        from_, to = np.searchsorted(self._ends, [first, end - 1], "right")
        clean, noisy = [], []
        for number in range(from_, to + 1):
            window = self._window(epoch, number)
            for reading in window.reading:
                reading.result()
            rows = slice(*(np.array([first, end]) - self._begin(number)).clip(0))
            clean.append(torch.from_numpy(window.clean[rows]))
            noisy.append(torch.from_numpy(window.noisy[rows]))
        if to + 1 < len(self._drawn):
            self._window(epoch, to + 1)  # read while the step runs
        for old in [key for key in self._windows if key < (epoch, from_)]:
            del self._windows[old]
        if from_ < to:
            clean, noisy = [torch.cat(clean)], [torch.cat(noisy)]
        return Batch(clean[0], noisy[0])

    def batches(self, start: int) -> Iterator[Batch]:
        """Batches from step `start` on, without end."""
        step = start
        while True:
            yield self.batch(step)
            step += 1

    def _shuffle(self, epoch: int) -> None:
        drawn = np.random.default_rng([self.seed, epoch]).permutation(len(self.groups))
        edges = range(self.groups_per_window, len(drawn), self.groups_per_window)
        self._drawn = np.split(drawn, edges)
        self._ends = np.cumsum([self.sizes[groups].sum() for groups in self._drawn])
        self._epoch = epoch

    def _begin(self, window: int) -> int:
        """Position in the epoch at which a window begins."""
        return int(self._ends[window - 1]) if window else 0

    def _window(self, epoch: int, number: int) -> Window:
        """A window, read or being read."""
        key = (epoch, number)
        if key not in self._windows:
            groups = self._drawn[number]
            n_rows = int(self._ends[number]) - self._begin(number)
            clean = np.empty((n_rows, *self.shape), np.float32)
            noisy = np.empty((n_rows, len(self.columns) - 1, *self.shape), np.float32)
            mixed = np.random.default_rng([self.seed, epoch, number]).permutation(n_rows)
            places = np.split(mixed, np.cumsum(self.sizes[groups])[:-1])
            self._windows[key] = Window(clean, noisy, [])
            self._windows[key].reading = [
                self._readers.submit(self._read, group, clean, noisy, place)
                for group, place in zip(groups, places, strict=True)
            ]
        return self._windows[key]

    def _read(self, number: int, clean: Array, noisy: Array, places: npt.NDArray[np.int64]) -> None:
        """Put the rows of a row group at their places in a window."""
        shard, group = self.groups[number]
        with self.folder.shard(shard) as file:
            for k, name in enumerate(self.columns):
                column = file.read_row_group(group, [name], use_threads=False)[name]
                target = clean if k == 0 else noisy[:, k - 1]
                target[places] = tensors(column)
