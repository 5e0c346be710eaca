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
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch

from snr_ray import config as configs
from snr_ray import probes, radon
from snr_ray.baselines import FIT_IMAGES, Lmmse, best_tv_weight, sart, tv
from snr_ray.batches import Pairs
from snr_ray.checkpoint import TrainedModel, load_model, load_unet, model_path
from snr_ray.cluster import connected, shared
from snr_ray.config import Config, InputError
from snr_ray.dataset import Origin, collect_pairs, count_rows, gather, open_rows
from snr_ray.hashing import fingerprint, hash64
from snr_ray.images import with_channels
from snr_ray.metrics import psnr, ssim
from snr_ray.outputs import Progress, claim, write_atomic
from snr_ray.report import calibration, evaluation_table, grid
from snr_ray.simulate import Outcome, parquet_bytes, write_failures
from snr_ray.sources import SPLITS
from snr_ray.swap import detect, swap
from snr_ray.unet import UNet, regress

Array = npt.NDArray[np.float32]

BASELINES = ("tv", "sart", "lmmse")
TUNE_IMAGES = 100
"""Validation images that choose the TV weight."""
SART_EVERY = 8
"""SART takes hundreds of times as long as the rest; every so many images are enough."""
UNSEEN_VIEWS = (30, 15)
"""View counts to try that no model was trained on."""
EXTRA_SIGMA = 0.01
"""Standard deviation of Gaussian noise added to the noisy image, for the rows about it."""
GRID_ROWS = 9


@dataclasses.dataclass(frozen=True)
class Beside:
    """Another model in the same table; `label` is the name of its run folder."""

    label: str
    folder: Path
    config: Config

    @property
    def recipe(self) -> Any:
        """What models that differ only by their seed share."""
        tree = configs.to_dict(self.config)
        return json.dumps({k: tree[k] for k in ("images", "noise", "model", "loss")}) + str(
            [self.config.train.steps, self.config.train.batch_size, self.config.train.lr]
        )


