"""Source or data folder -> clean images of their own sizes, for training on many sizes.

rows (id, side, pixels, error) --materialize--> Pictures in shared memory, any order
"""

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray

from snr_ray.config import Config
from snr_ray.errors import InputError, check
from snr_ray.images.collection import Source
from snr_ray.images.datafolder import Array, Failure, tensors
from snr_ray.images.formats.pixels import prepare
from snr_ray.learning.mixed import Pictures, own_side, training_sizes
from snr_ray.stages.job.connection import ON_CORES, shared
from snr_ray.stages.simulation.dataset import Origin, memory_for_rows, open_rows

READ_ROWS = 256
"""Images per task."""


def open_pictures(config: Config, origin: Origin, split: str) -> "ray.data.Dataset":
    """Rows of a split, each image at the largest training size that it fills. Lazy.

    Images of a data folder have the one size at which they were simulated.
    """
    if origin.images is None:
        return open_rows(config, origin, split).map_batches(
            _of_folder, batch_size=READ_ROWS, batch_format="pyarrow", **ON_CORES
        )
    source = origin.grouped(config.images.group).source
    rows = source.gathered(source.select(split, config.images.limit))
    blocks = [rows[i : i + READ_ROWS] for i in range(0, len(rows), READ_ROWS)]
    task = functools.partial(_read, source=ray.put(source), config=config)
    items = ray.data.from_numpy(blocks)
    return items.map_batches(task, batch_size=None, batch_format="numpy", **ON_CORES)


def gather_pictures(batches: Iterator[pa.Table], config: Config) -> tuple[Pictures, list[Failure]]:
    """Tables of rows as Pictures, without copying, and the images that failed."""
    by_side: dict[int, tuple[list[str], list[Array]]] = {}
    failures: list[Failure] = []
    for table in batches:
        pixels = table["pixels"].combine_chunks()
        for k, row in enumerate(table.select(["id", "side", "error"]).to_pylist()):
            if row["error"]:
                failures.append({"id": row["id"], "stage": "read", "reason": row["error"]})
                continue
            ids, images = by_side.setdefault(row["side"], ([], []))
            flat = np.frombuffer(pixels[k].as_buffer(), np.float32)
            ids.append(row["id"])
            images.append(flat.reshape(config.images.channels, row["side"], row["side"]))
    return Pictures(by_side), failures


def check_memory(config: Config, count: int) -> None:
    """Raise InputError where the images would not fit in the memory that nodes share."""
    side = max(training_sizes(config))
    most = memory_for_rows() // (4 * config.images.channels * side**2)
    check(
        count <= most,
        f"Training on several sizes keeps its images in memory, which holds {most:,.0f} of {side} "
        f"pixels here, but the train split holds {count:,}; set images.limit, or leave the largest "
        "of train.sizes out.",
    )


def _read(
    batch: dict[str, npt.NDArray[np.int64]], *, source: "ray.ObjectRef", config: Config
) -> pa.Table:
    """Task: the images at some rows of a source."""
    images: Source = shared(source)
    rows = []
    for index in np.sort(batch["data"]):  # neighbours share files and row groups
        name = images.ids[index]
        try:
            pixels = images.read(index, config.images).pixels
            side = own_side(pixels.shape[1], pixels.shape[2], config)
            kept = prepare(pixels, dataclasses.replace(config.images, size=side), name)
        except InputError as error:
            rows.append(_row(name, None, str(error)))
        else:
            rows.append(_row(name, kept))
    return pa.Table.from_pylist(rows, SCHEMA)


def _of_folder(table: pa.Table) -> pa.Table:
    """Task: the clean images of rows of a data folder."""
    images = zip(table["id"].to_pylist(), tensors(table["clean"]), strict=True)
    return pa.Table.from_pylist([_row(name, image) for name, image in images], SCHEMA)


def _row(name: str, image: Array | None, error: str = "") -> dict[str, object]:
    side, pixels = (0, b"") if image is None else (image.shape[-1], image.tobytes())
    return {"id": name, "side": side, "pixels": pixels, "error": error}


SCHEMA = pa.schema(
    [("id", pa.string()), ("side", pa.int32()), ("pixels", pa.large_binary()),
     ("error", pa.string())]
)  # fmt: skip
