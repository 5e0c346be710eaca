"""Scores of models on the test split of a source, beside baselines: tables and pictures.

test rows --tasks: every method on every noise id--> PSNR and SSIM per image --> means

OUT/metrics.json     the contract other programs read
OUT/metrics.md       the same as a page to read
OUT/scores.parquet   one row per image, method and view count
OUT/grid.png         noisy, its reconstruction, clean, its reconstruction, removed, injected, true
OUT/calibration.png  predicted against true error
"""

import dataclasses
import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch

from snr_ray import configfile as configs
from snr_ray.config import Config, InputError, NoiseConfig
from snr_ray.folder import Folder, open_folder, without_secrets
from snr_ray.hashing import fingerprint
from snr_ray.images.collection import SPLITS
from snr_ray.images.datafolder import failures_bytes, parquet_bytes
from snr_ray.learning.batches import Pairs
from snr_ray.learning.checkpoint import (
    TrainedModel,
    TrainedUNet,
    load_any,
    load_model,
    model_path,
    model_place,
)
from snr_ray.metrics import as_json
from snr_ray.network.swap import swap
from snr_ray.noise.lmmse import FIT_IMAGES
from snr_ray.noise.operator import noise_specs
from snr_ray.outputs import FILES, Progress, claim
from snr_ray.scoring import probes
from snr_ray.scoring.baselines import Fitting
from snr_ray.scoring.cases import TASKS, Restore
from snr_ray.scoring.methods import BASELINES, METHODS, QUICK_BASELINES
from snr_ray.scoring.report import calibration, evaluation_table, grid
from snr_ray.scoring.scores import Row, Scorer
from snr_ray.stages.cluster import connected, shared
from snr_ray.stages.dataset import Origin, collect_pairs, count_rows, gather, open_rows
from snr_ray.stages.simulate import Outcome
from snr_ray.stages.waiting import patience

Array = npt.NDArray[np.float32]

TUNE_IMAGES = 100
"""Validation images that choose the TV weight."""
GRID_ROWS = 9


@dataclasses.dataclass(frozen=True)
class Beside:
    """Another model in the same table; `label` is the name of its run folder."""

    label: str
    folder: str
    """What tasks open."""
    config: Config


