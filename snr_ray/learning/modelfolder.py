"""A model folder as it lies on disk: what is to be known of it before a network is built of it.

Nothing here needs torch, which is slow to import: a driver whose tasks build the network does not.
"""

import atexit
import dataclasses
import functools
import json
import math
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, deserialize

from snr_ray import configfile as configs
from snr_ray.address import local_path, open_folder, without_secrets
from snr_ray.config import Config
from snr_ray.errors import InputError, check
from snr_ray.hashing import fingerprint
from snr_ray.noise.spec import NoiseSpec, noise_specs
from snr_ray.noise.viewrange import ViewRange

WEIGHTS_FILE = "model.safetensors"
BF16_COSTS = "bf16_costs_psnr"
LEAST_EXPLAINED = "least_explained_"
"""Metrics of this name and a number of views per pixel bound what `denoise` trusts."""


class Knowledge:
    """What the config of a model says of the noise that it knows."""

    config: Config

    def noise_id(self, n_views: int) -> int:
        """Noise id of a view count. Raises InputError if the model was not trained on it."""
        if n_views not in self.config.noise.n_views:
            known = ", ".join(map(str, self.config.noise.n_views))
            raise InputError(
                f"The view count must be one that the model was trained on ({known}), "
                f"but got {n_views}."
            )
        return self.config.noise.n_views.index(n_views) + 1

    @property
    def views(self) -> ViewRange | None:
        """The range of view counts that the model was trained on; None of one of a few counts."""
        return ViewRange.of(self.config.noise)

    @property
    def views_per_pixel(self) -> tuple[float, float]:
        """The least and the most views per pixel of the longer side that the model has seen."""
        if self.views is not None:
            return self.views.low, self.views.high
        counts, size = self.config.noise.n_views, self.config.images.size
        return min(counts) / size, max(counts) / size

    def has_seen(self, n_views: int, side: int) -> bool:
        """Whether the model was trained on a view count, for images whose longer side is `side`."""
        if self.views is None:
            return n_views in self.config.noise.n_views
        least, most = self.views.counts(side)
        return least <= n_views <= most

    @property
    def unrolls(self) -> bool:
        """Whether the model solves for the image with the operator of its noise."""
        its = self.config.model
        return its.decoder == "operator" and its.unrolled > 0

    @property
    def can_be_told(self) -> bool:
        """Whether the view count of noisy images helps: with model.physics one of those that the
        model was trained on, with model.unrolled any."""
        return self.config.model.physics or self.unrolls

    def geometry(self, n_views: int) -> NoiseSpec | None:
        """What to tell the unrolled solver of images of a view count; None where there is none.

        Raises InputError if it is below 1.
        """
        check(n_views >= 1, f"A view count must be at least 1, but got {n_views}.")
        if not self.unrolls:
            return None
        return noise_specs(dataclasses.replace(self.config.noise, n_views=(n_views,)))[0]

    def check_noise(self, n_views: int) -> None:
        """Raise InputError for noise of a view count that the model cannot inject; 0 is none."""
        if n_views and self.views is None:
            self.noise_id(n_views)
        check(n_views >= 0, f"A view count must be at least 1, but got {n_views}.")


@dataclass(frozen=True)
class ModelFolder(Knowledge):
    """The contents of a model folder; `snr_ray.learning.checkpoint.built` makes a model of them."""

    path: Path
    """For messages."""
    config: Config
    weights: bytes
    metrics: dict[str, Any]

    @property
    def settings(self) -> str:
        """Fingerprint of what decides its answers beside the weights: the network, the noise, how
        images are read, and which answers are trusted."""
        config = configs.to_dict(self.config)
        images = {key: config["images"][key] for key in ("size", "channels", "window")}
        trusted = {k: v for k, v in self.metrics.items() if k.startswith(LEAST_EXPLAINED)}
        its = [config["model"], config["noise"], images, trusted, self.metrics.get(BF16_COSTS)]
        return fingerprint(json.dumps(its, sort_keys=True))