def evaluate(
    config: Config,
    *,
    model: str,
    images: str,
    out: Path,
    baselines: tuple[str, ...] = BASELINES,
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
            images and noise; those that differ only by their seed share a row.
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
    keep = {f"images.{k}": getattr(config.images, k) for k in ("fit", "white", "limit")}
    per_channel = config.images.channels == 3 and trained.config.images.channels == 1
    if per_channel:
        print(
            "evaluate: the images are RGB and the model is grey: it takes each channel by itself."
        )
        keep["images.channels"] = 3
    config = configs.replace(trained.config, keep)
    origin = Origin(images=images)
    counts = {split: count_rows(config, origin, split) for split in reversed(SPLITS)}
    n_test = min(counts["test"], limit or counts["test"])
    resumed = claim(
        out,
        {
            "stage": "evaluate",
            "model": _fingerprint(model_path(model)),
            "source": images,
            "baselines": list(baselines),
            "beside": [f"{other.label} {_fingerprint(other.folder)}" for other in others],
            "limit": limit,
            **keep,
        },
        owned=("metrics.json", "metrics.md", "scores.parquet", "grid.png", "calibration.png",
               "failures.parquet"),
        overwrite=overwrite,
    )  # fmt: skip
    if resumed and (out / "metrics.json").is_file():
        done = json.loads((out / "metrics.json").read_text())
        return Outcome(out, done["images"], done["failed"])
    with connected():
        print(f"evaluate: fitting baselines ({', '.join(baselines) or 'none'}).", flush=True)
        work = ray.put(
            {
                "model": str(model_path(model).absolute()),
                "images": config.images,
                "fitted": _fit_baselines(config, origin, baselines),
                "beside": [(other.label, str(other.folder)) for other in others],
            }
        )
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
    write_atomic(out / "scores.parquet", parquet_bytes(scores))
    print("evaluate: probing the codes.", flush=True)
    uncertainty = probes.uncertainty(trained, val, test)
    metrics = {
        "model": str(model),
        "source": images,
        "images": n_images,
        "failed": len(failures),
        "data_range": 1.0,
        "n_views": list(trained.config.noise.n_views),
        "physics": trained.config.model.physics,
        "per_channel": per_channel,
        "results": _means(scores, others),
        "donors": probes.SPREAD_DONORS,
        "donor_std_db": probes.donor_spread(trained, test),
        "probes": probes.accuracies(trained, val, test, origin.source.labels),
        "injected_or_true": probes.injected_or_true(trained, val, test),
        "uncertainty": uncertainty,
    }
    write_failures(out / "failures.parquet", failures)
    _draw_grid(trained, test, out / "grid.png")
    calibration(uncertainty, out / "calibration.png")
    write_atomic(out / "metrics.md", evaluation_table(metrics))
    write_atomic(out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return Outcome(out, n_images, len(failures))


def _fingerprint(folder: Path) -> str:
    return fingerprint((folder / "model.safetensors").read_bytes())


def _open_beside(config: Config, folders: Iterable[str]) -> list[Beside]:
    """The models of --beside, checked against the images and noise of the model in question."""
    others: list[Beside] = []
    for folder in folders:
        path = model_path(folder)
        unet = load_unet(path)
        its = unet[0] if unet else load_model(path).config
        for section, key in (("images", "size"), ("images", "channels"), ("noise", "n_views"),
                             ("noise", "filter")):  # fmt: skip
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
        others.append(Beside(label, path.absolute(), its))
    return others


def _fit_baselines(config: Config, origin: Origin, baselines: tuple[str, ...]) -> dict[str, Any]:
    """Per baseline, what it needs for each noise id."""
    fitted: dict[str, Any] = {}
    n_ids = len(config.noise.n_views)
    if "tv" in baselines:
        val, _ = collect_pairs(open_rows(config, origin, "val", TUNE_IMAGES), config)
        rows = np.arange(len(val))
        clean = val.take(rows, 0)
        fitted["tv"] = [best_tv_weight(val.take(rows, k), clean) for k in range(1, n_ids + 1)]
    if "sart" in baselines:
        fitted["sart"] = True
    if "lmmse" in baselines:
        train, _ = collect_pairs(open_rows(config, origin, "train", FIT_IMAGES), config)
        clean = train.take(np.arange(len(train)), 0)
        side = config.images.size
        fitted["lmmse"] = [
            Lmmse(clean, radon.operator(spec, side, side)) for spec in radon.specs(config.noise)
        ]
    return fitted


@functools.lru_cache(maxsize=16)
def _model(folder: str) -> TrainedModel | UNet:
    torch.set_num_threads(1)
    unet = load_unet(folder)
    return unet[1] if unet else load_model(folder)


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
        scorer = _Scorer(trained, job["fitted"], beside, pairs)
        for (method, n_views), (p, s, seconds, which) in scorer.run().items():
            rows += [
                {"id": name, "method": method, "n_views": n_views, "psnr": p[k], "ssim": s[k],
                 "seconds": seconds}
                for k, name in enumerate(ids[which])
            ]  # fmt: skip
    schema = pa.schema(
        [("id", pa.string()), ("method", pa.string()), ("n_views", pa.int32()),
         ("psnr", pa.float64()), ("ssim", pa.float64()), ("seconds", pa.float64())]
    )  # fmt: skip
    return pa.Table.from_pylist(rows, schema)


class _Scorer:
    """Every method on the pairs of one block."""

    def __init__(
        self,
        trained: TrainedModel,
        fitted: dict[str, Any],
        beside: dict[str, TrainedModel | UNet],
        pairs: Pairs,
    ) -> None:
        self.trained, self.fitted, self.beside = trained, fitted, beside
        self.ids = sorted(pairs.ids)
        self.rows = np.arange(len(pairs))
        self.pairs, self.clean = pairs, pairs.take(self.rows, 0)
        self.scores: dict[tuple[str, int], Any] = {}

    def run(self) -> dict[tuple[str, int], Any]:
        """By method and view count: PSNR, SSIM, seconds per image, and which rows they are of."""
        model, noise = self.trained.model, self.trained.config.noise
        self.score("recon_clean", 0, lambda: swap(model, self.clean, None), self.clean)
        for noise_id, spec in enumerate(radon.specs(noise), start=1):
            self.noise_level(noise_id, spec)
        for views in UNSEEN_VIEWS:
            if views not in noise.n_views:
                spec = radon.specs(dataclasses.replace(noise, n_views=(views,)))[0]
                noisy = radon.operator(spec, *self.clean.shape[2:])(self.clean)
                # Nobody says which of the known noise ids comes nearest: the noise code does.
                ids = detect(model, self.trained.codes, noisy)
                self.removal(noisy, views, ids, suffix="_unseen")
        return self.scores

    def noise_level(self, noise_id: int, spec: radon.NoiseSpec) -> None:
        """Every method on one of the model's noise ids."""
        model, codes = self.trained.model, self.trained.codes
        views, noisy = spec.n_views, self.pairs.take(self.rows, noise_id)
        ids = np.full(len(noisy), noise_id)
        self.removal(noisy, views, ids)
        donors = codes.pick(0, np.array([hash64(name) % codes.n_donors for name in self.ids]))
        cleaned: dict[str, Callable[[], Array]] = {
            "swap_random": lambda: swap(model, noisy, donors, noise_ids=ids),
            "swap_flips": lambda: self.flipped(noisy, ids),
            "hdn": lambda: swap(model, noisy, None, noise_ids=ids, prior_levels=1),
        }
        if self.trained.config.model.physics:
            cleaned["swap_detected"] = lambda: swap(
                model, noisy, codes.mean(0), noise_ids=detect(model, codes, noisy)
            )
        for method, restore in cleaned.items():
            self.score(method, views, restore, self.clean)
        made: dict[str, Callable[[], Array]] = {
            "recon": lambda: swap(model, noisy, None, noise_ids=ids),
            "inject": lambda: swap(model, self.clean, codes.mean(noise_id)),
            "no_inject": lambda: self.clean,
        }
        for label, other in self.beside.items():
            if isinstance(other, TrainedModel):
                made[f"beside:{label}_inject"] = functools.partial(
                    swap, other.model, self.clean, other.codes.mean(noise_id)
                )
        for method, restore in made.items():
            self.score(method, views, restore, noisy, clip=False)
        others = with_channels(noisy, model.channels)[::-1]
        self.score("authority", views, lambda: self.exchanged(noisy, ids), others, clip=False)
        some = np.array([hash64(name) % SART_EVERY == 0 for name in self.ids])
        if "sart" in self.fitted and some.any():
            operator, measured = radon.operator(spec, *noisy.shape[2:]), self.clean[some]
            self.score("sart", views, lambda: sart(measured, operator), measured, which=some)
        grain = np.random.default_rng([hash64(name) for name in self.ids])
        grainy = noisy + EXTRA_SIGMA * grain.standard_normal(noisy.shape, np.float32)
        self.removal(grainy, views, ids, suffix="_grainy")

    def removal(
        self, noisy: Array, views: int, ids: npt.NDArray[np.int64], *, suffix: str = ""
    ) -> None:
        """The methods that are compared on noise of every kind; `suffix` names the kind."""
        model, codes = self.trained.model, self.trained.codes
        methods: dict[str, Callable[[], Array]] = {
            "noisy": lambda: noisy,
            "swap": lambda: swap(model, noisy, codes.mean(0), noise_ids=ids),
        }
        if "tv" in self.fitted and suffix != "_unseen":
            methods["tv"] = lambda: tv(noisy, self.fitted["tv"][ids[0] - 1])
        if "lmmse" in self.fitted and suffix != "_unseen":
            methods["lmmse"] = lambda: self.fitted["lmmse"][ids[0] - 1](noisy)
        for label, other in self.beside.items():
            methods[f"beside:{label}"] = (
                functools.partial(regress, other, noisy, ids)
                if isinstance(other, UNet)
                else functools.partial(swap, other.model, noisy, other.codes.mean(0), noise_ids=ids)
            )
        for method, restore in methods.items():
            self.score(method + suffix, views, restore, self.clean)

    def flipped(self, noisy: Array, ids: npt.NDArray[np.int64]) -> Array:
        """Mean of the swap over the image and its mirror images, flipped back."""
        model, codes = self.trained.model, self.trained.codes.mean(0)
        views = [(), (3,), (2,), (2, 3)]
        return np.mean(
            [np.flip(swap(model, np.flip(noisy, v), codes, noise_ids=ids), v) for v in views],
            axis=0,
        )

    @torch.inference_mode()
    def exchanged(self, noisy: Array, ids: npt.NDArray[np.int64]) -> Array:
        """All codes of image n - 1 - i decoded in the place of image i."""
        model = self.trained.model
        x = torch.from_numpy(with_channels(noisy, model.channels))
        codes = model(x, noise_ids=torch.from_numpy(ids)).codes
        codes.content = [level.flip(0) for level in codes.content]
        codes.noise = [level.flip(0) for level in codes.noise]
        return model.decode(codes).numpy()

    def score(
        self,
        method: str,
        views: int,
        restore: Callable[[], Array],
        truth: Array,
        *,
        clip: bool = True,
        which: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        since = time.perf_counter()
        image = restore()
        seconds = (time.perf_counter() - since) / len(image)
        which = np.ones(len(self.ids), bool) if which is None else which
        self.scores[method, views] = (
            psnr(image, truth, clip=clip), ssim(image, truth, clip=clip), seconds, which
        )  # fmt: skip


METHODS = ("noisy", "tv", "sart", "lmmse", "swap", "swap_random", "swap_flips", "swap_detected",
           "hdn", "beside", "recon_clean", "recon", "authority", "inject", "no_inject")  # fmt: skip


def _means(scores: pa.Table, others: list[Beside]) -> list[dict[str, Any]]:
    """A dictionary for each method and view count, in the order of METHODS.

    Models of --beside that differ only by their seed are one method: the mean of their means, and
    the standard deviation of these.
    """
    columns = [("psnr", "mean"), ("ssim", "mean"), ("seconds", "mean")]
    means = scores.group_by(["method", "n_views"]).aggregate(columns).to_pylist()
    pooled: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in means:
        pooled.setdefault((_pooled_name(row["method"], others), row["n_views"]), []).append(row)

    def place(key: tuple[str, int]) -> tuple[Any, ...]:
        method, n_views = key
        kind = "beside" if method.startswith("beside:") else method.rpartition("_grainy")[0]
        kind = kind or method.rpartition("_unseen")[0] or method
        special = 2 * method.endswith("_unseen") + method.endswith("_grainy")
        return special, METHODS.index(kind), method, n_views

    return [
        {
            "method": method,
            "n_views": n_views,
            "psnr": round(float(np.mean([row["psnr_mean"] for row in group])), 4),
            "ssim": round(float(np.mean([row["ssim_mean"] for row in group])), 5),
            "seconds": round(float(np.mean([row["seconds_mean"] for row in group])), 6),
        }
        | (
            {
                "seeds": len(group),
                "psnr_std": round(float(np.std([row["psnr_mean"] for row in group], ddof=1)), 4),
            }
            if len(group) > 1
            else {}
        )
        for (method, n_views), group in sorted(pooled.items(), key=lambda item: place(item[0]))
    ]


def _pooled_name(method: str, others: list[Beside]) -> str:
    """The method under the label of the first model with the same recipe."""
    if not method.startswith("beside:"):
        return method
    # Labels may begin alike: the longest that fits is meant.
    mine = max((o for o in others if method.startswith(f"beside:{o.label}")),
               key=lambda o: len(o.label))  # fmt: skip
    first = next(other for other in others if other.recipe == mine.recipe)
    return method.replace(f"beside:{mine.label}", f"beside:{first.label}", 1)


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
