"""What a user would try first: total variation, SART, the linear estimate; how each is fitted.

They take images [B, C, H, W].
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from skimage.restoration import denoise_tv_chambolle
from skimage.transform import iradon_sart

from snr_ray.learning.batches import Pairs
from snr_ray.metrics import psnr
from snr_ray.noise.lmmse import ImagePrior, Lmmse
from snr_ray.noise.operator import NoiseSpec, RadonNoise, noise_operator
from snr_ray.noise.spec import photon_seeds
from snr_ray.scoring.cases import Case, Restore, as_seen
from snr_ray.scoring.variational import reconstruct

Array = npt.NDArray[np.float32]

TVREC_WEIGHTS = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1)
TVREC_IMAGES = 12
"""Validation images that choose between these."""
TVREC_TASKS = ("remove", "remove_grainy", "remove_stored")
TV_WEIGHTS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
SART_ITERATIONS = 10
SART_RELAXATION = 0.3


class Fitting:
    """Images that baselines are fitted on, each set read when it is first asked for."""

    def __init__(
        self, specs: list[NoiseSpec], val: Callable[[], Pairs], train: Callable[[], Pairs]
    ) -> None:
        """`specs`: of the noise ids, 1 first. `val` and `train`: read pairs of a split."""
        self.specs, self._val, self._train = specs, val, train

    @functools.cached_property
    def val(self) -> Pairs:
        """Validation images, which choose weights."""
        return self._val()

    @functools.cached_property
    def prior(self) -> ImagePrior:
        """What the linear estimate learns of training images."""
        train = self._train()
        return ImagePrior(train.take(np.arange(len(train)), 0))

    def pair(
        self, noise_id: int, task: str = "remove", limit: int | None = None
    ) -> tuple[Array, Array]:
        """Noisy and clean validation images of a noise id as a task has them, [B, C, H, W] each."""
        rows = self.val.sample(len(self.val) if limit is None else limit)
        noisy = as_seen(task, self.val.take(rows, noise_id), self.val.names(rows))
        return noisy, self.val.take(rows, 0)


def fit_tv(fitting: Fitting, noise_id: int) -> Restore:
    """Total variation of the best weight."""
    return functools.partial(_tv, best_tv_weight(*fitting.pair(noise_id)))


def _tv(weight: float, case: Case) -> Array:
    return tv(case.noisy, weight)


def fit_tvrec(fitting: Fitting, noise_id: int) -> Restore:
    """Total variation reconstruction, with the best weight for each kind of input."""
    spec = fitting.specs[noise_id - 1]
    weights = {
        task: best_tvrec_weight(*fitting.pair(noise_id, task, TVREC_IMAGES), spec)
        for task in TVREC_TASKS
    }
    return functools.partial(_tvrec, spec, weights)


def _tvrec(spec: NoiseSpec, weights: dict[str, float], case: Case) -> Array:
    return reconstruct(case.noisy, spec, weights[case.task])


def fit_lmmse(fitting: Fitting, noise_id: int) -> Restore:
    """The linear estimate."""
    side = fitting.prior.images.shape[2]
    lmmse = Lmmse(fitting.prior, noise_operator(fitting.specs[noise_id - 1], side, side))
    return functools.partial(_lmmse, lmmse)


def _lmmse(lmmse: Lmmse, case: Case) -> Array:
    return lmmse(case.noisy)


def fit_sart(fitting: Fitting, noise_id: int) -> Restore:
    """SART, which has nothing to fit."""
    return functools.partial(_sart, fitting.specs[noise_id - 1])


def _sart(spec: NoiseSpec, case: Case) -> Array:
    noise = noise_operator(spec, *case.clean.shape[2:])
    return sart(case.clean, noise, photon_seeds(case.names))


def tv(noisy: Array, weight: float) -> Array:
    """Total-variation denoising by Chambolle's algorithm; `weight` is the smoothing strength."""
    return np.stack(
        [denoise_tv_chambolle(image, weight=weight, channel_axis=0) for image in noisy]
    ).astype(np.float32)


def best_tv_weight(noisy: Array, clean: Array) -> float:
    """The weight of the fixed grid with the highest mean PSNR; for images not scored later."""
    return max(TV_WEIGHTS, key=lambda weight: float(psnr(tv(noisy, weight), clean).mean()))


def best_tvrec_weight(noisy: Array, clean: Array, spec: NoiseSpec) -> float:
    """The weight of the fixed grid, from its middle uphill, with the highest mean PSNR."""
    reached: dict[int, float] = {}

    def decibels(k: int) -> float:
        if k not in range(len(TVREC_WEIGHTS)):
            return -np.inf
        if k not in reached:
            image = reconstruct(noisy, spec, TVREC_WEIGHTS[k])
            reached[k] = float(psnr(image, clean).mean())
        return reached[k]

    best = len(TVREC_WEIGHTS) // 2
    while decibels(other := max(best - 1, best + 1, key=decibels)) > decibels(best):
        best = other
    return TVREC_WEIGHTS[best]


def sart(clean: Array, noise: RadonNoise, seeds: Sequence[int] | None = None) -> Array:
    """Reconstruction from the sinogram itself by SART, the usual iterative method: [B, C, H, W].

    Unlike all others it does not start from the noisy image but measures `clean` [B, C, H, W],
    photons and all, by one seed an image.
    Source: Andersen and Kak, Simultaneous algebraic reconstruction technique, Ultrasonic Imaging 6
    (1984); scikit-image's, SART_ITERATIONS passes over the views.
    """
    sinograms = noise.project(clean, seeds).astype(np.float64)  # [B, C, N, A]
    flat = sinograms.reshape(-1, *sinograms.shape[2:])
    top, left = noise.n_bins // 2 - noise.height // 2, noise.n_bins // 2 - noise.width // 2
    out = np.empty((len(flat), noise.height, noise.width), np.float32)
    for k, sinogram in enumerate(flat):
        image = None
        for _ in range(SART_ITERATIONS):
            image = iradon_sart(
                sinogram, theta=noise.spec.theta, image=image, relaxation=SART_RELAXATION
            )
        out[k] = image[top : top + noise.height, left : left + noise.width]  # type: ignore[index]
    return out.reshape(clean.shape)
