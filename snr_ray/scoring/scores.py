"""Every method on one block of clean and noisy images: PSNR and SSIM of each image.

What is compared with what is decided here; `evaluate` runs it on every block of a test split.
Runs without Ray.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from snr_ray.hashing import hash64
from snr_ray.images.formats import with_channels
from snr_ray.learning.batches import Pairs
from snr_ray.learning.checkpoint import TrainedModel, TrainedUNet
from snr_ray.learning.losses import stored
from snr_ray.metrics import psnr, ssim
from snr_ray.network.hvae import HVAE
from snr_ray.network.swap import detect, swap
from snr_ray.network.unet import regress
from snr_ray.noise.operator import NoiseSpec, noise_operator, noise_specs
from snr_ray.scoring.baselines import sart

Array = npt.NDArray[np.float32]
Restore = Callable[[Array], Array]

BASELINES = ("tv", "sart", "lmmse")
SART_EVERY = 8
"""SART takes hundreds of times as long as the rest; every so many images are enough."""
UNSEEN_VIEWS = (30, 15)
"""View counts to try that no model was trained on."""
EXTRA_SIGMA = 0.01
"""Standard deviation of Gaussian noise added to the noisy image, for the rows about it."""
TASKS = ("remove", "make", "remove_grainy", "remove_stored", "remove_unseen")
"""What is scored. `remove`: cleaned images against clean ones, whose noise is as simulated, with
Gaussian noise on top, as a file of 8 bits holds it, or of an unseen view count. `make`: images
decoded from codes against those that they are meant to give."""
METHODS = ("noisy", "tv", "sart", "lmmse", "unet", "swap", "swap_random", "swap_mirror",
           "swap_detected", "swap_told", "hdn", "recon_clean", "recon", "authority", "inject",
           "no_inject")  # fmt: skip


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


class Scorer:
    """Every method on the pairs of one block."""

    def __init__(
        self,
        trained: TrainedModel,
        baselines: dict[str, list[Restore]],
        beside: dict[str, TrainedModel | TrainedUNet],
        pairs: Pairs,
    ) -> None:
        """`baselines`: by name, what cleans images of each noise id; nothing for SART, which starts
        from the sinogram. `beside`: other models by label."""
        self.trained, self.baselines, self.beside = trained, baselines, beside
        self.ids = sorted(pairs.ids)
        self.rows = np.arange(len(pairs))
        self.pairs, self.clean = pairs, pairs.take(self.rows, 0)
        self.scores: dict[Row, Any] = {}

    def run(self) -> dict[Row, Any]:
        """By row of the table: PSNR, SSIM, seconds per image, and which rows they are of."""
        model, noise = self.trained.model, self.trained.config.noise
        self.score(Row("make", "recon_clean", 0), lambda: swap(model, self.clean, None), self.clean)
        for noise_id, spec in enumerate(noise_specs(noise), start=1):
            self.noise_level(noise_id, spec)
        for views in UNSEEN_VIEWS:
            if views not in noise.n_views and self.trained.config.images.crop is None:
                spec = noise_specs(dataclasses.replace(noise, n_views=(views,)))[0]
                noisy = noise_operator(spec, *self.clean.shape[2:])(self.clean)
                # Nobody says which of the known noise ids comes nearest: the noise code does.
                ids = detect(model, self.trained.codes, noisy)
                self.removal("remove_unseen", noisy, views, ids)
                if (geometry := self.trained.geometry(views)) is not None:
                    told = functools.partial(
                        swap,
                        model,
                        noisy,
                        self.trained.codes.mean(0),
                        noise_ids=ids,
                        geometry=geometry,
                    )
                    self.score(Row("remove_unseen", "swap_told", views), told, self.clean)
        return self.scores

    def noise_level(self, noise_id: int, spec: NoiseSpec) -> None:
        """Every method on one of the model's noise ids."""
        model, codes = self.trained.model, self.trained.codes
        views, noisy = spec.n_views, self.pairs.take(self.rows, noise_id)
        ids = np.full(len(noisy), noise_id)
        self.removal("remove", noisy, views, ids)
        donors = codes.pick(0, np.array([hash64(name) % codes.n_donors for name in self.ids]))
        cleaned: dict[str, Callable[[], Array]] = {
            "swap_random": lambda: swap(model, noisy, donors, noise_ids=ids),
            "swap_mirror": lambda: self.mirrored(noisy, ids),
            "hdn": lambda: swap(model, noisy, None, noise_ids=ids, prior_levels=1),
        }
        if self.trained.config.model.physics:
            cleaned["swap_detected"] = lambda: swap(
                model, noisy, codes.mean(0), noise_ids=detect(model, codes, noisy)
            )
        for method, restore in cleaned.items():
            self.score(Row("remove", method, views), restore, self.clean)
        made: dict[Row, Callable[[], Array]] = {
            Row("make", "recon", views): lambda: swap(model, noisy, None, noise_ids=ids),
            Row("make", "inject", views): lambda: swap(model, self.clean, codes.mean(noise_id)),
            Row("make", "no_inject", views): lambda: self.clean,
        }
        for label, other in self.beside.items():
            if isinstance(other, TrainedModel):
                made[Row("make", "inject", views, label)] = functools.partial(
                    swap, other.model, self.clean, other.codes.mean(noise_id)
                )
        for row, make in made.items():
            self.score(row, make, noisy, clip=False)
        for label, other in {"": self.trained, **self.beside}.items():
            if isinstance(other, TrainedModel):
                row = Row("make", "authority", views, label)
                exchange = functools.partial(exchanged, other.model, noisy, ids)
                others = with_channels(noisy, other.model.channels)[::-1]
                self.score(row, exchange, others, clip=False)
        some = np.array([hash64(name) % SART_EVERY == 0 for name in self.ids])
        if "sart" in self.baselines and some.any():
            operator, measured = noise_operator(spec, *noisy.shape[2:]), self.clean[some]
            row = Row("remove", "sart", views)
            self.score(row, lambda: sart(measured, operator), measured, which=some)
        grain = np.random.default_rng([hash64(name) for name in self.ids])
        grainy = noisy + EXTRA_SIGMA * grain.standard_normal(noisy.shape, np.float32)
        self.removal("remove_grainy", grainy, views, ids)
        self.removal("remove_stored", stored(torch.from_numpy(noisy)).numpy(), views, ids)

    def removal(self, task: str, noisy: Array, views: int, ids: npt.NDArray[np.int64]) -> None:
        """The methods that are compared on noise of every kind."""
        model, codes = self.trained.model, self.trained.codes
        methods: dict[Row, Callable[[], Array]] = {
            Row(task, "noisy", views): lambda: noisy,
            Row(task, "swap", views): lambda: swap(model, noisy, codes.mean(0), noise_ids=ids),
        }
        if task != "remove_unseen":  # these are fitted to a view count
            for name, restore in self.baselines.items():
                if restore:
                    fitted = restore[ids[0] - 1]
                    methods[Row(task, name, views)] = functools.partial(fitted, noisy)
        for label, other in self.beside.items():
            if isinstance(other, TrainedUNet):
                regression = functools.partial(regress, other.model, noisy, ids)
                methods[Row(task, "unet", views, label)] = regression
            else:
                exchange = functools.partial(
                    swap, other.model, noisy, other.codes.mean(0), noise_ids=ids
                )
                methods[Row(task, "swap", views, label)] = exchange
        for row, clean in methods.items():
            self.score(row, clean, self.clean)

    def mirrored(self, noisy: Array, ids: npt.NDArray[np.int64]) -> Array:
        """Mean of the swap over the image and its mirror image at the diagonal, mirrored back.

        That turns a projection into one of the same scan where n_views is even. Mirrored left to
        right, the centre of rotation of an even number of pixels moves by one, and so the noise is
        another.
        """
        model, codes = self.trained.model, self.trained.codes.mean(0)
        other = swap(model, noisy.swapaxes(2, 3), codes, noise_ids=ids).swapaxes(2, 3)
        return 0.5 * (swap(model, noisy, codes, noise_ids=ids) + other)

    def score(
        self,
        row: Row,
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
        self.scores[row] = (
            psnr(image, truth, clip=clip), ssim(image, truth, clip=clip), seconds, which
        )  # fmt: skip


@torch.inference_mode()
def exchanged(model: HVAE, noisy: Array, ids: npt.NDArray[np.int64]) -> Array:
    """All codes of image n - 1 - i decoded in the place of image i: [B, C, H, W]."""
    x = torch.from_numpy(with_channels(noisy, model.channels))
    codes = model(x, noise_ids=torch.from_numpy(ids)).codes
    codes.content = [level.flip(0) for level in codes.content]
    codes.noise = [level.flip(0) for level in codes.noise]
    return model.decode(codes).numpy()
