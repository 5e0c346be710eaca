"""Scores of a model on the test split of a source, beside baselines: tables and the picture grid.

test rows --tasks: every method on every noise id--> PSNR and SSIM per image --> means

OUT/metrics.json   the contract other programs read
OUT/metrics.md     the same as a table
OUT/scores.parquet one row per image, method and view count
OUT/grid.png       noisy, its reconstruction, clean, its reconstruction, removed, injected, true
"""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch

from snr_ray import config as configs
from snr_ray import radon
from snr_ray.baselines import Lmmse, best_tv_weight, tv
from snr_ray.batches import Pairs
from snr_ray.checkpoint import TrainedModel, load_model
from snr_ray.cluster import connected, shared
from snr_ray.config import Config, InputError
from snr_ray.dataset import Origin, collect_pairs, count_rows, gather, open_rows
from snr_ray.hashing import fingerprint, hash64
from snr_ray.metrics import psnr, ssim
from snr_ray.outputs import Progress, claim, write_atomic
from snr_ray.report import evaluation_table, grid
from snr_ray.simulate import Outcome, parquet_bytes, write_failures
from snr_ray.sources import SPLITS
from snr_ray.swap import swap

Array = npt.NDArray[np.float32]

BASELINES = ("tv", "lmmse")
FIT_IMAGES = 8000
"""Training images behind the linear MMSE baseline."""
TUNE_IMAGES = 100
"""Validation images that choose the TV weight."""
PROBE_IMAGES = 400
"""Images per split for the probes and the donor spread."""
SPREAD_DONORS = 16
GRID_ROWS = 9

Scores = dict[tuple[str, int], tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]


