"""Training batches from the shards of a data folder that is too large for memory.

Every epoch has its own order: row groups are drawn in a random order, as many at a time as fit in
a window, and the rows of a window are mixed. The order is a hash of (seed, epoch), so batch(step)
is a pure function: resuming needs no state, and any number of workers sees the same batches.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch

from snr_ray.batches import Batch, Share
from snr_ray.config import Config
from snr_ray.datafolder import Array, DataFolder, image_columns, row_bytes, tensors

WINDOW_BYTES = 128 * 2**20
"""Tensors that are mixed with each other. A worker holds up to three windows: that of the batch,
the one before where a batch spans both, and the next, which is read meanwhile."""


class ShardFeed:
    """Batches of the train split; counterpart of `PairFeed` for sets in files."""

    def __init__(self, folder: DataFolder, config: Config, share: Share) -> None:
        self.columns, self.seed, self.share = image_columns(config), config.seed, share
        self.batch_size = config.train.batch_size
        self.groups = [
            (shard, group, metadata.row_group(group).num_rows)
            for shard in folder.shards("train")
            for metadata in [pq.read_metadata(shard)]
            for group in range(metadata.num_row_groups)
        ]
        sizes = np.array([n_rows for *_, n_rows in self.groups])
        self.starts = np.cumsum(sizes) - sizes  # row number at which each group begins
        self.n_rows = int(sizes.sum())
        self.steps_per_epoch = self.n_rows // self.batch_size
        mean_bytes = row_bytes(config.images, len(config.noise.n_views)) * sizes.mean()
        self.groups_per_window = max(1, round(WINDOW_BYTES / mean_bytes))
        self._epoch = -1
        self._order = np.empty(0, np.int64)
        self._windows: list[npt.NDArray[np.int64]] = []  # groups of each window of the epoch
        self._ends = np.empty(0, np.int64)  # position in the order at which each window ends
        self._loading: dict[tuple[int, int], Future[dict[int, list[Array]]]] = {}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="shards")

    def batch(self, step: int) -> Batch:
        """This worker's part of the global batch of a step."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._shuffle(epoch)
        first = position * self.batch_size
        rows = self._order[first : first + self.batch_size][self.share.slice(self.batch_size)]
        begin, end = np.searchsorted(self._ends, [first, first + self.batch_size - 1], "right")
        groups: dict[int, list[Array]] = {}
        for window in range(begin, end + 1):
            groups |= self._window(epoch, window).result()
        if end + 1 < len(self._windows):
            self._window(epoch, end + 1)  # read while the step runs
        for old in [key for key in self._loading if key < (epoch, begin)]:
            del self._loading[old]
        group_of = np.searchsorted(self.starts, rows, side="right") - 1
        places = rows - self.starts[group_of]
        shape = groups[int(group_of[0])][0].shape[1:]
        clean = np.empty((len(rows), *shape), np.float32)
        noisy = np.empty((len(rows), len(self.columns) - 1, *shape), np.float32)
        for group in np.unique(group_of):
            mine = group_of == group
            clean[mine] = groups[group][0][places[mine]]
            for k, version in enumerate(groups[group][1:]):
                noisy[mine, k] = version[places[mine]]
        return Batch(torch.from_numpy(clean), torch.from_numpy(noisy))

    def batches(self, start: int) -> Iterator[Batch]:
        """Batches from step `start` on, without end."""
        step = start
        while True:
            yield self.batch(step)
            step += 1

    def _shuffle(self, epoch: int) -> None:
        rng = np.random.default_rng([self.seed, epoch])
        drawn = rng.permutation(len(self.groups))
        self._windows = [
            drawn[i : i + self.groups_per_window]
            for i in range(0, len(drawn), self.groups_per_window)
        ]
        mixed = [
            rng.permutation(
                np.concatenate([self.starts[g] + np.arange(self.groups[g][2]) for g in window])
            )
            for window in self._windows
        ]
        self._order, self._ends = np.concatenate(mixed), np.cumsum([len(rows) for rows in mixed])
        self._epoch = epoch

    def _window(self, epoch: int, window: int) -> "Future[dict[int, list[Array]]]":
        key = (epoch, window)
        if key not in self._loading:
            self._loading[key] = self._reader.submit(self._read, self._windows[window])
        return self._loading[key]

    def _read(self, groups: npt.NDArray[np.int64]) -> dict[int, list[Array]]:
        """Clean images and every noisy version of row groups: [n, C, H, W] each."""
        found = {}
        for number in groups:
            shard, group, _ = self.groups[number]
            with pq.ParquetFile(shard) as file:
                table = file.read_row_group(group, self.columns, use_threads=False)
            found[int(number)] = [tensors(table[name]) for name in self.columns]
        return found
