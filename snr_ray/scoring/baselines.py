"""What a user would try first: total variation and SART.

They take images [B, C, H, W] and work on each channel by itself.
"""

import numpy as np
import numpy.typing as npt
from skimage.restoration import denoise_tv_chambolle
from skimage.transform import iradon_sart

from snr_ray.metrics import psnr
from snr_ray.noise.operator import RadonNoise

Array = npt.NDArray[np.float32]

TV_WEIGHTS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
SART_ITERATIONS = 10
SART_RELAXATION = 0.3


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
