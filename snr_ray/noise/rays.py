"""Projection and back projection of a block of images, and the transposes of both: compiled loops
that compute each weight on the way, for all images of the block at once.

Images are stored tile by tile [H*W, B], sinograms by view [A*N, B], B images side by side. With
the origin at the centre pixel (H//2, W//2) and the centre bin N//2,

    X = cos ray + sin step,  Y = -sin ray + cos step,   ray = cos X - sin Y

A ray's sum samples the image bilinearly at all its steps, as `skimage.transform.radon` does with
circle=False, and a pixel interpolates its bin linearly, as `iradon` does. Samples that share a
pixel are one weight: tri(X - x) tri(Y - y) summed over steps, tri(d) = max(0, 1 - |d|).

Positions are float64 and weights float32, which is what their own difference rounds to.
"""

import functools

import numpy as np
import numpy.typing as npt

from snr_ray.noise.sums import (
    compiled,
    gather2,
    gather3,
    gather4,
    spread2,
    spread3,
    spread4,
)

TILE_BYTES = 36 * 2**10
"""Pixels of a tile of a block, which stay in the first cache for a view."""
PIXELS = 8
"""Pixels in a row that back projection treats together, and rows of them that share bins."""
VIEWS = 512
"""Views times images of a block whose bins stay in the first cache for PIXELS rows of pixels."""
CHUNK = 16
"""Windows computed at a time: loops over multiples of it have no rest."""
SAMPLES = 3
"""Samples of a ray in reach of a row of pixels, at most: they are 0.7 to 1 rows apart."""

f32 = np.float32


