"""Scores of models on the test split of a source, beside baselines: tables and pictures.

At other sizes and view counts than the model's own (--size, --views, --split all) images are
cleaned blind, told their view count, and with the count found by itself; probes are left out.

test rows --tasks: every method on every noise id--> PSNR and SSIM per image --> means

OUT/metrics.json     the contract other programs read
OUT/metrics.md       the same as a page to read
OUT/scores.parquet   one row per image, method and view count
OUT/grid.png         noisy, its reconstruction, clean, its reconstruction, removed, injected, true
OUT/calibration.png  predicted against true error
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from snr_ray import configfile as configs
from snr_ray.address import open_folder, without_secrets
from snr_ray.config import Config
from snr_ray.errors import InputError
from snr_ray.folder import Folder
from snr_ray.hashing import fingerprint
from snr_ray.images.collection import ALL, SPLITS
from snr_ray.images.datafolder import failures_bytes, parquet_bytes
from snr_ray.images.groups import NONE
from snr_ray.learning.batches import Pairs
from snr_ray.learning.checkpoint import TrainedModel, load_model
from snr_ray.learning.modelfolder import model_path, model_place, read_model
from snr_ray.metrics import as_json
from snr_ray.noise.lmmse import LMMSE_PIXELS
from snr_ray.outputs import FILES, SETTINGS, claim
from snr_ray.scoring import probes
from snr_ray.scoring.beside import means, open_beside
from snr_ray.scoring.grids import GRID_ROWS, draw_elsewhere, draw_own
from snr_ray.scoring.methods import BASELINES, METHODS, QUICK_BASELINES
from snr_ray.scoring.report import calibration, evaluation_table
from snr_ray.stages.evaluation.scoretask import fit_baselines, score_rows
from snr_ray.stages.job.connection import connected
from snr_ray.stages.job.outcome import Outcome
from snr_ray.stages.simulation.dataset import (
    Origin,
    collect_pairs,
    count_rows,
    draw_pairs,
    failed_images,
    open_rows,
)


def evaluate(
    config: Config,
    *,
    model: str,
    images: str,
    out: Path | str | Folder,
    baselines: tuple[str, ...] = QUICK_BASELINES,
    beside: tuple[str, ...] = (),
    limit: int | None = None,
    size: int | None = None,
    n_views: tuple[int, ...] = (),
    split: str = "test",
    overwrite: bool = False,
) -> Outcome:
    """Score a model on the test images of a source.

    Args:
        config: only how images are read (images.fit, images.white, images.limit) and split
            (images.group) is used; size, channels, window and noise, and what keeps images in one
            split, are the model's where not said otherwise. With images.channels=3 a
            grey model is applied to each channel of RGB images, else they are made grey for it.
        model: model folder, or the name of a shipped model.
        images: SRC of clean images; train and val splits serve the baselines and probes.
        out: output folder.
        baselines: names out of BASELINES.
        beside: other model folders for the same table, supervised U-Nets or HVAEs of the same
            images and noise; those that differ only by their seed share a row, also with `model`.
        limit: score at most this many test images.
        size: height and width of the images, in pixels; None: the model's own.
        n_views: view counts of the noise; none: the model's own.
        split: "test", or "all": every image, of a source that no model was trained on.
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
    others = open_beside(trained.config, beside)
    elsewhere = size is not None or bool(n_views) or split == ALL
    keep = {f"images.{k}": getattr(config.images, k) for k in ("fit", "white", "window", "limit")}
    per_channel = config.images.channels == 3 and trained.config.images.channels == 1
    if per_channel:
        _tell("the images are RGB and the model is grey: it takes each channel by itself")
        keep["images.channels"] = 3
    window = trained.config.images.window
    if window is not None and config.images.window is None:  # as denoise has it
        _tell(f"CT slices are read in the model's window, {window[0]:g} to {window[1]:g} HU")
        keep["images.window"] = list(window)
    asked_group = config.images.group
    config = configs.replace(trained.config, keep)
    if config.images.crop:
        _tell(
            "the images are crops of larger ones, whose noise no operator on the crop gives: "
            f"{', '.join(key for key in BASELINES if METHODS[key].operator)} and unseen view "
            "counts are left out"
        )
        baselines = tuple(key for key in baselines if not METHODS[key].operator)
    if elsewhere:
        config = _elsewhere(config, size, n_views)
        _tell_unseen(trained, config)
        baselines = _possible(config, baselines, split)
    origin = Origin(images=images)
    group = settle_group(origin, asked_group, trained.config, model, split)
    config = configs.replace(config, {"images.group": group})
    needed = reversed(SPLITS) if not elsewhere else ((split, "val") if baselines else (split,))
    counts = {name: _count(config, origin, name, elsewhere and name != split) for name in needed}
    n_test = min(counts[split], limit or counts[split])
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
            SETTINGS: [read_model(folder).settings for folder in (model, *beside)],
            "limit": limit,
            **({"size": size, "n_views": list(n_views), "split": split} if elsewhere else {}),
            **keep,
            **({} if group in (None, NONE) else {"images.group": group}),
        },
        owned=("metrics.json", "metrics.md", "scores.parquet", "grid.png", "calibration.png",
               "failures.parquet"),
        overwrite=overwrite,
        **origin.inputs,
    )  # fmt: skip
    if resumed and out.exists("metrics.json"):
        with suppress(ValueError, TypeError, KeyError):  # damaged: all is scored again
            done = json.loads(out.read("metrics.json"))
            return Outcome(out.named, int(done["images"]), int(done["failed"]))
    with connected():
        _tell(f"fitting baselines ({', '.join(baselines) or 'none'})")
        job = {
            "model": model_place(model),
            "config": config,
            "elsewhere": elsewhere,
            "baselines": fit_baselines(config, origin, baselines),
            "beside": [(other.label, other.folder) for other in others],
        }
        rows = open_rows(config, origin, split, limit).materialize()
        scores = score_rows(rows, job, n_test)
        failures = failed_images(rows)
        if len(failures) == n_test:
            raise InputError(
                f"Evaluation needs at least one readable test image, but all of {images} failed: "
                f"{failures[0]['reason']}"
            )
        scored = set(pc.unique(scores["method"]).to_pylist())
        for key in baselines:
            if key not in scored:
                _tell(f"{key} has no row: it is run on one image in {METHODS[key].every}, by the "
                      "hash of its id, and none of these is one; give more images")  # fmt: skip
        test = draw_pairs(rows, GRID_ROWS if elsewhere else probes.IMAGES, config)
        if not elsewhere:
            val, _ = collect_pairs(open_rows(config, origin, "val", probes.IMAGES), config)
    n_images = n_test - len(failures)
    out.write("scores.parquet", parquet_bytes(scores))
    metrics: dict[str, Any] = {
        "model": without_secrets(str(model)),
        "source": without_secrets(images),
        "split": split,
        "size": config.images.size,
        "images": n_images,
        "failed": len(failures),
        "data_range": 1.0,
        "n_views": list(config.noise.n_views),
        "physics": trained.config.model.physics,
        "per_channel": per_channel,
        "results": means(scores, trained.config, others),
    }
    if elsewhere:
        metrics |= {"donor_std_db": {}, "probes": {}}
        with out.writing("grid.png") as path:
            draw_elsewhere(trained, test, config.noise, path)
    else:
        labels = dict(zip(origin.source.ids, origin.source.labels, strict=False))
        metrics |= _probed(trained, val, test, labels)
        with out.writing("grid.png") as path:
            draw_own(trained, test, path)
        with out.writing("calibration.png") as path:
            calibration(metrics["uncertainty"], path)
    out.write("failures.parquet", failures_bytes(failures))
    out.write("metrics.md", evaluation_table(metrics))
    out.write("metrics.json", as_json(metrics, indent=2) + "\n")
    return Outcome(out.named, n_images, len(failures))


