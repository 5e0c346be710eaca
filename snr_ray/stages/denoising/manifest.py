"""The manifest of a denoising job: a folder of Parquet parts that readers take for one table.

    OUT/manifest.parquet/part-000000.parquet ...   a row per image, in the order they were done

Parts appear whole while the job runs, so that they also say where it continues; nothing about an
image is kept in memory once its row is written.
"""

import heapq
import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from snr_ray.folder import Folder
from snr_ray.hashing import hash64
from snr_ray.images.collection import Source
from snr_ray.images.datafolder import parquet_bytes
from snr_ray.noise.viewrange import ViewRange
from snr_ray.stages.denoising.imagefiles import DOUBTFUL, MANIFEST_SCHEMA, Row

NAME = "manifest.parquet"
PART_S = 2.0
"""Seconds of rows in a part, at least; a hundredth of the time that the job has run, if more."""
BATCH_ROWS = 2**14
"""Rows that are looked at together."""
DECIBELS = np.arange(-1000, 1001) / 10
"""Bins of a median that needs no memory."""


class Manifest:
    """Rows of one job."""

    def __init__(self, out: Folder) -> None:
        self.out = out
        names = [name for name in out.list(NAME) if name.endswith(".parquet")]
        self.parts = names
        self._next = 1 + max((_number(name) for name in names), default=-1)
        self._tables: list[pa.Table] = []
        self._begun = self._saved = time.monotonic()

    def add(self, table: pa.Table) -> None:
        """Rows of MANIFEST_SCHEMA; they reach the disk within seconds. Raises OSError."""
        self._tables.append(table)
        now = time.monotonic()
        if now - self._saved > max(PART_S, (now - self._begun) / 100):
            self.flush()

    def flush(self, *, last: bool = False) -> None:
        """Write what waits; at the `last`, a part without rows where there is none at all."""
        if self._tables or (last and not self.parts):
            table = pa.concat_tables([MANIFEST_SCHEMA.empty_table(), *self._tables])
            name = f"{NAME}/part-{self._next:06d}.parquet"
            self.out.write(name, parquet_bytes(table.sort_by("id")))
            self.parts.append(name)
            self._next, self._tables = self._next + 1, []
        self._saved = time.monotonic()

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """All rows that are written, a few thousand at a time."""
        for name in self.parts:
            yield from _rows(self.out, name).iter_batches(BATCH_ROWS, columns=columns)

    def resume(self, source: Source, *, beside: str = "") -> npt.NDArray[np.bool_]:
        """Which images of the source are done, [n]; `beside` is the suffix of a second file that
        each result has, if any.

        Not done are those of which a file is gone from the output folder, and those whose input is
        another file under the same name now: their rows are taken out. Rows of images that are not
        of the source stay as long as their files do.
        """
        done = np.zeros(len(source.ids), bool)
        if not self.parts:
            return done
        hashes = np.fromiter(map(hash64, source.ids), np.uint64, len(source.ids))
        order = np.argsort(hashes)
        ordered = hashes[order]
        local = self.out.local is not None  # objects in a bucket do not go by themselves
        for name in list(self.parts):
            data = self.out.read(name)
            if not _intact(data):  # its images are done again
                self.out.remove(name)
                self.parts.remove(name)
                continue
            keep: list[npt.NDArray[np.bool_]] = []
            part = pq.ParquetFile(io.BytesIO(data))
            for batch in part.iter_batches(BATCH_ROWS, columns=["id", "output", "stamp"]):
                keys = np.array([hash64(text) for text in batch["id"].to_pylist()], np.uint64)
                places = np.minimum(np.searchsorted(ordered, keys), len(ordered) - 1)
                known = ordered[places] == keys
                outputs, stamps = batch["output"].to_pylist(), batch["stamp"].to_pylist()
                kept = np.array(
                    [not local or all(self.out.exists(name + end) for end in {"", beside})
                     for name in outputs], bool)  # fmt: skip
                for k in np.flatnonzero(known & kept):
                    index = int(order[places[k]])
                    kept[k] = not done[index] and source.stamp(index) == stamps[k]
                    done[index] |= kept[k]
                keep.append(kept)
            mask = np.concatenate([np.zeros(0, bool), *keep])
            if not mask.all():
                table = part.read().filter(pa.array(mask))
                self.out.write(name, parquet_bytes(table))
        return done

    def summary(
        self, side: int, sample: int, worst: int, views: ViewRange | None = None
    ) -> "Summary":
        """What a report says, in one pass over the rows.

        Args:
            side: height and width of the images that the model was trained on.
            sample: so many rows drawn by the hash of their ids.
            worst: so many of the rows that are explained least.
            views: range that the model was trained on, if it serves all sizes.
        """
        found = Summary()
        drawn: list[Any] = []
        least: list[Any] = []
        counts = np.zeros(len(DECIBELS), np.int64)
        for batch in self.batches():
            found.images += len(batch)
            odd = pc.or_(pc.not_equal(batch["height"], side), pc.not_equal(batch["width"], side))
            if views is None:
                found.odd_sizes += pc.sum(odd).as_py() or 0
            else:
                found.odd_views += _beyond(batch, views)
            found.doubtful += pc.sum(pc.equal(batch["status"], DOUBTFUL)).as_py() or 0
            found.seconds += pc.sum(batch["seconds"]).as_py() or 0.0
            for k, name in enumerate(batch["id"].to_pylist()):
                _keep(drawn, sample, (-hash64(f"page/{name}"), name), batch, k)
            column = batch["explained"].to_numpy(zero_copy_only=False).astype(np.float64)
            places = np.flatnonzero(~np.isnan(column))
            counts += np.bincount(np.digitize(column[places], DECIBELS[1:]), minlength=len(counts))
            for k in places[np.argsort(column[places])[:worst]].tolist():
                _keep(least, worst, (-column[k], batch["id"][k].as_py()), batch, k)
        found.sample = sorted((row for *_, row in drawn), key=lambda row: str(row["id"]))
        found.worst = [row for *_, row in sorted(least, key=lambda item: item[:2], reverse=True)]
        if counts.sum():
            found.least = float(found.worst[0]["explained"])
            half = counts.sum() / 2
            ends = np.searchsorted(np.cumsum(counts), [np.floor(half + 0.5), np.floor(half + 1)])
            found.median = float(DECIBELS[np.minimum(ends, len(counts) - 1)].mean()) + 0.05
        return found