def evaluate(
    config: Config,
    *,
    model: str,
    images: str,
    out: Path | str | Folder,
    baselines: tuple[str, ...] = QUICK_BASELINES,
    beside: tuple[str, ...] = (),
    limit: int | None = None,
    overwrite: bool = False,
) -> Outcome:
    """Score a model on the test images of a source.

    Args:
        config: only how images are read (images.fit, images.white, images.limit) is used; size,
            channels and noise are the model's. With images.channels=3 a grey model is applied to
            each channel of RGB images, else they are made grey for it.
        model: model folder, or the name of a shipped model.
        images: SRC of clean images; train and val splits serve the baselines and probes.
        out: output folder.
        baselines: names out of BASELINES.
        beside: other model folders for the same table, supervised U-Nets or HVAEs of the same
            images and noise; those that differ only by their seed share a row, also with `model`.
        limit: score at most this many test images.
        overwrite: replace an earlier evaluation.

    Raises:
        InputError: for a model, source, folder or setting the user can put right.
    """
    unknown = [name for name in baselines if name not in BASELINES]
    if unknown:
        raise InputError(f"--baselines takes {', '.join(BASELINES)}, but got {unknown[0]!r}.")
    if limit is not None and limit < 1:
        raise InputError(f"--limit must be at least 1, but got {limit}.")
    trained = load_model(model)
    others = _open_beside(trained.config, beside)
    keep = {f"images.{k}": getattr(config.images, k) for k in ("fit", "white", "window", "limit")}
    per_channel = config.images.channels == 3 and trained.config.images.channels == 1
    if per_channel:
        _tell("the images are RGB and the model is grey: it takes each channel by itself")
        keep["images.channels"] = 3
    config = configs.replace(trained.config, keep)
    if config.images.crop:
        _tell(
            "the images are crops of larger ones, whose noise no operator on the crop gives: "
            f"{', '.join(key for key in BASELINES if METHODS[key].operator)} and unseen view "
            "counts are left out"
        )
        baselines = tuple(key for key in baselines if not METHODS[key].operator)
    origin = Origin(images=images)
    counts = {split: count_rows(config, origin, split) for split in reversed(SPLITS)}
    n_test = min(counts["test"], limit or counts["test"])
    out = open_folder(out)
    resumed = claim(
        out,
        {
            "stage": "evaluate",
            "model": _fingerprint(model),
            "source": origin.source.identity,
            FILES: origin.source.files(),
            "baselines": list(baselines),
            "beside": [f"{other.label} {_fingerprint(other.folder)}" for other in others],
            "limit": limit,
            **keep,
        },
        owned=("metrics.json", "metrics.md", "scores.parquet", "grid.png", "calibration.png",
               "failures.parquet"),
        overwrite=overwrite,
    )  # fmt: skip
    if resumed and out.exists("metrics.json"):
        done = json.loads(out.read("metrics.json"))
        return Outcome(out.named, done["images"], done["failed"])
    with connected():
        _tell(f"fitting baselines ({', '.join(baselines) or 'none'})")
        work = ray.put(
            {
                "model": model_place(model),
                "images": config.images,
                "baselines": _fit_baselines(config, origin, baselines),
                "beside": [(other.label, other.folder) for other in others],
            }
        )
        # Rows come from tasks; scoring is a second task on each block.
        rows = open_rows(config, origin, "test", limit).materialize()
        task = functools.partial(_score_block, work=work)
        scored = rows.map_batches(task, batch_size=32, batch_format="pyarrow")
        tables = []
        progress = Progress("evaluate", n_test)
        done_images = 0
        with patience("evaluate", lambda: done_images):
            for table in scored.iter_batches(batch_size=None, batch_format="pyarrow"):
                tables.append(table)
                done_images += len(pc.unique(table["id"]))
                progress.update(done_images)
        outcome = rows.select_columns(["id", "error"]).iter_rows()
        failures = [
            {"id": row["id"], "stage": "read", "reason": row["error"]}
            for row in outcome
            if row["error"]
        ]
        first = rows.limit(probes.IMAGES).iter_batches(batch_size=None, batch_format="pyarrow")
        test, _ = gather(iter(first), config)
        val, _ = collect_pairs(open_rows(config, origin, "val", probes.IMAGES), config)
    if len(failures) == n_test:
        raise InputError(
            f"Evaluation needs at least one readable test image, but all of {images} failed: "
            f"{failures[0]['reason']}"
        )
    scores = pa.concat_tables(tables)
    n_images = n_test - len(failures)
    out.write("scores.parquet", parquet_bytes(scores))
    _tell("measuring the spread over donors")
    donor_std_db = probes.donor_spread(trained, test)
    _tell("probing the codes")
    labels = dict(zip(origin.source.ids, origin.source.labels, strict=False))
    accuracies = probes.accuracies(trained, val, test, labels)
    _tell("training classifiers that tell injected from truly noisy images")
    injected_or_true = probes.injected_or_true(trained, val, test)
    _tell("measuring the uncertainty")
    uncertainty = probes.uncertainty(trained, val, test)
    metrics = {
        "model": without_secrets(str(model)),
        "source": images,
        "images": n_images,
        "failed": len(failures),
        "data_range": 1.0,
        "n_views": list(trained.config.noise.n_views),
        "physics": trained.config.model.physics,
        "per_channel": per_channel,
        "results": _means(scores, trained.config, others),
        "donors": probes.SPREAD_DONORS,
        "donor_std_db": donor_std_db,
        "probes": accuracies,
        "injected_or_true": injected_or_true,
        "uncertainty": uncertainty,
    }
    out.write("failures.parquet", failures_bytes(failures))
    with out.writing("grid.png") as path:
        _draw_grid(trained, test, path)
    with out.writing("calibration.png") as path:
        calibration(uncertainty, path)
    out.write("metrics.md", evaluation_table(metrics))
    out.write("metrics.json", as_json(metrics, indent=2) + "\n")
    return Outcome(out.named, n_images, len(failures))


def _tell(what: str) -> None:
    print(f"evaluate: {what}.", flush=True)


def _fingerprint(folder: str) -> str:
    return fingerprint((model_path(folder) / "model.safetensors").read_bytes())


def _open_beside(config: Config, folders: Iterable[str]) -> list[Beside]:
    """The models of --beside, checked against the images and noise of the model in question."""
    others: list[Beside] = []
    for folder in folders:
        path = model_path(folder)
        its = load_any(path).config
        for section, key in (("images", "size"), ("images", "channels"), ("images", "crop"),
                             *(("noise", field.name) for field in dataclasses.fields(NoiseConfig))
                             ):  # fmt: skip
            mine, theirs = (getattr(getattr(c, section), key) for c in (config, its))
            if mine != theirs:
                raise InputError(
                    f"Models of one table need the same images and noise, but {folder} has "
                    f"{section}.{key}={theirs} where the model has {mine}."
                )
        label = path.parent.name if path.name == "model" else path.name
        if label in {other.label for other in others}:
            raise InputError(
                f"Run folders of --beside name their rows, but two are called {label!r}; "
                "rename one."
            )
        others.append(Beside(label, model_place(folder), its))
    return others