@functools.lru_cache(maxsize=64)
def tiles(height: int, width: int, n_images: int) -> npt.NDArray[np.int64]:
    """Tiles [T, 5] of images in a block of so many: top, height, left, width, place of the first
    pixel. The pixels of a tile lie together, row by row."""
    side = max(PIXELS, int(np.sqrt(TILE_BYTES / (4 * n_images))))

    def edges(n: int) -> npt.NDArray[np.int64]:
        return np.linspace(0, n, -(-n // side) + 1).astype(np.int64)

    top, left = np.meshgrid(edges(height)[:-1], edges(width)[:-1], indexing="ij")
    high, wide = np.meshgrid(np.diff(edges(height)), np.diff(edges(width)), indexing="ij")
    areas = (high * wide).ravel()
    places = np.cumsum(areas) - areas
    return np.stack([top.ravel(), high.ravel(), left.ravel(), wide.ravel(), places], axis=1)


@compiled
def fill(images, offset, tiles, block):  # type: ignore[no-untyped-def]
    """Store images [n, H, W] less an offset in a block [H*W, B]; columns from n on become 0."""
    for t in range(len(tiles)):
        top, high, left, wide, place = tiles[t]
        for i in range(high):
            row = place + i * wide
            for image in range(len(images)):
                for j in range(wide):
                    block[row + j, image] = images[image, top + i, left + j] - offset
            for image in range(len(images), block.shape[1]):
                for j in range(wide):
                    block[row + j, image] = 0


@compiled
def empty(block, scale, tiles, images):  # type: ignore[no-untyped-def]
    """Read images [n, H, W], times a scale, from a block [H*W, B]."""
    for t in range(len(tiles)):
        top, high, left, wide, place = tiles[t]
        for i in range(high):
            row = place + i * wide
            for image in range(len(images)):
                for j in range(wide):
                    images[image, top + i, left + j] = scale * block[row + j, image]


@compiled
def _tri(distance):  # type: ignore[no-untyped-def]
    return max(f32(0), f32(1) - abs(distance))


@compiled
def _along_ray(  # type: ignore[no-untyped-def]
    at,
    n,
    counts,
    first,
    start,
    step_rows,
    row_there,
    column_there,
    reach,
    step_columns,
    least,
    most,
    place,
    row_stride,
    left,
    right,
    column_stride,
    places,
    from_row,
    from_left,
):
    """The n windows of one ray, one for each row of pixels from `first` on: entry `at` and on of
    the place, and how far the first sample in reach is from the row and from the window's left."""
    per_row, at = 1 / step_rows, np.uint64(at)
    for k in range(np.uint64(n)):
        row = counts[k]
        step = min(max(np.floor(start + row * per_row), least), most)
        column = column_there + step_columns * step
        window = min(max(np.floor(column + reach), left), right)
        from_row[at + k] = f32(row_there + step_rows * step - row)
        from_left[at + k] = f32(column - window)
        places[at + k] = np.int32(place + row * row_stride + (window - left) * column_stride)


@compiled
def _weigh3(n, step_rows, step_columns, from_row, from_left, w0, w1, w2):  # type: ignore[no-untyped-def]
    """Weights of windows of 3 pixels, by SAMPLES samples each."""
    one, two = f32(1), f32(2)
    for k in range(np.uint64(n)):
        a0, b0 = _tri(from_row[k]), from_left[k]
        a1, b1 = _tri(from_row[k] + step_rows), b0 + step_columns
        a2, b2 = _tri(from_row[k] + two * step_rows), b0 + two * step_columns
        w0[k] = a0 * _tri(b0) + a1 * _tri(b1) + a2 * _tri(b2)
        w1[k] = a0 * _tri(b0 - one) + a1 * _tri(b1 - one) + a2 * _tri(b2 - one)
        w2[k] = a0 * _tri(b0 - two) + a1 * _tri(b1 - two) + a2 * _tri(b2 - two)


@compiled
def _weigh4(n, step_rows, step_columns, from_row, from_left, w0, w1, w2, w3):  # type: ignore[no-untyped-def]
    """Weights of windows of 4 pixels."""
    three = f32(3)
    _weigh3(n, step_rows, step_columns, from_row, from_left, w0, w1, w2)
    for k in range(np.uint64(n)):
        a0, b0 = _tri(from_row[k]), from_left[k] - three
        a1, b1 = _tri(from_row[k] + step_rows), b0 + step_columns
        a2, b2 = _tri(from_row[k] + f32(2) * step_rows), b0 + f32(2) * step_columns
        w3[k] = a0 * _tri(b0) + a1 * _tri(b1) + a2 * _tri(b2)


@compiled
def _room(tiles):  # type: ignore[no-untyped-def]
    """Arrays for the windows of all rays that cross a tile: place, distance from the row and from
    the window's left, weights [4, n]; where those of each ray start and end; and 0, 1, 2 ..."""
    side = max(tiles[:, 1].max(), tiles[:, 3].max())
    n = (side + 6) * (side + 6) + CHUNK
    return (
        np.empty(n, np.int32), np.empty(n, np.float32), np.empty(n, np.float32),
        np.empty((4, n), np.float32), np.empty(2 * side + 8, np.int64),
        np.empty(2 * side + 8, np.int64), np.arange(side + CHUNK).astype(np.float64),
    )  # fmt: skip


@compiled
def _cross(tile, angle, shape, n_bins, room):  # type: ignore[no-untyped-def]
    """Windows of all rays of a view that cross a tile: their size, the stride between their
    pixels, the first of these rays and the number of them.

    Rays cross rows of pixels where they are steeper than 45 degrees, else columns; what is called
    rows below may be columns.
    """
    places, from_row, from_left, weights, starts, ends, counts = room
    w0, w1, w2, w3 = weights[0], weights[1], weights[2], weights[3]
    (height, width), center = shape, n_bins // 2
    top, high, left, wide = tile[0], tile[1], tile[2], tile[3]
    cos, sin = np.cos(angle), np.sin(angle)
    least, most = -float(center), float(n_bins - 1 - center)
    if abs(cos) >= abs(sin):
        row_0, n_rows, row_stride = top - height // 2, high, wide
        column_0, n_columns, stride = left - width // 2, wide, 1
        rows_of_ray, rows_of_step, columns_of_ray, columns_of_step = -sin, cos, cos, sin
    else:
        row_0, n_rows, row_stride = left - width // 2, wide, 1
        column_0, n_columns, stride = top - height // 2, high, wide
        rows_of_ray, rows_of_step, columns_of_ray, columns_of_step = cos, sin, -sin, cos
    if rows_of_step < 0:  # walk the ray the other way
        rows_of_step, columns_of_step = -rows_of_step, -columns_of_step
        least, most = -most, -least
    row_1, column_1 = row_0 + n_rows - 1, column_0 + n_columns - 1
    # ray = rows_of_ray row + columns_of_ray column; a pixel is reached from less than:
    reach = abs(cos) + abs(sin)
    low = min(columns_of_ray * column_0, columns_of_ray * column_1) - reach
    high_ = max(columns_of_ray * column_0, columns_of_ray * column_1) + reach
    ray_0 = low + min(rows_of_ray * row_0, rows_of_ray * row_1)
    ray_1 = high_ + max(rows_of_ray * row_0, rows_of_ray * row_1)
    bin_0 = max(0, int(np.ceil(ray_0)) + center)
    bin_1 = min(n_bins - 1, int(np.floor(ray_1)) + center)
    # SAMPLES steps move by at most one column, or else by at most two.
    size, n = 3 if abs(columns_of_step) <= 0.5 else 4, 0
    for bin_ in range(bin_0, bin_1 + 1):
        ray = float(bin_ - center)
        first, last = row_0, row_1
        if abs(rows_of_ray) > 1e-6:
            a, b = (ray - high_) / rows_of_ray, (ray - low) / rows_of_ray
            first = max(first, int(np.ceil(min(a, b, row_1 + 1.0))))
            last = min(last, int(np.floor(max(a, b))))
        crossed = max(0, last - first + 1)
        starts[bin_ - bin_0], ends[bin_ - bin_0] = n, n + crossed
        _along_ray(
            n, -(-crossed // CHUNK) * CHUNK, counts, first,
            (first - 1 - rows_of_ray * ray) / rows_of_step + 1, rows_of_step,
            rows_of_ray * ray - first, columns_of_ray * ray,
            min(0.0, (SAMPLES - 1) * columns_of_step), columns_of_step,
            least, most - (SAMPLES - 1), float((first - row_0) * row_stride),
            float(row_stride), float(column_0), float(column_1 + 1 - size), float(stride),
            places, from_row, from_left,
        )  # fmt: skip
        n += crossed
    n = -(-n // CHUNK) * CHUNK
    steps = f32(rows_of_step), f32(columns_of_step)
    if size == 3:
        _weigh3(n, *steps, from_row, from_left, w0, w1, w2)
    else:
        _weigh4(n, *steps, from_row, from_left, w0, w1, w2, w3)
    return size, stride, bin_0, bin_1 - bin_0 + 1


@compiled
def project(pixels, tiles, angles, shape, n_bins, sinogram):  # type: ignore[no-untyped-def]
    """Add the projections of a block of pixels [H*W, B] to its sinogram [A*N, B]. Angles [A] are
    radians, shape is (H, W). A tile and a view at a time."""
    room = _room(tiles)
    places, weights, starts, ends = room[0], room[3], room[4], room[5]
    for t in range(len(tiles)):
        base = tiles[t, 4]
        for view in range(len(angles)):
            size, stride, ray, n = _cross(tiles[t], angles[view], shape, n_bins, room)
            row = view * n_bins + ray
            if size == 3:
                gather3(pixels, base, stride, places, weights, starts, ends, sinogram, row, n)
            else:
                gather4(pixels, base, stride, places, weights, starts, ends, sinogram, row, n)


@compiled
def project_transposed(pixels, tiles, angles, shape, n_bins, sinogram):  # type: ignore[no-untyped-def]
    """Add to the pixels of a block what its sinogram puts on them: the transpose of `project`."""
    room = _room(tiles)
    places, weights, starts, ends = room[0], room[3], room[4], room[5]
    for t in range(len(tiles)):
        base = tiles[t, 4]
        for view in range(len(angles)):
            size, stride, ray, n = _cross(tiles[t], angles[view], shape, n_bins, room)
            row = view * n_bins + ray
            if size == 3:
                spread3(pixels, base, stride, places, weights, starts, ends, sinogram, row, n)
            else:
                spread4(pixels, base, stride, places, weights, starts, ends, sinogram, row, n)


@compiled
def _between_bins(n, x, y, counts, cos, sin, bins, center, last, places, w0, w1):  # type: ignore[no-untyped-def]
    """The n windows of 2 bins of pixels in a row from (x, y) on, in all views of a chunk."""
    for k in range(np.uint64(n)):
        there = (x + counts[k]) * cos[k] - y * sin[k] + center
        low = min(max(np.floor(there), 0.0), last - 1)
        inside = f32(1) if (there >= 0.0) & (there <= last) else f32(0)
        upper = inside * f32(there - low)
        places[k] = np.int32(bins[k] + low)
        w0[k], w1[k] = inside - upper, upper


def back_project(sinogram, tiles, angles, shape, n_bins, pixels):  # type: ignore[no-untyped-def]
    """Add the back projections of a block of sinograms [A*N, B] to its pixels [H*W, B]. Bins
    outside count 0."""
    _back_project(sinogram, tiles, angles, shape, n_bins, pixels, False)


def back_project_transposed(sinogram, tiles, angles, shape, n_bins, pixels):  # type: ignore[no-untyped-def]
    """Add to the sinograms of a block what its pixels put on them: the transpose of the same."""
    _back_project(sinogram, tiles, angles, shape, n_bins, pixels, True)


@compiled
def _back_project(sinogram, tiles, angles, shape, n_bins, pixels, transposed):  # type: ignore[no-untyped-def]
    (height, width), n_views = shape, len(angles)
    center, last = float(n_bins // 2), float(n_bins - 1)
    together = min(n_views, max(PIXELS, VIEWS // pixels.shape[1]))
    room = PIXELS * together + CHUNK
    places, weights = np.empty(room, np.int32), np.empty((2, room), np.float32)
    counts, bins, cos, sin = np.zeros(room), np.zeros(room), np.zeros(room), np.zeros(room)
    starts, ends = np.empty(PIXELS, np.int64), np.empty(PIXELS, np.int64)
    w0, w1 = weights[0], weights[1]
    for t in range(len(tiles)):
        top, high, left, wide, base = tiles[t]
        for first in range(0, n_views, together):
            n = min(together, n_views - first)
            for j in range(PIXELS):
                starts[j], ends[j] = j * n, (j + 1) * n
                for k in range(n):
                    entry = j * n + k
                    cos[entry], sin[entry] = np.cos(angles[first + k]), np.sin(angles[first + k])
                    counts[entry], bins[entry] = j, k * n_bins
            n_entries = -(-PIXELS * n // CHUNK) * CHUNK
            for strip in range(0, high, PIXELS):
                for j in range(0, wide, PIXELS):
                    n_pixels = min(PIXELS, wide - j)
                    for i in range(strip, min(strip + PIXELS, high)):
                        _between_bins(
                            n_entries, float(left + j - width // 2), float(top + i - height // 2),
                            counts, cos, sin, bins, center, last, places, w0, w1,
                        )  # fmt: skip
                        add = (
                            sinogram, first * n_bins, 1, places, weights, starts, ends,
                            pixels, base + i * wide + j, n_pixels,
                        )  # fmt: skip
                        if transposed:
                            spread2(*add)
                        else:
                            gather2(*add)


@compiled
def flat_sinogram(angles, shape, n_bins, out):  # type: ignore[no-untyped-def]
    """The projection [A, N] float64 of an image that is 1 everywhere: a sample weighs what its
    four pixels inside do, 1 but at the border."""
    (height, width), center = shape, n_bins // 2
    for view in range(len(angles)):
        cos, sin = np.cos(angles[view]), np.sin(angles[view])
        for k in range(n_bins):
            out[view, k] = 0
        for step in range(-center, n_bins - center):
            x_there, y_there = sin * step + width // 2, cos * step + height // 2
            for k in range(n_bins):
                x, y = x_there + cos * (k - center), y_there - sin * (k - center)
                inside = min(max(min(x + 1, width - x), 0.0), 1.0)
                out[view, k] += inside * min(max(min(y + 1, height - y), 0.0), 1.0)
