"""Numbers as files store them <-> float32 images [C, H, W], white at 1; what a run wants of them.

8-bit pixels are divided by 255, packed ones by the largest number of their bits. 16-bit and float
pixels have no agreed white: images.white says it, or images.window what means black and white, as
Hounsfield units need it. Numbers whose meaning is not known raise an InputError that says so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from snr_ray.config import ImagesConfig
from snr_ray.errors import InputError

Array = npt.NDArray[np.float32]
Values = npt.NDArray[Any]
Span = tuple[float, float]
"""Stored values that mean 0 and 1."""

LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as Pillow and scikit-image
BELOW_BLACK = -0.1
"""Mean, in units of white, below which 0 cannot be black. Back projection keeps the mean of an
image, so that noise, however strong, does not bring it there; slices in Hounsfield units lie near
-0.5."""

UNIT, FAR = 2.0, 200.0
"""Float pixels with white at 1 stay below UNIT, with their noise; where white is said to be FAR or
more, models take such for next to nothing and ruin them. Whole numbers may be that small: the end
of a volume is nearly empty."""
AIR = -1000.0
"""Hounsfield units of air: below it there is nothing, and what is read there is noise."""
EDGE = 0.1
"""Share of the window next to each end: a cleaned pixel in it has the more of what lay beyond the
nearer it is to the end."""


@dataclass(frozen=True, slots=True)
class Beyond:
    """What of an image lies outside its window: bone, teeth and metal, or all but soft tissue."""

    places: npt.NDArray[np.int32]
    """In the order of [H, W, C]."""
    values: Array
    """By how much they are above the window, or (negative) below; what is below air is left out."""

    def added_to(self, values: Values, pixels: Array) -> Values:
        """Stored values [H, W, C] with it, where `pixels`, in the same order and white at 1, are at
        that end of the window: noise leaves the window too, and is not to come back."""
        inside = pixels.reshape(-1)[self.places]
        inside = np.where(self.values > 0, inside, 1 - inside)
        share = np.clip((inside - (1 - EDGE)) / EDGE, 0, 1)
        whole = values.reshape(-1)
        whole[self.places] += share * self.values
        return whole.reshape(values.shape)


@dataclass(frozen=True, slots=True)
class Decoded:
    """Pixels [C, H, W] float32 of one image, white at 1; the depth and span they were stored in."""

    pixels: Array
    depth: np.dtype
    span: Span
    beyond: Beyond | None = None
    """Of an image that was cut to a window."""


@dataclass(frozen=True)
class Stored:
    """One picture as its file means it: colours resolved, upright, without alpha."""

    values: Values
    """[H, W], [H, W, 1] or [H, W, 3]."""
    white: float | None = None
    """The value that means white by the file itself; None where it does not say."""
    hounsfield: bool = False
    """Whether the file says that its values are Hounsfield units."""


@dataclass(frozen=True)
class Made:
    """How pixels were made, for formats that say so."""

    job: str = ""
    """What names the job: identifiers of a result follow from it and those of its input."""
    noise: Literal["removed", "injected", "kept"] = "removed"
    """What became of it; kept where no result explained the image."""
    image: str = ""
    """What names the input in the job, where it has no identifier itself."""


@dataclass(frozen=True)
class Contents:
    """What a file holds, and how to write it back."""

    frames: Sequence[Stored]
    write: Callable[[Sequence[Values], Made], bytes]
    """Values of every frame, in the units of `frames`, and how they were made -> bytes of a file of
    the same kind with the metadata kept."""


def scale(
    stored: Stored | Values,
    name: str,
    *,
    white: float | None = None,
    window: Span | None = None,
    tensors: bool = False,
) -> Decoded:
    """Stored values to float32 [C, H, W], white at 1.

    Reconstructions may leave [0, 1]; only clean images must not (see `prepare`).

    Args:
        stored: a picture, or its values alone, [H, W] or [H, W, C].
        name: used in errors.
        white: the stored value that means 1.0, for 16-bit and float pixels.
        window: stored values that mean 0.0 and 1.0, for those of Hounsfield units, and for 16-bit
            and float pixels where there is no white; values outside are cut to it, and kept beside.
        tensors: white is 1 if they are float; integers mean what they do in files.

    Raises:
        InputError: if the values are no image, or their range is not known.
    """
    picture = stored if isinstance(stored, Stored) else Stored(stored)
    values, depth = picture.values, picture.values.dtype
    tensors = tensors and depth.kind == "f"
    if depth.kind not in "buif":
        raise InputError(f"Pixels must be numbers, but {name} holds {depth.name}.")
    if values.ndim == 2:
        values = values[:, :, None]
    if values.ndim != 3 or values.shape[2] not in (1, 3) or 0 in values.shape:
        raise InputError(
            f"An image must be [H, W], [H, W, 1] or [H, W, 3], but {name} is {list(values.shape)}."
        )
    if depth.kind == "b":
        values = values.astype(np.uint8) * 255
    (low, high), cut = _range(picture, name, white, window, tensors)
    beyond = None
    if cut:
        inside = np.clip(values, low, high)
        beyond = _beyond(values, inside, low)
        values = inside - np.float32(low)
    pixels: Array = np.divide(
        values.transpose(2, 0, 1), np.float32(high - low), dtype=np.float32, order="C"
    )
    if depth.kind == "f" and not np.isfinite(pixels).all():
        raise InputError(f"Pixels must be finite, but {name} holds NaN or infinity.")
    if not cut and not tensors and depth.kind in "if" and pixels.mean() < BELOW_BLACK:
        raise InputError(
            f"With images.white, 0 is black, but the mean of {name} is negative "
            f"({pixels.mean() * high:.0f}); for Hounsfield units say which of them mean black and "
            "white, for example --set images.window=[-1000,1000] --set images.white=null."
        )
    return Decoded(pixels, depth, (low, high), beyond)


def check_white(frames: Sequence[Decoded], name: str, white: float) -> None:
    """Raise InputError where a file has white at 1, and images.white, which all share, is far from
    it."""
    brightest = max(float(frame.pixels.max()) for frame in frames)
    asked = all(frame.span == (0.0, white) and frame.depth.kind == "f" for frame in frames)
    if asked and white >= FAR and 0 < brightest * white <= UNIT:
        raise InputError(
            f"images.white={white:g} is to be the value of white, but {name} holds float pixels up "
            f"to {brightest * white:.3g}, as files with white at 1 do; clean those apart, with "
            "images.white=1."
        )


def _beyond(values: Values, inside: Values, low: float) -> Beyond:
    over = np.subtract(values, inside, dtype=np.float32).ravel()
    if low <= AIR:
        over = np.maximum(over, 0)
    places = np.flatnonzero(over).astype(np.int32)
    return Beyond(places, over[places])


def _range(
    picture: Stored, name: str, white: float | None, window: Span | None, tensors: bool
) -> tuple[Span, bool]:
    """The values that mean 0 and 1, and whether those outside are cut. Raises InputError where
    nobody says them."""
    depth = picture.values.dtype
    if tensors:
        return (0.0, 1.0), False
    if picture.white is not None:
        return (0.0, picture.white), False
    if depth.kind == "b" or depth == np.uint8:
        return (0.0, 255.0), False
    if picture.hounsfield and window is None:
        raise InputError(
            f"A CT slice is in Hounsfield units, and {name} is one; say which of them mean black "
            "and white, for example --set images.window=[-1000,1000]."
        )
    if window is not None and (picture.hounsfield or white is None):
        return window, True
    if white is not None:
        return (0.0, white), False
    raise InputError(
        f"{depth.name} pixels have no agreed white, and {name} has them; say which stored value "
        "means 1.0, for example --set images.white=65535, or for Hounsfield units which of them "
        "mean black and white, for example --set images.window=[-1000,1000]."
    )


def stored_values(
    pixels: Array, depth: np.dtype, span: Span | None, *, clip: bool, beyond: Beyond | None = None
) -> Values:
    """The reverse of `scale`: [C, H, W] -> [H, W] or [H, W, 3] of a depth.

    Args:
        pixels: white at 1.
        depth: bool gives uint8.
        span: values that mean 0 and 1; by default 0 and 1, or 255 of integers.
        clip: cut to [0, 1] first. Integers are cut to what their depth can hold in any case.
        beyond: what lay outside the span, if it was a window.
    """
    image = np.ascontiguousarray(np.moveaxis(np.clip(pixels, 0, 1) if clip else pixels, 0, 2))
    low, high = span or (0.0, 1.0 if depth.kind == "f" else 255.0)
    values: Values = image * np.float32(high - low) + np.float32(low)
    if beyond is not None:
        values = beyond.added_to(values, image)
    if depth.kind == "f":
        values = values.astype(depth)
    else:
        whole = np.dtype(np.uint8) if depth.kind == "b" else depth
        values = saturated(values.astype(np.float64), whole)
    return values[:, :, 0] if values.shape[2] == 1 else values


def saturated(values: Values, depth: np.dtype) -> Values:
    """Float values as the nearest integers of a depth, cut to what it holds."""
    limits = np.iinfo(depth)
    with np.errstate(invalid="ignore"):
        whole = np.clip(np.round(values), limits.min, limits.max).astype(depth)
    # The largest of 64 bits is none of the floats: what rounds above it would become the smallest.
    return np.where(values >= float(limits.max), limits.max, whole)


def without_alpha(values: Values, name: str, opaque: float | None = None) -> Values:
    """[H, W, C + 1] without its last channel. Raises InputError if that is not opaque all over."""
    alpha = values[:, :, -1]
    if opaque is None:
        opaque = 1.0 if alpha.dtype.kind == "f" else float(np.iinfo(alpha.dtype.name).max)
    if np.any(alpha != opaque):
        raise InputError(
            f"An image must be opaque, but {name} has transparent pixels; "
            "flatten it on a background first."
        )
    return values[:, :, :-1]


def turn(values: Values, orientation: int) -> Values:
    """Stored rows and columns [H, W, ...] as they are to be seen, by the tag of TIFF and EXIF.

    Source: TIFF 6.0, tag 274: what row 0 and column 0 of the stored pixels are of the picture.
    """
    if orientation in (5, 6, 7, 8):  # what is none of the eight means nothing
        values = values.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        values = values[::-1]
    if orientation in (2, 3, 6, 7):
        values = values[:, ::-1]
    return values


def with_channels(pixels: Array, channels: int) -> Array:
    """[..., C, H, W] as grey (BT.601 luma) or as RGB (grey repeated)."""
    if channels == pixels.shape[-3]:
        return pixels
    if channels == 1:
        return np.einsum("c,...chw->...hw", LUMA, pixels)[..., None, :, :]
    return np.repeat(pixels, channels, axis=-3)


def prepare(pixels: Array, config: ImagesConfig, name: str) -> Array:
    """A clean image [C, H, W] as the run wants it: [channels, size, size] float32 in [0, 1].

    Raises:
        InputError: if pixels leave [0, 1]; with images.fit=crop, if the image is smaller than
            images.size.
    """
    low, high = float(pixels.min()), float(pixels.max())
    if low < 0 or high > 1:
        raise InputError(
            f"Clean pixels must lie between 0 and white, but {name} spans {low:g} to {high:g} "
            "times white; set images.white to the largest stored value."
        )
    pixels = with_channels(pixels, config.channels)
    size, (height, width) = config.size, pixels.shape[1:]
    if config.fit == "crop" and min(height, width) < size:
        raise InputError(
            f"images.fit=crop needs images of at least {size}x{size} pixels, but {name} is "
            f"{height}x{width}; use images.fit=resize."
        )
    if config.fit == "resize" and min(height, width) != size:
        factor = size / min(height, width)
        shape = (max(size, round(width * factor)), max(size, round(height * factor)))
        resized = [
            np.asarray(Image.fromarray(channel).resize(shape, Image.Resampling.BICUBIC))
            for channel in pixels
        ]
        pixels = np.clip(np.stack(resized), 0, 1)  # bicubic overshoots at edges
    top, left = (pixels.shape[1] - size) // 2, (pixels.shape[2] - size) // 2
    return np.ascontiguousarray(pixels[:, top : top + size, left : left + size], np.float32)