def _fit_baselines(
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


@functools.lru_cache(maxsize=16)
def _model(folder: str) -> TrainedModel | TrainedUNet:
    torch.set_num_threads(1)
    return load_any(folder)


def _score_block(table: pa.Table, *, work: "ray.ObjectRef") -> pa.Table:
    """Every method on one block of rows."""
    job = shared(work)
    trained = _model(job["model"])
    assert isinstance(trained, TrainedModel)
    pairs, _ = gather(iter([table]), dataclasses.replace(trained.config, images=job["images"]))
    rows: list[dict[str, Any]] = []
    if len(pairs):
        ids = np.array(sorted(pairs.ids))
        beside = {label: _model(folder) for label, folder in job["beside"]}
        scorer = Scorer(trained, job["baselines"], beside, pairs)
        for row, (p, s, seconds, which) in scorer.run().items():
            rows += [
                {"id": name, **row._asdict(), "psnr": p[k], "ssim": s[k], "seconds": seconds}
                for k, name in enumerate(ids[which])
            ]
    schema = pa.schema(
        [("id", pa.string()), ("task", pa.string()), ("method", pa.string()),
         ("n_views", pa.int32()), ("model", pa.string()), ("psnr", pa.float64()),
         ("ssim", pa.float64()), ("seconds", pa.float64())]
    )  # fmt: skip
    return pa.Table.from_pylist(rows, schema)


def _means(scores: pa.Table, config: Config, others: list[Beside]) -> list[dict[str, Any]]:
    """A dictionary for each row and view count, in the order of TASKS and METHODS.

    Models that differ only by their seed are one, that of `config` among them: the mean of their
    means, and the standard deviation of these.
    """
    first: dict[Config, str] = {}
    label, seen = {}, set()
    for name, its in [("", config), *((other.label, other.config) for other in others)]:
        # Equal seeds are no spread: such models were trained on something else, or are copies.
        recipe = dataclasses.replace(its, seed=0)
        label[name] = name if its in seen else first.setdefault(recipe, name)
        seen.add(its)
    columns = [("psnr", "mean"), ("ssim", "mean"), ("seconds", "mean")]
    means = scores.group_by(list(Row._fields)).aggregate(columns).to_pylist()
    pooled: dict[Row, list[dict[str, Any]]] = {}
    for cell in sorted(means, key=lambda cell: str(cell["model"])):
        row = Row(*(cell[name] for name in Row._fields))._replace(model=label[cell["model"]])
        pooled.setdefault(row, []).append(cell)

    def place(row: Row) -> tuple[Any, ...]:
        tasks, methods = list(TASKS), list(METHODS)
        return tasks.index(row.task), methods.index(row.method), row.model, row.n_views

    return [
        {
            "method": row.name,
            "text": row.text,
            "task": row.task,
            "n_views": row.n_views,
            "psnr": round(float(np.mean([cell["psnr_mean"] for cell in cells])), 4),
            "ssim": round(float(np.mean([cell["ssim_mean"] for cell in cells])), 5),
            "seconds": round(float(np.mean([cell["seconds_mean"] for cell in cells])), 6),
        }
        | (
            {
                "seeds": len(cells),
                "psnr_std": round(float(np.std([cell["psnr_mean"] for cell in cells], ddof=1)), 4),
            }
            if len(cells) > 1
            else {}
        )
        for row, cells in sorted(pooled.items(), key=lambda item: place(item[0]))
    ]


def _draw_grid(trained: TrainedModel, pairs: Pairs, path: Path) -> None:
    """One picture per row; view counts take turns."""
    views = trained.config.noise.n_views
    rows, labels = [], []
    # Rows are in the order of ids; a stride shows the whole range of them.
    picks = np.linspace(0, len(pairs) - 1, min(len(pairs), GRID_ROWS)).astype(int)
    for k, pick in enumerate(picks):
        noise_id = 1 + k % len(views)
        clean, noisy = pairs.take(np.array([pick]), 0), pairs.take(np.array([pick]), noise_id)
        model, codes, ids = trained.model, trained.codes, np.array([noise_id])
        pictures = [
            noisy,
            swap(model, noisy, None, noise_ids=ids),
            clean,
            swap(model, clean, None),
            swap(model, noisy, codes.mean(0), noise_ids=ids),
            swap(model, clean, codes.mean(noise_id)),
            noisy,
        ]
        rows.append([picture[0] for picture in pictures])
        labels.append(f"{views[noise_id - 1]} views")
    grid(rows, labels, path)