def _count(config: Config, origin: Origin, name: str, spared: bool) -> int:
    """Images of a split; `spared` says that it serves baselines alone."""
    try:
        return count_rows(config, origin, name)
    except InputError as error:
        if not spared:
            raise
        raise InputError(
            f"{str(error).rstrip('.')}, or leave out the baselines it is for: --baselines ''."
        ) from None


def _probed(
    trained: TrainedModel, val: Pairs, test: Pairs, labels: dict[str, str]
) -> dict[str, Any]:
    """What is measured of a model on its own size and view counts, beside the scores."""
    _tell("measuring the spread over donors")
    donor_std_db = probes.donor_spread(trained, test)
    _tell("probing the codes")
    accuracies = probes.accuracies(trained, val, test, labels)
    _tell("training classifiers that tell injected from truly noisy images")
    injected_or_true = probes.injected_or_true(trained, val, test)
    _tell("measuring the uncertainty")
    return {
        "donors": probes.SPREAD_DONORS,
        "donor_std_db": donor_std_db,
        "probes": accuracies,
        "injected_or_true": injected_or_true,
        "uncertainty": probes.uncertainty(trained, val, test),
    }


def settle_group(
    origin: Origin, asked: str | None, trained: Config, model: str, split: str
) -> str | None:
    """What keeps images in one split: as asked, else as when the model was trained.

    Raises:
        InputError: if the images cannot be grouped as asked, or all are of one group.
    """
    if asked is not None:
        return origin.grouped(asked).group
    if split == ALL:
        return NONE
    remembered = None if model in configs.shipped_models() else trained.images.group
    try:
        return origin.grouped(remembered).group
    except InputError:
        if remembered is None:
            raise
    _tell(
        f"the model was trained on images split by {remembered}, which these have not: they are "
        "others, and split as they say themselves"
    )
    return origin.grouped(None).group


