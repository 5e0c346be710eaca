"""Image quality against the clean image: PSNR and SSIM, per image, data_range 1, clipped first."""

import json
import math
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Scores = npt.NDArray[np.float64]

MOST_DB = 100.0
"""An error of 1e-5 of the range: where values of 32 bits are as good as equal."""


def psnr(images: Array, truth: Array, *, clip: bool = True) -> Scores:
    """Peak signal-to-noise ratio in dB of [B, C, H, W] images, each on its own: [B].

    10 log10(1 / MSE), data_range 1, at most MOST_DB: equal images, such as black ones, would be
    infinitely good, and with them any mean they are in. `clip` cuts the images to [0, 1] first;
    injected images are scored unclipped, because noise leaves that range.
    """
    clipped = np.clip(images, 0, 1) if clip else images
    error = np.mean(np.square(clipped - truth, dtype=np.float64), axis=(1, 2, 3))
    return -10 * np.log10(np.maximum(error, 10 ** (-MOST_DB / 10)))


def ssim(images: Array, truth: Array, *, clip: bool = True) -> Scores:
    """Structural similarity of [B, C, H, W] images: [B]; scikit-image's, 7x7 uniform window.

    Source: Wang et al., Image quality assessment: from error visibility to structural similarity,
    IEEE Transactions on Image Processing 13(4), 2004.
    """
    from skimage.metrics import structural_similarity  # slow to import, and most do without

    clipped = np.clip(images, 0, 1) if clip else images
    return np.array(
        [
            structural_similarity(image, target, data_range=1.0, channel_axis=0)
            for image, target in zip(clipped, truth, strict=True)
        ]
    )


def as_json(value: Any, *, indent: int | None = None) -> str:
    """JSON of dictionaries, lists, tuples and numbers; numbers that are not finite, which JSON does
    not have, are null."""

    def finite(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: finite(inner) for key, inner in part.items()}
        if isinstance(part, list | tuple):
            return [finite(inner) for inner in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(finite(value), indent=indent, allow_nan=False)
