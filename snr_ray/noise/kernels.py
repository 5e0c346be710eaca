"""The noise operator for images that are on a GPU: the loops of `rays` as Triton kernels, weights
computed on the way.

Images are [B, H, W], sinograms [B, A, N]. A position is a 64-bit integer, ONE to the pixel: sums
of it are exact, and no GPU is slow at them as many are at float64.
"""

import functools

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from snr_ray.noise.filters import response
from snr_ray.noise.operator import OFFSET, RadonNoise

BITS = tl.constexpr(32)
ONE = 2**32
BLOCK = 64
"""Rays or pixels of a program, which share their weights with IMAGES images."""
IMAGES = 4


def times(noise: RadonNoise, images: Tensor) -> Tensor:
    """`RadonNoise.times` of images [B, H, W] float32."""
    cos, sin, gain, flat = _tables(noise, images.device)
    shape, n_views, n_bins = images.shape, len(noise.angles), noise.n_bins
    sinogram = images.new_empty(shape[0], n_views, n_bins)
    grid = (n_views, triton.cdiv(n_bins, BLOCK), triton.cdiv(shape[0], IMAGES))
    offset = OFFSET
    _project[grid](images.contiguous(), sinogram, cos, sin, *shape, n_views, n_bins, offset,
                   BLOCK, IMAGES)  # fmt: skip
    clean = (_filtered(sinogram, gain) + flat).contiguous()
    noisy = torch.empty_like(images, memory_format=torch.contiguous_format)
    grid = (shape[1], triton.cdiv(shape[2], BLOCK), triton.cdiv(shape[0], IMAGES))
    _back_project[grid](clean, noisy, cos, sin, *shape, n_views, n_bins, BLOCK, IMAGES)
    return noisy


def transposed(noise: RadonNoise, images: Tensor) -> Tensor:
    """`RadonNoise.transposed` of images [B, H, W] float32."""
    cos, sin, gain, _ = _tables(noise, images.device)
    shape, n_views, n_bins = images.shape, len(noise.angles), noise.n_bins
    sinogram = images.new_empty(shape[0], n_views, n_bins)
    grid = (n_views, triton.cdiv(n_bins, BLOCK), triton.cdiv(shape[0], IMAGES))
    _back_project_transposed[grid](images.contiguous(), sinogram, cos, sin, *shape, n_views,
                                   n_bins, BLOCK, IMAGES)  # fmt: skip
    clean = _filtered(sinogram, gain).contiguous()
    out = torch.empty_like(images, memory_format=torch.contiguous_format)
    grid = (shape[1], triton.cdiv(shape[2], BLOCK), triton.cdiv(shape[0], IMAGES))
    _project_transposed[grid](clean, out, cos, sin, *shape, n_views, n_bins, BLOCK, IMAGES)
    return out


