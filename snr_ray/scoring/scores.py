"""Every method on one block of clean and noisy images: PSNR and SSIM of each image.

Which cases there are is decided here, what is compared in them in `methods`; `evaluate` runs it on
every block of a test split. Runs without Ray.
"""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from snr_ray.config import NoiseConfig
from snr_ray.hashing import hash64
from snr_ray.learning.batches import Pairs
from snr_ray.learning.checkpoint import TrainedModel, TrainedUNet
from snr_ray.metrics import psnr, ssim
from snr_ray.network.swap import detect
from snr_ray.network.views import explaining, find_views, views_of_range
from snr_ray.noise.operator import noise_operator, noise_specs
from snr_ray.noise.spec import photon_seeds
from snr_ray.scoring.cases import Case, Restore, as_seen
from snr_ray.scoring.methods import METHODS, Method

Array = npt.NDArray[np.float32]
Values = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]

UNSEEN_VIEWS = (30, 15)
"""View counts to try that no model was trained on."""


class Row(NamedTuple):
    """One row of the table."""

    task: str
    """Out of TASKS."""
    method: str
    """Out of METHODS."""
    n_views: int
    """Of the noisy image; 0 where there is none."""
    model: str = ""
    """Label of another model beside the one that is evaluated, or nothing."""

    @property
    def name(self) -> str:
        """What the row is called in metrics.json, such as `swap_grainy:LABEL`."""
        task = "" if self.task == "make" else self.task.removeprefix("remove")
        return self.method + task + (f":{self.model}" if self.model else "")

    @property
    def text(self) -> str:
        """What the row of the table says."""
        return (f"model `{self.model}`: " if self.model else "") + METHODS[self.method].text


class Scores(NamedTuple):
    """Of the images of a block."""

    psnr: Values
    ssim: Values
    seconds: float
    """An image."""
    which: npt.NDArray[np.bool_]
    """Which images of the block."""
    found: Labels | None
    """View count that was found of each, where the row is of that."""


class Scorer:
    """Every method on the pairs of one block."""

    def __init__(
        self,
        trained: TrainedModel,
        baselines: dict[str, list[Restore]],
        beside: dict[str, TrainedModel | TrainedUNet],
        pairs: Pairs,
        elsewhere: NoiseConfig | None = None,
    ) -> None:
        """`baselines`: by key, what cleans images of each noise id. `beside`: models by label.
        `elsewhere`: noise of the pairs where it, or their size, is not what the model knows."""
        self.trained, self.baselines, self.beside = trained, baselines, beside
        self.elsewhere = elsewhere
        self.ids = sorted(pairs.ids)
        self.rows = np.arange(len(pairs))
        self.pairs, self.clean = pairs, pairs.take(self.rows, 0)
        self.hashes = np.array([hash64(name) for name in self.ids], np.uint64)
        self.scores: dict[Row, Scores] = {}

    def run(self) -> dict[Row, Scores]:
        """By row of the table: PSNR, SSIM, seconds per image, which rows they are of, and the view
        counts found, if any."""
        for case in self.cases() if self.elsewhere is None else self.cases_elsewhere():
            for method in METHODS.values():
                if case.task in method.tasks and not (case.elsewhere and method.own):
                    self.score(method, case)
        return self.scores

    def cases(self) -> Iterator[Case]:
        """What the methods are compared on."""
        clean, noise = self.clean, self.trained.config.noise
        nothing = np.zeros(len(clean), np.int64)
        yield Case("make", self.ids, clean, clean, nothing)
        for noise_id, spec in enumerate(noise_specs(noise), start=1):
            noisy, known = self.pairs.take(self.rows, noise_id), np.full(len(clean), noise_id)
            fitted = {key: restore[noise_id - 1] for key, restore in self.baselines.items()}
            case = Case("remove", self.ids, clean, noisy, known, spec, fitted=fitted)
            yield case
            yield dataclasses.replace(case, task="make")
            for task in ("remove_grainy", "remove_stored"):
                yield dataclasses.replace(case, task=task, noisy=as_seen(task, noisy, self.ids))
        for views in UNSEEN_VIEWS:
            seen = self.trained.has_seen(views, max(clean.shape[2:]))
            if not seen and self.trained.config.images.crop is None:
                spec = noise_specs(dataclasses.replace(noise, n_views=(views,)))[0]
                noisy = noise_operator(spec, *clean.shape[2:])(clean, photon_seeds(self.ids))
                # Nobody says which of the known noise ids comes nearest: the noise code does.
                nearest = detect(self.trained.model, self.trained.codes, noisy)
                yield Case("remove_unseen", self.ids, clean, noisy, nearest, spec)

    def cases_elsewhere(self) -> Iterator[Case]:
        """The same at other sizes and view counts, where the model has no noise id to be told."""
        assert self.elsewhere is not None
        trained = self.trained
        for noise_id, spec in enumerate(noise_specs(self.elsewhere), start=1):
            exact = self.pairs.take(self.rows, noise_id)
            fitted = {key: restore[noise_id - 1] for key, restore in self.baselines.items()}
            for task in ("remove", "remove_grainy", "remove_stored"):
                noisy = as_seen(task, exact, self.ids)
                nearest = detect(trained.model, trained.codes, noisy)
                case = Case(task, self.ids, self.clean, noisy, nearest, spec, True, fitted=fitted)
                if trained.model.unrolls:
                    since = time.perf_counter()
                    found = self.find(noisy)
                    finding = (time.perf_counter() - since) / len(noisy)
                    case = dataclasses.replace(case, found=found, finding=finding)
                yield case

    def find(self, noisy: Array) -> Labels:
        """View counts of noisy images [B, C, H, W], each found by itself: [B]. Those of a model of
        a range as `snr denoise` finds them, 0 of an image that its noise code takes for clean."""
        trained, code = self.trained, self.trained.codes.mean(0)
        found = views_of_range(trained.model, code, noisy, trained.geometry)
        if found is not None:
            return found
        explains = explaining(trained.model, code, noisy, trained.geometry)
        over = trained.config.noise.angle_range
        return find_views(noisy, explains, trained.guess_views(noisy), angle_range=over)

    def score(self, method: Method, case: Case) -> None:
        """Add the rows of a method: of the model in question, and of those beside it."""
        which = self.hashes % np.uint64(method.every) == 0
        if not which.any():
            return
        if method.every > 1:
            case = case.take(which)
        models: dict[str, Any] = {"": self.trained}
        if method.beside:
            models |= self.beside
        for label, model in models.items():
            kind = method.model or TrainedModel
            if not isinstance(model, kind) or not method.when(case, model):
                continue
            since = time.perf_counter()
            image = method.run(case, model)
            seconds = 0.0 if method.given else (time.perf_counter() - since) / len(image)
            seconds += case.finding if method.finds else 0.0
            truth, clip = method.against(case, model), method.clip
            found = case.found if method.finds else None
            self.scores[Row(case.task, method.key, case.n_views, label)] = Scores(
                psnr(image, truth, clip=clip), ssim(image, truth, clip=clip), seconds, which, found
            )
