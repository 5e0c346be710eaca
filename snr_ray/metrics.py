"""Image quality against the clean image: PSNR and SSIM, per image, data_range 1, clipped first."""

import numpy as np
import numpy.typing as npt
from skimage.metrics import structural_similarity

Array = npt.NDArray[np.float32]
Scores = npt.NDArray[np.float64]


def psnr(images: Array, truth: Array, *, clip: bool = True) -> Scores:
    """Peak signal-to-noise ratio in dB of [B, C, H, W] images, each on its own: [B].

    10 log10(1 / MSE), data_range 1. `clip` cuts the images to [0, 1] first; injected images are
    scored unclipped, because noise leaves that range. Equal images score infinity.
    """
    clipped = np.clip(images, 0, 1) if clip else images
    error = np.mean(np.square(clipped - truth, dtype=np.float64), axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return -10 * np.log10(error)


def ssim(images: Array, truth: Array, *, clip: bool = True) -> Scores:
    """Structural similarity of [B, C, H, W] images: [B]; scikit-image's, 7x7 uniform window.

    Source: Wang et al., Image quality assessment: from error visibility to structural similarity,
    IEEE Transactions on Image Processing 13(4), 2004.
    """
    clipped = np.clip(images, 0, 1) if clip else images
    return np.array(
        [
            structural_similarity(image, target, data_range=1.0, channel_axis=0)
            for image, target in zip(clipped, truth, strict=True)
        ]
    )
