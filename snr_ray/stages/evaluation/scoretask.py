"""Scores as Ray tasks: rows --every method on every noise id--> PSNR and SSIM of each image."""

import functools
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch

from snr_ray.config import Config
from snr_ray.learning.batches import Pairs
from snr_ray.learning.checkpoint import TrainedModel, TrainedUNet, load_any
from snr_ray.noise.lmmse import FIT_IMAGES
from snr_ray.noise.operator import noise_specs
from snr_ray.outputs import Progress
from snr_ray.scoring.baselines import Fitting
from snr_ray.scoring.cases import Restore
from snr_ray.scoring.methods import METHODS
from snr_ray.scoring.scores import Scorer
from snr_ray.stages.job.connection import ON_CORES, shared
from snr_ray.stages.job.waiting import patience
from snr_ray.stages.simulation.dataset import Origin, collect_pairs, gather, open_rows

TUNE_IMAGES = 100
"""Validation images that choose the TV weight."""
BLOCK_PIXELS = 2**19
"""Of the images that are scored together."""
SCORES = pa.schema(
    [("id", pa.string()), ("task", pa.string()), ("method", pa.string()),
     ("n_views", pa.int32()), ("model", pa.string()), ("psnr", pa.float64()),
     ("ssim", pa.float64()), ("seconds", pa.float64()), ("found", pa.int32()),
     ("right", pa.float64())]
)  # fmt: skip


def fit_baselines(
    config: Config, origin: Origin, baselines: tuple[str, ...]
) -> dict[str, list[Restore]]:
    """Per baseline, what cleans images of each noise id."""

    def read(split: str, limit: int) -> Pairs:
        return collect_pairs(open_rows(config, origin, split, limit), config)[0]

    fitting = Fitting(
        noise_specs(config.noise),
        functools.partial(read, "val", TUNE_IMAGES),
        functools.partial(read, "train", FIT_IMAGES),
    )
    fitted = {}
    for key in baselines:
        fit = METHODS[key].fit
        assert fit is not None
        fitted[key] = [fit(fitting, noise_id) for noise_id in range(1, 1 + len(fitting.specs))]
    return fitted


def score_rows(rows: "ray.data.Dataset", job: dict[str, Any], n_images: int) -> pa.Table:
    """Scores of all images: a row for each image, method and view count.

    Args:
        rows: materialized: they come from tasks, and scoring is a second task on each block.
        job: `model`, `config`, `elsewhere` (whether noise or size are not the model's own),
            `baselines` as `fit_baselines` gives them, and `beside`: labels and model folders.
        n_images: for the progress line.
    """
    task = functools.partial(_score_block, work=ray.put(job))
    block = int(np.clip(BLOCK_PIXELS // job["config"].images.side ** 2, 2, 32))
    scored = rows.map_batches(task, batch_size=block, batch_format="pyarrow", **ON_CORES)
    tables = []
    progress = Progress("evaluate", n_images)
    done = 0
    with patience("evaluate", lambda: done):
        for table in scored.iter_batches(batch_size=None, batch_format="pyarrow"):
            tables.append(table)
            done += len(pc.unique(table["id"]))
            progress.update(done)
    return pa.concat_tables([SCORES.empty_table(), *tables])


@functools.lru_cache(maxsize=16)
def _model(folder: str) -> TrainedModel | TrainedUNet:
    torch.set_num_threads(1)
    return load_any(folder)


def _score_block(table: pa.Table, *, work: "ray.ObjectRef") -> pa.Table:
    """Every method on one block of rows."""
    job = shared(work)
    trained = _model(job["model"])
    assert isinstance(trained, TrainedModel)
    config: Config = job["config"]
    if "error" in table.column_names:
        table = table.filter(pc.equal(table["error"], ""))
        if not len(table):
            return SCORES.empty_table()
    pairs, _ = gather(iter([table]), config)
    rows: list[dict[str, Any]] = []
    ids = np.array(sorted(pairs.ids))
    beside = {label: _model(folder) for label, folder in job["beside"]}
    elsewhere = config.noise if job["elsewhere"] else None
    scorer = Scorer(trained, job["baselines"], beside, pairs, elsewhere)
    for row, scores in scorer.run().items():
        for k, name in enumerate(ids[scores.which]):
            found = None if scores.found is None else int(scores.found[k])
            rows.append(
                {
                    "id": name,
                    **row._asdict(),
                    "psnr": scores.psnr[k],
                    "ssim": scores.ssim[k],
                    "seconds": scores.seconds,
                    "found": found,
                    "right": None if found is None else float(found == row.n_views),
                }
            )
    return pa.Table.from_pylist(rows, SCORES)