def _elsewhere(config: Config, size: int | None, n_views: tuple[int, ...]) -> Config:
    """How images of another size and other view counts are read and made noisy."""
    if config.images.crop:
        raise InputError(
            "--size, --views and --split all are for models of whole images, but this one was "
            "trained on crops, whose noise comes from beyond them; leave them out."
        )
    changes = {
        "images.size": config.images.size if size is None else size,
        "noise.n_views": list(n_views or config.noise.n_views),
        "noise.views_per_pixel": None,  # these counts are what is scored, not a sample of a range
        "train.sizes": [],
        "train.size_weights": [],
    }
    return configs.replace(config, changes)


def _possible(config: Config, baselines: tuple[str, ...], split: str) -> tuple[str, ...]:
    """Baselines that can be fitted to images of a size and need none of those that are scored."""
    if "lmmse" in baselines and (split == ALL or config.images.size**2 > LMMSE_PIXELS):
        _tell(
            "lmmse is left out: it would be fitted on the images that are scored"
            if split == ALL
            else f"lmmse is left out: images have more than {LMMSE_PIXELS} pixels"
        )
        baselines = tuple(key for key in baselines if key != "lmmse")
    if split == ALL and baselines:
        _tell("weights of baselines are chosen on the val tenth of the images, which flatters them")
    return baselines


def _tell_unseen(trained: TrainedModel, config: Config) -> None:
    """Say which view counts of an evaluation lie beyond the range that a model was trained on."""
    side = config.images.size
    unseen = [k for k in config.noise.n_views if not trained.has_seen(k, side)]
    if trained.views is not None and unseen:
        least, most = trained.views.counts(side)
        _tell(
            f"the model knows {least} to {most} views of images of {side} pixels, and may fail at "
            f"{', '.join(map(str, unseen))}"
        )


def _tell(what: str) -> None:
    print(f"evaluate: {what}.", flush=True)


def _fingerprint(folder: str) -> str:
    return fingerprint((model_path(folder) / "model.safetensors").read_bytes())