def _beyond(batch: pa.RecordBatch | pa.Table, views: ViewRange) -> int:
    """Rows of images whose view counts, where there are any, lie beyond a range."""
    counts = batch["n_views"].to_numpy(zero_copy_only=False).astype(np.float64)
    sides = pc.max_element_wise(batch["height"], batch["width"]).to_pylist()
    bounds = np.array([views.counts(side) for side in sides]).reshape(-1, 2)
    noisy = counts > 0  # neither clean nor unknown
    return int(np.sum(noisy & ((counts < bounds[:, 0]) | (counts > bounds[:, 1]))))


@dataclass
class Summary:
    """Counts and examples of a manifest."""

    images: int = 0
    odd_sizes: int = 0
    """Images of another size than the model was trained on, if it serves only that."""
    odd_views: int = 0
    """Images of other views per pixel than the model was trained on, if it serves a range."""
    doubtful: int = 0
    seconds: float = 0.0
    """Of the network, over all images."""
    median: float | None = None
    """dB to which images are explained, to a tenth; None where no row says."""
    least: float | None = None
    sample: list[Row] = field(default_factory=list)
    worst: list[Row] = field(default_factory=list)
    """Those explained least, the least first."""


def _keep(heap: list[Any], size: int, key: tuple[Any, str], batch: pa.RecordBatch, k: int) -> None:
    """Keep the rows of the largest keys."""
    item = (*key, batch.slice(k, 1).to_pylist()[0])
    if len(heap) < size:
        heapq.heappush(heap, item)
    elif item[:2] > heap[0][:2]:
        heapq.heapreplace(heap, item)


def _intact(data: bytes) -> bool:
    """Whether all of a part can be read: a power failure cuts files short, disks err."""
    try:
        with pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True) as part:
            if part.schema_arrow.names != MANIFEST_SCHEMA.names:
                return False
            for _ in part.iter_batches(BATCH_ROWS):
                pass
    except (pa.ArrowException, OSError):
        return False
    return True


def _rows(out: Folder, name: str) -> pq.ParquetFile:
    return pq.ParquetFile(io.BytesIO(out.read(name)))


def _number(name: str) -> int:
    digits = name.rpartition("-")[2].removesuffix(".parquet")
    return int(digits) if digits.isdecimal() else -1