@functools.lru_cache(maxsize=64)
def _tables(noise: RadonNoise, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of one operator: cosines and sines [A] as positions, the filter's gains and the weight of a
    view in one, and the filtered projections [A, N] of an image that is OFFSET everywhere."""
    weight = np.pi / (2 * len(noise.angles))
    spectrum = response(noise.n_bins, noise.spec.filter)
    gain = weight * spectrum[: len(spectrum) // 2 + 1]
    cos, sin = (np.rint(ONE * part).astype(np.int64) for part in noise.directions)
    tables = (cos, sin, gain.astype(np.float32), np.float32(weight) * noise.flat_filtered)
    one, two, three, four = (torch.from_numpy(table).to(device) for table in tables)
    return one, two, three, four


def _filtered(sinogram: Tensor, gain: Tensor) -> Tensor:
    size = 2 * (len(gain) - 1)
    return torch.fft.irfft(torch.fft.rfft(sinogram, size) * gain, size)[..., : sinogram.shape[-1]]


@triton.jit
def _below(position):  # type: ignore[no-untyped-def]
    """The pixel at or below a position, and how far above it: in [0, 1)."""
    low = position >> BITS
    rest = position - (low << BITS)
    return low, (rest >> 8).to(tl.float32) * (1 / 16777216)


@triton.jit
def _tri(distance):  # type: ignore[no-untyped-def]
    return tl.maximum(1 - tl.abs(distance), 0.0)


@triton.jit
def _take(base, row, place, inside, other):  # type: ignore[no-untyped-def]
    """Entries [IMAGES, BLOCK] of rows [IMAGES, 1] at places [BLOCK]."""
    return tl.load(base + row + place[None, :], mask=inside, other=other)


@triton.jit
def _project(  # type: ignore[no-untyped-def]
    images, sinogram, cosines, sines, n_images, height, width, n_views, n_bins, offset,
    BLOCK: tl.constexpr, IMAGES: tl.constexpr,
):  # fmt: skip
    """Sums of bilinear samples along each ray, of images less an offset."""
    bins = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    view = tl.program_id(0).to(tl.int64)
    image = (tl.program_id(2) * IMAGES + tl.arange(0, IMAGES)).to(tl.int64)[:, None]
    there = image < n_images
    cos, sin = tl.load(cosines + view), tl.load(sines + view)
    center = n_bins // 2
    ray = (bins - center).to(tl.int64)
    x = cos * ray - sin * center + ((width // 2).to(tl.int64) << BITS)
    y = -sin * ray - cos * center + ((height // 2).to(tl.int64) << BITS)
    total = tl.zeros((IMAGES, BLOCK), tl.float32)
    rows = image * height * width
    for _ in range(n_bins):
        left, right_weight = _below(x)
        top, lower_weight = _below(y)
        for corner in tl.static_range(4):
            j, i = left + corner % 2, top + corner // 2
            across = right_weight if corner % 2 == 1 else 1 - right_weight
            down = lower_weight if corner // 2 == 1 else 1 - lower_weight
            inside = (j >= 0) & (j < width) & (i >= 0) & (i < height)
            pixels = _take(images, rows, i * width + j, there & inside[None, :], offset)
            total += (across * down)[None, :] * (pixels - offset)
        x += sin
        y += cos
    place = (image * n_views + view) * n_bins + bins[None, :]
    tl.store(sinogram + place, total, mask=there & (bins < n_bins)[None, :])


@triton.jit
def _project_transposed(  # type: ignore[no-untyped-def]
    sinogram, images, cosines, sines, n_images, height, width, n_views, n_bins,
    BLOCK: tl.constexpr, IMAGES: tl.constexpr,
):  # fmt: skip
    """What the rays put on each pixel: of 3 rays at most, and 3 samples of each."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(0)
    image = (tl.program_id(2) * IMAGES + tl.arange(0, IMAGES)).to(tl.int64)[:, None]
    there = (image < n_images) & (column < width)[None, :]
    center = n_bins // 2
    x, y = (column - width // 2).to(tl.int64), (row - height // 2).to(tl.int64)
    total = tl.zeros((IMAGES, BLOCK), tl.float32)
    for view in range(n_views):
        cos, sin = tl.load(cosines + view), tl.load(sines + view)
        reach = tl.abs(cos) + tl.abs(sin)
        ray, step = cos * x - sin * y, sin * x + cos * y
        first_ray, first_step = ((ray - reach) >> BITS) + 1, ((step - reach) >> BITS) + 1
        ray_away = ((first_ray << BITS) - ray).to(tl.float32) * (1 / 4294967296)
        step_away = ((first_step << BITS) - step).to(tl.float32) * (1 / 4294967296)
        c = cos.to(tl.float32) * (1 / 4294967296)
        s = sin.to(tl.float32) * (1 / 4294967296)
        rows = (image * n_views + view) * n_bins
        for k in tl.static_range(3):
            weight = tl.zeros((BLOCK,), tl.float32)
            for m in tl.static_range(3):
                a, b = ray_away + k, step_away + m
                sampled = (first_step + m >= -center) & (first_step + m < n_bins - center)
                weight += tl.where(sampled, _tri(c * a + s * b) * _tri(c * b - s * a), 0.0)
            place = first_ray + k + center
            inside = there & ((place >= 0) & (place < n_bins))[None, :]
            total += weight[None, :] * _take(sinogram, rows, place, inside, 0.0)
    tl.store(images + (image * height + row) * width + column[None, :], total, mask=there)


@triton.jit
def _back_project(  # type: ignore[no-untyped-def]
    sinogram, images, cosines, sines, n_images, height, width, n_views, n_bins,
    BLOCK: tl.constexpr, IMAGES: tl.constexpr,
):  # fmt: skip
    """Sums over views of each pixel's bin, interpolated linearly."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(0)
    image = (tl.program_id(2) * IMAGES + tl.arange(0, IMAGES)).to(tl.int64)[:, None]
    there = (image < n_images) & (column < width)[None, :]
    x, y = (column - width // 2).to(tl.int64), (row - height // 2).to(tl.int64)
    last = (n_bins - 1).to(tl.int64) << BITS
    total = tl.zeros((IMAGES, BLOCK), tl.float32)
    for view in range(n_views):
        cos, sin = tl.load(cosines + view), tl.load(sines + view)
        place = cos * x - sin * y + ((n_bins // 2).to(tl.int64) << BITS)
        low, upper = _below(place)
        seen = (place >= 0) & (place <= last)
        rows = (image * n_views + view) * n_bins
        lower_bin = _take(sinogram, rows, low, there & seen[None, :], 0.0)
        upper_bin = _take(sinogram, rows, low + 1, there & (seen & (place < last))[None, :], 0.0)
        total += lower_bin + upper[None, :] * (upper_bin - lower_bin)
    tl.store(images + (image * height + row) * width + column[None, :], total, mask=there)


@triton.jit
def _back_project_transposed(  # type: ignore[no-untyped-def]
    images, sinogram, cosines, sines, n_images, height, width, n_views, n_bins,
    BLOCK: tl.constexpr, IMAGES: tl.constexpr,
):  # fmt: skip
    """What the pixels put on each bin: of 4 in each row at most, or in each column where rays are
    flat."""
    bins = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    view = tl.program_id(0).to(tl.int64)
    image = (tl.program_id(2) * IMAGES + tl.arange(0, IMAGES)).to(tl.int64)[:, None]
    there = image < n_images
    cos, sin = tl.load(cosines + view), tl.load(sines + view)
    last, center = (n_bins - 1).to(tl.int64) << BITS, n_bins // 2
    # bin = across column + along row, where a row may be a column.
    steep = tl.abs(cos) >= tl.abs(sin)
    across, along = tl.where(steep, cos, -sin), tl.where(steep, -sin, cos)
    n_rows, n_columns = tl.where(steep, height, width), tl.where(steep, width, height)
    row_stride, stride = tl.where(steep, width, 1), tl.where(steep, 1, width)
    per_bin = 1 / (across.to(tl.float32) * (1 / 4294967296))
    slope = along.to(tl.float32) * (1 / 4294967296)
    total = tl.zeros((IMAGES, BLOCK), tl.float32)
    rows = image * height * width
    for row in range(n_rows):
        y = row - n_rows // 2
        middle = ((bins - center).to(tl.float32) - slope * y) * per_bin
        first = tl.floor(middle - tl.abs(per_bin)).to(tl.int64)
        for k in tl.static_range(4):
            x = first + k
            column = x + n_columns // 2
            place = across * x + along * y + (center.to(tl.int64) << BITS)
            away = (place - (bins.to(tl.int64) << BITS)).to(tl.float32) * (1 / 4294967296)
            weight = tl.where((place >= 0) & (place <= last), _tri(away), 0.0)
            inside = (column >= 0) & (column < n_columns) & (weight > 0)
            at = row * row_stride + column * stride
            total += weight[None, :] * _take(images, rows, at, there & inside[None, :], 0.0)
    place = (image * n_views + view) * n_bins + bins[None, :]
    tl.store(sinogram + place, total, mask=there & (bins < n_bins)[None, :])