def read_model(folder: str | Path) -> ModelFolder:
    """Read a model folder, or a model that comes with snr_ray by its name.

    Raises:
        InputError: if the folder is missing or is not a model folder, or a file of it is damaged.
    """
    path = model_path(folder)
    missing = [n for n in (WEIGHTS_FILE, "config.yaml") if not (path / n).is_file()]
    if missing:
        inner = path / "model"
        hint = (
            f"did you mean {inner}?"
            if (inner / WEIGHTS_FILE).is_file()
            else "`snr train` writes one as RUN/model, and "
            f"{', '.join(configs.shipped_models())} come with snr_ray."
        )
        raise InputError(f"A model folder holds {missing[0]}, but {path} does not; {hint}")
    try:
        config = configs.load_saved(path / "config.yaml")
    except InputError as error:
        raise InputError(f"{path / 'config.yaml'}: {error}") from None
    try:
        weights = (path / WEIGHTS_FILE).read_bytes()
        deserialize(weights)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}/model.safetensors cannot be read ({error}).") from None
    return ModelFolder(path, config, weights, read_metrics(path))


def is_shipped(folder: str | Path) -> bool:
    """Whether a name means a model that comes with snr_ray, which the tests have built."""
    return str(folder) in configs.shipped_models() and not Path(folder).exists()


def model_path(folder: str | Path) -> Path:
    """The model folder that the user named; a name of `shipped_models` where there is no folder.

    One in a bucket is copied to this machine, for as long as the process lives.

    Raises:
        InputError: if the bucket cannot be read or holds no model there.
    """
    if "://" in str(folder):
        return _fetched(str(folder))
    if is_shipped(folder):
        return Path(str(resources.files("snr_ray") / "shipped" / str(folder)))
    return local_path(folder)


def model_place(folder: str | Path) -> str:
    """What tasks on any node open as the same model: an absolute path, or the URI."""
    return str(folder) if "://" in str(folder) else str(model_path(folder).absolute())


@functools.cache
def _fetched(uri: str) -> Path:
    place = open_folder(uri)
    top = Path(tempfile.mkdtemp(prefix="snr-model-"))
    atexit.register(shutil.rmtree, top, ignore_errors=True)
    folder = top.joinpath(*place.filesystem()[1].strip("/").split("/"))  # names the model
    folder.mkdir(parents=True)
    for name in (WEIGHTS_FILE, "config.yaml", "metrics.json"):
        try:
            (folder / name).write_bytes(place.read(name))
        except OSError as error:
            if name != "metrics.json":
                raise InputError(
                    f"A model folder holds {name}, but {place} cannot give it "
                    f"({without_secrets(str(error))}); `snr train` writes one as RUN/model."
                ) from None
    return folder


def least_metrics(least: Mapping[float, float]) -> dict[str, float]:
    """Metrics that say what good answers explain at the least, dB, by views per pixel.

    With all digits: counts are looked up by their views per pixel.
    """
    return {f"{LEAST_EXPLAINED}{float(known)!r}": value for known, value in least.items()}


def least_of(metrics: Mapping[str, Any]) -> dict[float, float]:
    """What `least_metrics` was made of. Raises ValueError for what it does not write."""
    return {
        float(name.removeprefix(LEAST_EXPLAINED)): float(value)
        for name, value in metrics.items()
        if name.startswith(LEAST_EXPLAINED)
    }


def read_metrics(path: Path) -> dict[str, Any]:
    """metrics.json of a model folder; nothing where it has none.

    Numbers that were not finite are missing.

    Raises:
        InputError: if it is damaged.
    """
    if not (path / "metrics.json").is_file():
        return {}
    try:
        found = json.loads((path / "metrics.json").read_text())
        if not isinstance(found, dict):
            raise ValueError(f"it holds {json.dumps(found)[:40]}")
        kept = {name: value for name, value in found.items() if value is not None}
        _check_numbers(kept)
    except ValueError as error:
        raise InputError(
            f"{path / 'metrics.json'} must be JSON of names and numbers, but is damaged ({error}); "
            "remove it, or copy the model anew."
        ) from None
    return kept


def _check_numbers(metrics: dict[str, Any]) -> None:
    """Raise ValueError if what a model goes by is no number; the rest is for the reader."""
    for name, value in metrics.items():
        if name == BF16_COSTS or name.startswith(LEAST_EXPLAINED):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{name} is {json.dumps(value)[:40]}")
            if not math.isfinite(value):
                raise ValueError(f"{name} is {value}")
    least_of(metrics)
