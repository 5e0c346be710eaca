"""What a user would try first: total variation, SART, the best linear inverse of the operator.

They take images [B, C, H, W] and work on each channel by itself.
"""

import numpy as np
import numpy.typing as npt
from skimage.restoration import denoise_tv_chambolle
from skimage.transform import iradon_sart

from snr_ray.config import InputError
from snr_ray.metrics import psnr
from snr_ray.radon import RadonNoise

Array = npt.NDArray[np.float32]

TV_WEIGHTS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
SART_ITERATIONS = 10
SART_RELAXATION = 0.3
FIT_IMAGES = 8000
"""Training images behind the mean and covariance of the linear MMSE estimate."""
LMMSE_PIXELS = 64 * 64
"""Above this the covariance no longer fits in memory."""
LMMSE_VARIANCE = 1e-6
"""Variance r of the white noise assumed on the noisy image: 0.001 of the range. There is none in
the simulation, so smaller is better without end; this much any stored image has."""


def tv(noisy: Array, weight: float) -> Array:
    """Total-variation denoising by Chambolle's algorithm; `weight` is the smoothing strength."""
    return np.stack(
        [denoise_tv_chambolle(image, weight=weight, channel_axis=0) for image in noisy]
    ).astype(np.float32)


def best_tv_weight(noisy: Array, clean: Array) -> float:
    """The weight of the fixed grid with the highest mean PSNR; for images not scored later."""
    return max(TV_WEIGHTS, key=lambda weight: float(psnr(tv(noisy, weight), clean).mean()))


def sart(clean: Array, noise: RadonNoise) -> Array:
    """Reconstruction from the sinogram itself by SART, the usual iterative method: [B, C, H, W].

    Unlike all others it does not start from the noisy image but measures `clean` [B, C, H, W].
    Source: Andersen and Kak, Simultaneous algebraic reconstruction technique, Ultrasonic Imaging 6
    (1984); scikit-image's, SART_ITERATIONS passes over the views.
    """
    sinograms = noise.project(clean).astype(np.float64)  # [B, C, N, A]
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


class Lmmse:
    """Linear minimum-mean-square-error estimate of the clean image from one noise operator A.

        x_hat = mean + C A^T (A C A^T + R)^-1 (y - A mean)

    with mean and covariance C of clean training images, and covariance R of what A leaves
    unexplained. It knows A, so it is not blind.
    Source: Kay, Fundamentals of Statistical Signal Processing: Estimation Theory (1993), 12.5.
    """

    def __init__(self, clean: Array, noise: RadonNoise) -> None:
        n_pixels = noise.height * noise.width
        if n_pixels > LMMSE_PIXELS:
            raise InputError(
                f"The linear MMSE estimate handles at most {LMMSE_PIXELS} pixels per image, but "
                f"got {noise.height}x{noise.width}; leave lmmse out of --baselines."
            )
        x = clean.reshape(-1, n_pixels).astype(np.float64)
        mean, covariance = x.mean(0), np.cov(x, rowvar=False)
        a = noise.matrix().astype(np.float64)
        cross = covariance @ a.T  # C A^T
        inner = a @ cross + LMMSE_VARIANCE * np.eye(n_pixels)
        if noise.spec.photons:  # their noise on the image, measured
            inner += np.cov(noise(clean).reshape(x.shape) - x @ a.T, rowvar=False)
        gain = np.linalg.solve(inner, cross.T).T  # [H*W, H*W]
        self.gain, self.mean, self.offset = (
            part.astype(np.float32) for part in (gain, mean, a @ mean)
        )

    def __call__(self, noisy: Array) -> Array:
        """Estimates [B, C, H, W] float32 of the clean images, not clipped."""
        y = noisy.reshape(-1, self.mean.size)
        return ((y - self.offset) @ self.gain.T + self.mean).reshape(noisy.shape)
