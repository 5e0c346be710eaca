"""The front door for Python: arrays in, arrays out, without Ray, files or a command line.

import snr_ray
model = snr_ray.load_model("places64")
noisy = snr_ray.add_noise(clean, 20)
again = snr_ray.denoise(noisy, model, n_views=20)
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from snr_ray.errors import InputError, check
from snr_ray.learning.checkpoint import TrainedModel, load_model
from snr_ray.network.swap import detect, swap
from snr_ray.network.views import views_of_range
from snr_ray.noise.operator import NoiseSpec, noise_operator

__all__ = ["NoiseSpec", "add_noise", "denoise", "load_model"]

Array = npt.NDArray[np.float32]

PASS_PIXELS = 2**20
"""Pixels that go through the network together; bounds memory whatever the number of images."""
DARKEST, BRIGHTEST = -0.5, 2.0
"""Noise keeps the mean of an image: one beyond these has its black or white elsewhere."""
STRONGEST = 0.25
"""So has one whose standard deviation is more than this for each pixel of its longer side: the
noise of a single view comes to half of that."""


def add_noise(images: npt.NDArray[np.floating], noise: int | NoiseSpec) -> Array:
    """Filtered back projections of few views: what a sparse-view scan makes of clean images.

    Args:
        images: [..., H, W] float in [0, 1], at least 4 pixels high and wide; leading axes are
            independent.
        noise: a view count, spread over 180 degrees, or a NoiseSpec with filter, angles, photons.

    Returns:
        [..., H, W] float32, not clipped.

    Raises:
        InputError: if images are integers, masked, too small, or hold NaN or infinity, for a view
            count below 1 or above 4 per pixel of the longer side, and for images far beyond [0, 1]
            of which photons are counted.
    """
    _check_array(images)
    check(images.ndim >= 2, f"Images must be [..., H, W], but got {list(images.shape)}.")
    spec = noise if isinstance(noise, NoiseSpec) else NoiseSpec(noise)
    return noise_operator(spec, images.shape[-2], images.shape[-1])(images)


def denoise(
    images: npt.NDArray[np.floating],
    model: TrainedModel | str | Path,
    *,
    n_views: int | None = None,
) -> Array:
    """Clean versions of noisy images: the noise code of each replaced by the mean clean one.

    Args:
        images: [H, W], [C, H, W] or [B, C, H, W] float, white at 1, C = 1 (grey) or 3 (RGB);
            not clipped. A grey model takes RGB channel by channel, an RGB model answers to grey
            images with the mean of its channels.
        model: what `load_model` gives, on any device, or a name or folder for it.
        n_views: how many views the images have; None leaves it to the noise code of each, and a
            model of a range of counts, such as `any`, finds it for each image by itself.

    Returns:
        The shape of `images`, float32, clipped to [0, 1].

    Raises:
        InputError: for images of another shape, of integers or masked, with NaN or infinity, with
            black or white elsewhere than at 0 and 1, or a view count that the model cannot be told.
    """
    _check_array(images)
    shape = images.shape
    batch = images[None] if images.ndim == 3 else images[None, None] if images.ndim == 2 else images
    if batch.ndim != 4 or batch.shape[1] not in (1, 3):
        raise InputError(
            "Images must be [H, W], [C, H, W] or [B, C, H, W] with 1 or 3 channels C, but got "
            f"{list(shape)}; a stack of grey images is images[:, None]."
        )
    check(
        min(batch.shape[2:]) > 0,
        f"Images must have pixels, but got {list(shape)}; only the number of images may be 0.",
    )
    check(
        np.issubdtype(images.dtype, np.floating),
        f"Images must be float with white at 1, but got {images.dtype}; divide by the value that "
        "means white.",
    )
    check(bool(np.isfinite(images).all()), "Images must be finite, but some hold NaN or infinity.")
    _check_range(batch)
    trained = model if isinstance(model, TrainedModel) else load_model(model)
    physics = trained.config.model.physics
    check(
        n_views is None or trained.can_be_told,
        "n_views tells a model with model.physics or model.unrolled how many views its images "
        "have, but this one is blind; leave it out.",
    )
    check(
        n_views is None or (isinstance(n_views, (int, np.integer)) and n_views is not True),
        f"n_views must be a whole number of views, but got {n_views!r}.",
    )
    geometry = None if n_views is None else trained.geometry(n_views)
    known = trained.noise_id(n_views) if physics and n_views is not None else None
    batch = np.ascontiguousarray(batch, np.float32)
    out, code = np.empty_like(batch), trained.codes.mean(0)
    step = max(1, PASS_PIXELS // int(np.prod(batch.shape[1:])))
    for start in range(0, len(batch), step):
        part = batch[start : start + step]
        ids = None
        if physics:
            own = known is None
            ids = detect(trained.model, trained.codes, part) if own else np.full(len(part), known)
        found = None
        with trained.arithmetic():
            if n_views is None:
                found = views_of_range(trained.model, code, part, trained.geometry)
            out[start : start + step] = swap(
                trained.model, part, code, noise_ids=ids, geometry=geometry, told=found
            )
    return np.clip(out, 0, 1).reshape(shape)


def _check_array(images: object) -> None:
    check(
        isinstance(images, np.ndarray),
        f"Images must be a NumPy array, but got {type(images).__name__}; give numpy.asarray(...).",
    )
    check(
        not isinstance(images, np.ma.MaskedArray),
        "Images must have a value at every pixel, but these are masked; give images.filled(VALUE).",
    )


def _check_range(batch: npt.NDArray[np.floating]) -> None:
    """Raise InputError for one of images [B, C, H, W] that cannot be noise of one in [0, 1]."""
    strongest = STRONGEST * max(batch.shape[2:])
    for place, image in enumerate(batch):
        with np.errstate(over="ignore"):
            mean, strength = (float(of(image, dtype=np.float64)) for of in (np.mean, np.std))
        check(
            DARKEST < mean < BRIGHTEST and strength < strongest,
            f"Images must have black at 0 and white at 1, but image {place} has a mean of "
            f"{mean:.3g} and a standard deviation of {strength:.3g}; scale them first (8-bit "
            "pixels / 255, Hounsfield units as (x + 1000) / 2000).",
        )
