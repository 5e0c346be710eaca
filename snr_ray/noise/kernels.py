"""The noise operator for images that are on a GPU: the loops of `rays` as Triton kernels, weights
computed on the way.

Images are [B, H, W], sinograms [B, A, N], and each image has a view count of its own that the host
does not know: a graph of these kernels serves all counts. A position is a 64-bit integer, ONE to
the pixel: sums of it are exact, and no GPU is slow at them as many are at float64.
"""

import functools
import math

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from snr_ray.noise import filters
from snr_ray.noise.operator import n_bins_of

BITS = tl.constexpr(32)
ONE = 2**32
HALF_PI = tl.constexpr(math.pi / 2)
"""The weight of a view, of which there are n, is so much over n."""
BLOCK = 64
"""Rays or pixels of a program."""


def times(
    images: Tensor, n_views: Tensor, least: int, most: int, filter: str, angle_range: float
) -> Tensor:
    """`RadonNoise.times` of images [B, H, W] float32 that have their own view counts, [B] int64
    from `least` to `most`; those of 0 stay as they are."""
    images = images.contiguous()
    least, cos, sin = _directions(least, most, angle_range, images.device)
    (n_images, *shape), n_bins = images.shape, n_bins_of(*images.shape[1:])
    sinogram = images.new_empty(n_images, most, n_bins)
    grid = n_images, most, triton.cdiv(n_bins, BLOCK)
    _project[grid](images, sinogram, n_views, cos, sin, least, *shape, most, n_bins, BLOCK)
    clean = sinogram @ _filter(n_bins, filter, images.device)
    noisy = torch.empty_like(images)
    grid = n_images, shape[0], triton.cdiv(shape[1], BLOCK)
    _back_project[grid](clean, images, noisy, n_views, cos, sin, least, *shape, most, n_bins, BLOCK)
    return noisy


def transposed(
    images: Tensor, n_views: Tensor, least: int, most: int, filter: str, angle_range: float
) -> Tensor:
    """`RadonNoise.transposed` of the same."""
    images = images.contiguous()
    least, cos, sin = _directions(least, most, angle_range, images.device)
    (n_images, *shape), n_bins = images.shape, n_bins_of(*images.shape[1:])
    sinogram = images.new_empty(n_images, most, n_bins)
    grid = n_images, most, triton.cdiv(n_bins, BLOCK)
    _back_project_transposed[grid](images, sinogram, n_views, cos, sin, least, *shape, most, n_bins,
                                   BLOCK)  # fmt: skip
    clean = sinogram @ _filter(n_bins, filter, images.device)
    out = torch.empty_like(images)
    grid = n_images, shape[0], triton.cdiv(shape[1], BLOCK)
    _project_transposed[grid](clean, images, out, n_views, cos, sin, least, *shape, most, n_bins,
                              BLOCK)  # fmt: skip
    return out


def _directions(
    least: int, most: int, angle_range: float, device: torch.device
) -> tuple[int, Tensor, Tensor]:
    """The count that a table begins with, and the cosines and sines of the views of its counts."""
    if least == most:
        return least, *_of_one(least, angle_range, device)
    return 1, *_of_all(1 << (most - 1).bit_length(), angle_range, device)


@functools.lru_cache(maxsize=64)
def _of_one(n_views: int, angle_range: float, device: torch.device) -> tuple[Tensor, Tensor]:
    return _positions(np.arange(n_views) * angle_range / n_views, device)