def evaluate(
    config: Config,
    *,
    model: str,
    images: str,
    out: Path,
    baselines: tuple[str, ...] = BASELINES,
    limit: int | None = None,
    overwrite: bool = False,
) -> Outcome:
    """Score a model on the test images of a source.

    Args:
        config: only how images are read (images.fit, images.white, images.limit) is used; size,
            channels and noise are the model's.
        model: model folder.
        images: SRC of clean images; train and val splits serve the baselines.
        out: output folder.
        baselines: names out of BASELINES.
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
    keep = {f"images.{k}": getattr(config.images, k) for k in ("fit", "white", "limit")}
    config = configs.replace(trained.config, keep)
    origin = Origin(images=images)
    counts = {split: count_rows(config, origin, split) for split in reversed(SPLITS)}
    n_test = min(counts["test"], limit or counts["test"])
    resumed = claim(
        out,
        {
            "stage": "evaluate",
            "model": fingerprint((Path(model) / "model.safetensors").read_bytes()),
            "source": images,
            "baselines": list(baselines),
            "limit": limit,
            **keep,
        },
        owned=("metrics.json", "metrics.md", "scores.parquet", "grid.png", "failures.parquet"),
        overwrite=overwrite,
    )
    if resumed and (out / "metrics.json").is_file():
        done = json.loads((out / "metrics.json").read_text())
        return Outcome(out, done["images"], done["failed"])
    with connected():
        print(f"evaluate: fitting baselines ({', '.join(baselines) or 'none'}).", flush=True)
        fitted = _fit_baselines(config, origin, baselines)
        work = ray.put({"model": str(Path(model).absolute()), "fitted": fitted})
        # Rows come from tasks; scoring is a second task on each block.
        rows = open_rows(config, origin, "test", limit).materialize()
        task = functools.partial(_score_block, work=work)
        scored = rows.map_batches(task, batch_size=32, batch_format="pyarrow")
        tables = []
        progress = Progress("evaluate", n_test)
        done_images = 0
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
        first = rows.limit(PROBE_IMAGES).iter_batches(batch_size=None, batch_format="pyarrow")
        pairs, _ = gather(iter(first), config)
        probe_pairs, _ = collect_pairs(open_rows(config, origin, "val", PROBE_IMAGES), config)
    if len(failures) == n_test:
        raise InputError(
            f"Evaluation needs at least one readable test image, but all of {images} failed: "
            f"{failures[0]['reason']}"
        )
    scores = pa.concat_tables(tables)
    n_images = n_test - len(failures)
    write_atomic(out / "scores.parquet", parquet_bytes(scores))
    metrics = {
        "model": str(model),
        "source": images,
        "images": n_images,
        "failed": len(failures),
        "data_range": 1.0,
        "results": _means(scores, trained),
        "donors": SPREAD_DONORS,
        "donor_std_db": _donor_spread(trained, pairs),
        "probes": _probes(trained, probe_pairs, pairs),
    }
    write_failures(out / "failures.parquet", failures)
    _draw_grid(trained, pairs, out / "grid.png")
    write_atomic(out / "metrics.md", evaluation_table(metrics))
    write_atomic(out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return Outcome(out, n_images, len(failures))


def _fit_baselines(config: Config, origin: Origin, baselines: tuple[str, ...]) -> dict[str, Any]:
    """Per baseline, what it needs for each noise id."""
    fitted: dict[str, Any] = {}
    n_ids = len(config.noise.n_views)
    if "tv" in baselines:
        val, _ = collect_pairs(open_rows(config, origin, "val", TUNE_IMAGES), config)
        rows = np.arange(len(val))
        clean = val.take(rows, 0)
        fitted["tv"] = [best_tv_weight(val.take(rows, k), clean) for k in range(1, n_ids + 1)]
    if "lmmse" in baselines:
        train, _ = collect_pairs(open_rows(config, origin, "train", FIT_IMAGES), config)
        clean = train.take(np.arange(len(train)), 0)
        side = config.images.size
        fitted["lmmse"] = [
            Lmmse(clean, radon.operator(spec, side, side)) for spec in radon.specs(config.noise)
        ]
    return fitted


@functools.lru_cache(maxsize=1)
def _model(folder: str) -> TrainedModel:
    torch.set_num_threads(1)
    return load_model(folder)


def _score_block(table: pa.Table, *, work: "ray.ObjectRef") -> pa.Table:
    """Every method on one block of rows; long table id, method, n_views, psnr, ssim."""
    job = shared(work)
    trained = _model(job["model"])
    pairs, _ = gather(iter([table]), trained.config)
    rows: list[dict[str, Any]] = []
    if len(pairs):
        ids = sorted(pairs.ids)
        for (method, n_views), (p, s) in _scores(trained, job["fitted"], pairs).items():
            rows += [
                {"id": ids[k], "method": method, "n_views": n_views, "psnr": p[k], "ssim": s[k]}
                for k in range(len(ids))
            ]
    schema = pa.schema(
        [("id", pa.string()), ("method", pa.string()), ("n_views", pa.int32()),
         ("psnr", pa.float64()), ("ssim", pa.float64())]
    )  # fmt: skip
    return pa.Table.from_pylist(rows, schema)


def _scores(trained: TrainedModel, fitted: dict[str, Any], pairs: Pairs) -> Scores:
    rows = np.arange(len(pairs))
    clean = pairs.take(rows, 0)
    model, codes = trained.model, trained.codes
    order = [hash64(name) % codes.n_donors for name in sorted(pairs.ids)]
    random_clean = codes.pick(0, np.array(order))
    scores: Scores = {}

    def score(method: str, n_views: int, image: Array, truth: Array, clip: bool = True) -> None:
        scores[method, n_views] = (psnr(image, truth, clip=clip), ssim(image, truth, clip=clip))

    score("recon_clean", 0, swap(model, clean, None), clean)
    for noise_id, n_views in enumerate(trained.config.noise.n_views, start=1):
        noisy = pairs.take(rows, noise_id)
        score("noisy", n_views, noisy, clean)
        score("recon", n_views, swap(model, noisy, None), noisy, clip=False)
        score("swap", n_views, swap(model, noisy, codes.mean(0)), clean)
        score("swap_random", n_views, swap(model, noisy, random_clean), clean)
        score("inject", n_views, swap(model, clean, codes.mean(noise_id)), noisy, clip=False)
        score("no_inject", n_views, clean, noisy, clip=False)
        if "tv" in fitted:
            score("tv", n_views, tv(noisy, fitted["tv"][noise_id - 1]), clean)
        if "lmmse" in fitted:
            score("lmmse", n_views, fitted["lmmse"][noise_id - 1](noisy), clean)
    return scores


METHODS = ("noisy", "tv", "lmmse", "swap", "swap_random", "recon_clean", "recon", "inject",
           "no_inject")  # fmt: skip


def _means(scores: pa.Table, trained: TrainedModel) -> list[dict[str, Any]]:
    means = scores.group_by(["method", "n_views"]).aggregate([("psnr", "mean"), ("ssim", "mean")])
    cells = {(row["method"], row["n_views"]): row for row in means.to_pylist()}
    views = (0, *trained.config.noise.n_views)
    return [
        {
            "method": method,
            "n_views": n_views,
            "psnr": round(cells[method, n_views]["psnr_mean"], 4),
            "ssim": round(cells[method, n_views]["ssim_mean"], 5),
        }
        for method in METHODS
        for n_views in views
        if (method, n_views) in cells
    ]


def _donor_spread(trained: TrainedModel, pairs: Pairs) -> dict[str, float]:
    """Standard deviation in dB of an image's swap PSNR over random clean donors, mean of images."""
    rows = np.arange(min(len(pairs), PROBE_IMAGES // 4))
    clean = pairs.take(rows, 0)
    spread = {}
    for noise_id, n_views in enumerate(trained.config.noise.n_views, start=1):
        noisy = pairs.take(rows, noise_id)
        values = [
            psnr(swap(trained.model, noisy, trained.codes.pick(0, np.array([donor]))), clean)
            for donor in range(min(SPREAD_DONORS, trained.codes.n_donors))
        ]
        spread[str(n_views)] = round(float(np.std(values, axis=0).mean()), 4)
    return spread


def _probes(trained: TrainedModel, fit: Pairs, test: Pairs) -> dict[str, float]:
    """Accuracy on test images of linear probes, fitted on validation images, for the noise id."""
    n_ids = len(trained.config.noise.n_views) + 1
    codes = {name: _codes(trained, pairs) for name, pairs in (("fit", fit), ("test", test))}
    accuracy = {}
    for part in ("noise", "content"):
        x, y = codes["fit"][part], codes["fit"]["id"]
        mean, deviation = x.mean(0), x.std(0) + 1e-6
        # Ridge regression on one-hot ids, in its dual form: codes are longer than the set.
        scaled = np.c_[(x - mean) / deviation, np.ones(len(x))]
        kernel = scaled @ scaled.T + 0.1 * scaled.shape[1] * np.eye(len(x))
        weights = scaled.T @ np.linalg.solve(kernel, np.eye(n_ids)[y])
        tested = np.c_[(codes["test"][part] - mean) / deviation, np.ones(len(codes["test"]["id"]))]
        right = (tested @ weights).argmax(1) == codes["test"]["id"]
        accuracy[f"noise_id_from_{part}_code"] = round(float(right.mean()), 4)
    return accuracy | {"chance": round(1 / n_ids, 4)}


@torch.inference_mode()
def _codes(trained: TrainedModel, pairs: Pairs) -> dict[str, npt.NDArray[Any]]:
    """Posterior-mean codes of images, clean and of every noise id: flat noise and content, id."""
    rows = np.arange(min(len(pairs), PROBE_IMAGES))
    noise, content, ids = [], [], []
    for noise_id in range(len(trained.config.noise.n_views) + 1):
        codes = trained.model.encode(torch.from_numpy(pairs.take(rows, noise_id)))
        noise.append(torch.cat([level.flatten(1) for level in codes.noise], 1).numpy())
        content.append(torch.cat([level.flatten(1) for level in codes.content], 1).numpy())
        ids.append(np.full(len(rows), noise_id))
    return {
        "noise": np.concatenate(noise),
        "content": np.concatenate(content),
        "id": np.concatenate(ids),
    }


def _draw_grid(trained: TrainedModel, pairs: Pairs, path: Path) -> None:
    """One picture per row; view counts take turns."""
    views = trained.config.noise.n_views
    rows, labels = [], []
    # Rows are in the order of ids; a stride shows the whole range of them.
    picks = np.linspace(0, len(pairs) - 1, min(len(pairs), GRID_ROWS)).astype(int)
    for k, pick in enumerate(picks):
        noise_id = 1 + k % len(views)
        clean, noisy = pairs.take(np.array([pick]), 0), pairs.take(np.array([pick]), noise_id)
        model, codes = trained.model, trained.codes
        pictures = [
            noisy,
            swap(model, noisy, None),
            clean,
            swap(model, clean, None),
            swap(model, noisy, codes.mean(0)),
            swap(model, clean, codes.mean(noise_id)),
            noisy,
        ]
        rows.append([picture[0] for picture in pictures])
        labels.append(f"{views[noise_id - 1]} views")
    grid(rows, labels, path)
