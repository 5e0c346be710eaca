"""The linear MMSE estimate of clean images: the strongest baseline where the operator is known.

clean training images --covariance--> ImagePrior --one noise operator--> Lmmse, a matrix
"""

import numpy as np
import numpy.typing as npt

from snr_ray.errors import InputError
from snr_ray.noise.operator import RadonNoise

Array = npt.NDArray[np.float32]
Array64 = npt.NDArray[np.float64]

FIT_IMAGES = 8000
"""Training images behind the mean and covariance of the linear MMSE estimate."""
HELD_OUT = 8
"""Every so many of them choose the weight of the stationary covariance."""
STATIONARY_WEIGHTS = (0.0, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.95)
LMMSE_PIXELS = 64 * 64
"""Above this the covariance no longer fits in memory."""
LMMSE_VARIANCE = 1e-6
"""Variance r of the white noise assumed on the images: 0.001 of the range. There is none in the
simulation, so smaller is better without end; this much any stored image has."""


class ImagePrior:
    """Mean and covariance of clean images: what the linear MMSE estimate knows of them.

        C = (1 - w) S + w T

    The sample covariance S of a few thousand images fits just these, where an image has as many
    pixels. T knows covariances by displacement alone, as if images looked the same everywhere,
    which photographs nearly do and letters do not. w is the weight under which images held out are
    the most likely.
    Source: Ledoit and Wolf, A well-conditioned estimator for large-dimensional covariance matrices
    (2004), for shrinkage; the target and the choice of w are ours.
    """

    def __init__(self, clean: Array) -> None:
        """`clean`: training images [B, C, H, W]; channels count as images.

        Raises:
            InputError: if images have more than LMMSE_PIXELS pixels.
        """
        height, width = clean.shape[2:]
        if height * width > LMMSE_PIXELS:
            raise InputError(
                f"The linear MMSE estimate handles at most {LMMSE_PIXELS} pixels per image, but "
                f"got {height}x{width}; leave lmmse out of --baselines."
            )
        self.images = clean
        x = clean.reshape(-1, height, width).astype(np.float64)
        self.weight = _best_weight(x)
        self.mean = x.mean(0).ravel()
        """[H*W] float64"""
        self.covariance = _mixture(x, self.weight)
        """[H*W, H*W] float64"""


def _best_weight(x: Array64) -> float:
    """The weight of the grid under which every HELD_OUT-th of images [B, H, W] is most likely."""
    # Slow to import, and whoever only has a model does without.
    from scipy.linalg import LinAlgError, cholesky, solve_triangular

    held = np.arange(len(x)) % HELD_OUT == 0
    if held.all():
        return STATIONARY_WEIGHTS[-1]
    seen, unseen = x[~held], (x[held] - x[~held].mean(0)).reshape(held.sum(), -1)
    sample, stationary = _sample(seen), _stationary(seen)
    noise = LMMSE_VARIANCE * np.eye(len(sample))

    def likelihood(weight: float) -> float:
        try:
            root = cholesky((1 - weight) * sample + weight * stationary + noise, lower=True)
        except LinAlgError:  # not a covariance
            return -np.inf
        white = solve_triangular(root, unseen.T, lower=True)
        return float(-np.log(root.diagonal()).sum() - 0.5 * np.square(white).sum(0).mean())

    return max(STATIONARY_WEIGHTS, key=likelihood)


def _mixture(x: Array64, weight: float) -> Array64:
    mixed = (1 - weight) * _sample(x)
    return mixed + weight * _stationary(x) if weight else mixed


def _sample(x: Array64) -> Array64:
    """Sample covariance of images [B, H, W]: [H*W, H*W]; of a single one, zero."""
    flat = x.reshape(len(x), -1)
    centred = flat - flat.mean(0)
    return centred.T @ centred / max(1, len(x) - 1)


def _stationary(x: Array64) -> Array64:
    """Covariance of images [B, H, W] as a function of displacement: [H*W, H*W].

    The mean of the product of all pairs of pixels of one displacement, by way of the spectrum of
    the images with as many zeros around them. It can have directions of negative variance: a
    mixture that still has them is no covariance, and no images are likely under it.
    """
    height, width = x.shape[1:]
    shape = (2 * height, 2 * width)
    power, mean = np.zeros(shape), x.mean(0)
    for start in range(0, len(x), 256):
        power += np.square(np.abs(np.fft.fft2(x[start : start + 256] - mean, shape))).sum(0)
    pairs = np.fft.ifft2(np.square(np.abs(np.fft.fft2(np.ones_like(mean), shape)))).real
    products = np.fft.ifft2(power).real / len(x)
    by_displacement = products / np.maximum(pairs, 1)
    row, column = (index.ravel() for index in np.indices((height, width)))
    return by_displacement[row[:, None] - row, column[:, None] - column]


class Lmmse:
    """Linear minimum-mean-square-error estimate of the clean image from one noise operator A.

        x_hat = mean + C A^T (A C A^T + R)^-1 (y - A mean)

    with mean and covariance C of clean training images, and covariance R of what A leaves
    unexplained. It knows A, so it is not blind.
    Source: Kay, Fundamentals of Statistical Signal Processing: Estimation Theory (1993), 12.5.
    """

    def __init__(self, prior: ImagePrior, noise: RadonNoise) -> None:
        a = noise.matrix().astype(np.float64)
        cross = prior.covariance @ a.T  # C A^T
        inner = a @ cross + LMMSE_VARIANCE * np.eye(len(a))
        if noise.spec.photons:  # their noise on the image, measured
            x = prior.images.reshape(-1, len(a))
            left = noise(prior.images).reshape(x.shape) - x @ a.T
            if len(left) > 1:  # of a single one, zero, as of its sample covariance
                inner += np.cov(left, rowvar=False)
        gain = np.linalg.solve(inner, cross.T).T  # [H*W, H*W]
        self.gain, self.mean, self.offset = (
            part.astype(np.float32) for part in (gain, prior.mean, a @ prior.mean)
        )

    def __call__(self, noisy: Array) -> Array:
        """Estimates [B, C, H, W] float32 of the clean images, not clipped."""
        y = noisy.reshape(-1, self.mean.size)
        return ((y - self.offset) @ self.gain.T + self.mean).reshape(noisy.shape)