@functools.cache  # for ever: captured steps read them, and there are few
def _of_all(most: int, angle_range: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of all counts up to a power of two; those of count n come after the n (n - 1) / 2 before."""
    counts = np.repeat(np.arange(1, most + 1), np.arange(1, most + 1))
    views = np.arange(len(counts)) - counts * (counts - 1) // 2
    return _positions(views * angle_range / counts, device)


def _positions(theta: npt.NDArray[np.float64], device: torch.device) -> tuple[Tensor, Tensor]:
    angles = np.deg2rad(theta)
    cos, sin = (np.rint(ONE * part(angles)).astype(np.int64) for part in (np.cos, np.sin))
    return torch.from_numpy(cos).to(device), torch.from_numpy(sin).to(device)


@functools.lru_cache(maxsize=32)  # more than a captured run has sizes
def _filter(n_bins: int, name: str, device: torch.device) -> Tensor:
    """[N, N]: symmetric, so the filter is its own transpose."""
    return torch.from_numpy(filters.matrix(n_bins, name)).to(device)


@triton.jit
def _below(position):  # type: ignore[no-untyped-def]
    """The pixel at or below a position, and how far above it: in [0, 1)."""
    low = position >> BITS
    rest = position - (low << BITS)
    return low.to(tl.int32), (rest >> 8).to(tl.int32).to(tl.float32) * (1 / 16777216)


@triton.jit
def _tri(distance):  # type: ignore[no-untyped-def]
    return tl.maximum(1 - tl.abs(distance), 0.0)


@triton.jit
def _views(n_views, cosines, sines, least):  # type: ignore[no-untyped-def]
    """Of a program's image: its view count, and where its cosines and sines lie."""
    n = tl.load(n_views + tl.program_id(0)).to(tl.int32)
    first = (n * (n - 1) - least * (least - 1)) // 2
    return n, cosines + first, sines + first


@triton.jit
def _project(  # type: ignore[no-untyped-def]
    images, sinogram, n_views, cosines, sines, least, height, width, most, n_bins,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of bilinear samples along each ray."""
    n, cosines, sines = _views(n_views, cosines, sines, least)
    image, view = tl.program_id(0).to(tl.int64), tl.program_id(1)
    bins = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    if view < n:
        cos, sin = tl.load(cosines + view), tl.load(sines + view)
        center = n_bins // 2
        ray = (bins - center).to(tl.int64)
        x = cos * ray - sin * center + ((width // 2).to(tl.int64) << BITS)
        y = -sin * ray - cos * center + ((height // 2).to(tl.int64) << BITS)
        total = tl.zeros((BLOCK,), tl.float32)
        pixels = images + image * height * width
        for _ in range(n_bins):
            left, right_weight = _below(x)
            top, lower_weight = _below(y)
            for corner in tl.static_range(4):
                j, i = left + corner % 2, top + corner // 2
                across = right_weight if corner % 2 == 1 else 1 - right_weight
                down = lower_weight if corner // 2 == 1 else 1 - lower_weight
                inside = (j >= 0) & (j < width) & (i >= 0) & (i < height)
                total += across * down * tl.load(pixels + i * width + j, mask=inside, other=0.0)
            x += sin
            y += cos
        place = sinogram + (image * most + view) * n_bins + bins
        tl.store(place, total, mask=bins < n_bins)


@triton.jit
def _project_transposed(  # type: ignore[no-untyped-def]
    sinogram, images, out, n_views, cosines, sines, least, height, width, most, n_bins,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What the rays put on each pixel: of 3 rays at most, and 3 samples of each."""
    n, cosines, sines = _views(n_views, cosines, sines, least)
    image, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    there, place = column < width, (image * height + row) * width + column
    center = n_bins // 2
    x, y = (column - width // 2).to(tl.int64), (row - height // 2).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for view in range(n):
        cos, sin = tl.load(cosines + view), tl.load(sines + view)
        reach = tl.abs(cos) + tl.abs(sin)
        ray, step = cos * x - sin * y, sin * x + cos * y
        first_ray, first_step = ((ray - reach) >> BITS) + 1, ((step - reach) >> BITS) + 1
        ray_away = ((first_ray << BITS) - ray).to(tl.float32) * (1 / 4294967296)
        step_away = ((first_step << BITS) - step).to(tl.float32) * (1 / 4294967296)
        ray_0, step_0 = first_ray.to(tl.int32) + center, first_step.to(tl.int32) + center
        c = cos.to(tl.float32) * (1 / 4294967296)
        s = sin.to(tl.float32) * (1 / 4294967296)
        bins = sinogram + (image * most + view) * n_bins
        for k in tl.static_range(3):
            weight = tl.zeros((BLOCK,), tl.float32)
            for m in tl.static_range(3):
                a, b = ray_away + k, step_away + m
                sampled = (step_0 + m >= 0) & (step_0 + m < n_bins)
                weight += tl.where(sampled, _tri(c * a + s * b) * _tri(c * b - s * a), 0.0)
            inside = there & (ray_0 + k >= 0) & (ray_0 + k < n_bins)
            total += weight * tl.load(bins + ray_0 + k, mask=inside, other=0.0)
    if n == 0:
        total = tl.load(images + place, mask=there)
    tl.store(out + place, total, mask=there)


@triton.jit
def _back_project(  # type: ignore[no-untyped-def]
    sinogram, images, out, n_views, cosines, sines, least, height, width, most, n_bins,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over views of each pixel's bin, interpolated linearly."""
    n, cosines, sines = _views(n_views, cosines, sines, least)
    image, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    there, place = column < width, (image * height + row) * width + column
    x, y = (column - width // 2).to(tl.int64), (row - height // 2).to(tl.int64)
    last = (n_bins - 1).to(tl.int64) << BITS
    total = tl.zeros((BLOCK,), tl.float32)
    for view in range(n):
        cos, sin = tl.load(cosines + view), tl.load(sines + view)
        ray = cos * x - sin * y + ((n_bins // 2).to(tl.int64) << BITS)
        low, upper = _below(ray)
        seen = there & (ray >= 0) & (ray <= last)
        bins = sinogram + (image * most + view) * n_bins + low
        lower_bin = tl.load(bins, mask=seen, other=0.0)
        upper_bin = tl.load(bins + 1, mask=seen & (ray < last), other=0.0)
        total += lower_bin + upper * (upper_bin - lower_bin)
    if n > 0:
        total *= HALF_PI / n
    else:
        total = tl.load(images + place, mask=there)
    tl.store(out + place, total, mask=there)


@triton.jit
def _back_project_transposed(  # type: ignore[no-untyped-def]
    images, sinogram, n_views, cosines, sines, least, height, width, most, n_bins,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What the pixels put on each bin: of 4 in each row at most, or in each column where rays are
    flat."""
    n, cosines, sines = _views(n_views, cosines, sines, least)
    image, view = tl.program_id(0).to(tl.int64), tl.program_id(1)
    bins = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    if view < n:
        cos, sin = tl.load(cosines + view), tl.load(sines + view)
        last, center = (n_bins - 1).to(tl.int64) << BITS, n_bins // 2
        # bin = across column + along row, where a row may be a column.
        steep = tl.abs(cos) >= tl.abs(sin)
        across, along = tl.where(steep, cos, -sin), tl.where(steep, -sin, cos)
        n_rows, n_columns = tl.where(steep, height, width), tl.where(steep, width, height)
        row_stride, stride = tl.where(steep, width, 1), tl.where(steep, 1, width)
        per_bin = 1 / (across.to(tl.float32) * (1 / 4294967296))
        slope = along.to(tl.float32) * (1 / 4294967296)
        total = tl.zeros((BLOCK,), tl.float32)
        pixels = images + image * height * width
        here = (bins - center).to(tl.int64) << BITS
        for row in range(n_rows):
            y = row - n_rows // 2
            middle = ((bins - center).to(tl.float32) - slope * y) * per_bin
            first = tl.floor(middle - tl.abs(per_bin)).to(tl.int32)
            for k in tl.static_range(4):
                x = first + k
                column = x + n_columns // 2
                ray = across * x.to(tl.int64) + along * y.to(tl.int64)
                away = (ray - here).to(tl.float32) * (1 / 4294967296)
                ray += center.to(tl.int64) << BITS
                weight = tl.where((ray >= 0) & (ray <= last), _tri(away), 0.0)
                inside = (column >= 0) & (column < n_columns) & (weight > 0)
                at = row * row_stride + column * stride
                total += weight * tl.load(pixels + at, mask=inside, other=0.0)
        place = sinogram + (image * most + view) * n_bins + bins
        tl.store(place, total * (HALF_PI / n), mask=bins < n_bins)
