"""Sparse-view Radon noise: clean images -> filtered back projections from n_views projections.

    image [H, W] --project--> sinogram [N, A] --filter along N, back-project--> noisy [H, W]

Every step is linear, so each is a sparse matrix, built once per noise spec and image shape and
applied to blocks of images. It equals `skimage.transform.iradon(radon(x, theta, circle=False),
theta)` with linear interpolation, and is not clipped.

Arithmetic is float32. One view of 96 pixels adds up 20 times the range of the image, and sums that
large would be 2e-5 off: half the range is subtracted before the sums, and its response, known in
float64, added after them.
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import fft

from snr_ray.config import FILTERS, VIEWS_PER_PIXEL, InputError, NoiseConfig, check
from snr_ray.hashing import fingerprint
from snr_ray.noise.rows import LANES, Block, Rows, compiled, scratch, to_columns, to_rows

Array = npt.NDArray[np.float32]

MIN_SIZE = 4
"""Smaller images have no rays to speak of."""
BLOCK_BYTES = 64 * 2**20
"""Memory for the pixels of the images that go through the products together, at most."""
MIN_BLOCK, MAX_BLOCK = LANES, 4 * LANES
"""Images of a block: weights and the sums of so many stay in registers."""
PART, TILE = 32, 8
"""Pixels are stored by squares of squares: a part of the projection reads the pixels of one larger
square, which stay in cache for all views; pixels of one smaller square share rays."""
OFFSET = 0.5
"""Subtracted from pixels before sums: the middle of the range."""
ATTENUATION = 4.0
"""Line integral of a white image along its longer side, where photons are counted: e^-4 of them
arrive. It is that of 20 cm of water at 70 keV (0.19 per cm; Hubbell and Seltzer, NIST XCOM)."""


@dataclass(frozen=True, slots=True)
class NoiseSpec:
    """Every setting the noise depends on. The rest is fixed: circle=False, linear interpolation,
    no clipping. The original method is `NoiseSpec(n_views)`.

    Raises:
        InputError: if a setting has no meaning.
    """

    n_views: int
    filter: str = "ramp"
    angle_range: float = 180.0
    """Degrees that the views are spread over; less than 180 is a limited-angle scan."""
    photons: int = 0
    """Photons that leave the source per detector bin and view; 0 counts none (no noise)."""

    def __post_init__(self) -> None:
        check(self.n_views >= 1, f"n_views must be at least 1, but got {self.n_views}.")
        check(
            self.filter in FILTERS,
            f"filter must be one of {', '.join(FILTERS)}, but got {self.filter!r}.",
        )
        check(
            0 < self.angle_range <= 180,
            f"angle_range must be above 0 and at most 180 degrees, but got {self.angle_range:g}.",
        )
        check(self.photons >= 0, f"photons must not be negative, but got {self.photons}.")

    @property
    def theta(self) -> npt.NDArray[np.float64]:
        """Projection angles [A] in degrees, in [0, angle_range), the end point excluded."""
        return np.arange(self.n_views) * self.angle_range / self.n_views


def noise_specs(config: NoiseConfig) -> list[NoiseSpec]:
    """Noise specs of a run in the order of their noise ids; entry k has noise id k + 1."""
    return [
        NoiseSpec(n_views, config.filter, config.angle_range, config.photons)
        for n_views in config.n_views
    ]


def spec_hash(noise: list[NoiseSpec], size: int) -> str:
    """Key of a simulated data set: changes with anything its noise depends on."""
    fixed = {"circle": False, "interpolation": "linear", "clip": False}
    text = json.dumps([dataclasses.asdict(spec) | fixed for spec in noise] + [size], sort_keys=True)
    return fingerprint(text)


class RadonNoise:
    """The noise operator of one spec for images of one shape; calls on batches.

    Attributes:
        order: [H*W] the pixel, counted by rows, at each place of the two matrices' pixel axis.
        projection: [A*N, H*W], rays of a view one after the other.
        filter: [N, N], applied to each view; scaled by pi / (2 A), the weight of a view.
        back: [H*W, A*N].
    """

    def __init__(self, spec: NoiseSpec, height: int, width: int) -> None:
        """Build the matrices.

        Raises:
            InputError: if the images are too small, or the views more than they can hold.
        """
        side = max(height, width)
        check(
            min(height, width) >= MIN_SIZE,
            f"Images must be at least {MIN_SIZE} pixels high and wide, but got {height}x{width}.",
        )
        most = VIEWS_PER_PIXEL * side
        check(
            spec.n_views <= most,
            f"n_views must be at most {VIEWS_PER_PIXEL} x the image size = {most}, but got "
            f"{spec.n_views}; more views add memory and nothing else.",
        )
        self.spec, self.height, self.width = spec, height, width
        self.n_bins = int(np.ceil(np.sqrt(2) * side))
        angles = np.deg2rad(spec.theta)
        self.order = _tiles(height, width)
        self._places = np.argsort(self.order)
        self.projection = _projection(height, width, self.n_bins, angles, self.order)
        kernel = _filter(self.n_bins, spec.filter) * (np.pi / (2 * spec.n_views))
        self.filter = Rows.dense(kernel)
        self.back = _back_projection(height, width, self.n_bins, angles, self.order)
        # What the offset becomes, in float64.
        flat = self.projection.scipy().astype(np.float64) @ np.full(height * width, OFFSET)
        filtered = (flat.reshape(spec.n_views, self.n_bins) @ kernel.T).ravel()
        self._flat_sinogram = flat
        self._flat_image = np.empty(height * width, np.float32)
        self._flat_image[self.order] = self.back.scipy().astype(np.float64) @ filtered

    def __call__(
        self, images: npt.NDArray[np.floating], seeds: Sequence[int] | None = None
    ) -> Array:
        """Noisy versions of clean images.

        Args:
            images: [..., H, W] float in [0, 1]; leading axes (batch, channel) are independent.
            seeds: one non-negative integer per entry of the first axis, for the photon noise of
                that image; by default its place. Without spec.photons nothing is random.

        Returns:
            [..., H, W] float32, not clipped.

        Raises:
            InputError: if images have another shape, are integers, or hold NaN or infinity.
        """
        flat = self._flatten(images)
        n_planes = len(flat) // max(1, len(images)) if images.ndim > 2 else 1
        out = np.empty_like(flat)
        for rows in self._blocks(len(flat)):
            sinogram = self._project(flat[rows], OFFSET)
            offset = self._flat_image
            if self.spec.photons:
                sinogram += self._flat_sinogram[:, None]
                for column in range(len(flat[rows])):
                    place, plane = divmod(rows.start + column, n_planes)
                    seed = place if seeds is None else seeds[place]
                    rng = np.random.default_rng([seed, plane, self.spec.n_views])
                    sinogram[:, column] = self._measured(sinogram[:, column], rng)
                offset = np.zeros_like(offset)
            to_rows(self._back_project(sinogram), offset, self._places, out[rows])
        return out.reshape(images.shape)

    @property
    def nbytes(self) -> int:
        """Memory of the matrices in bytes."""
        return self.projection.nbytes + self.filter.nbytes + self.back.nbytes

    @property
    def block(self) -> int:
        """Images that go through the products together."""
        images = BLOCK_BYTES // (4 * self.height * self.width)
        return int(np.clip(images, MIN_BLOCK, MAX_BLOCK))

    def project(self, images: npt.NDArray[np.floating]) -> Array:
        """Sinograms [..., N, A] of images [..., H, W]: N detector bins, A angles. Noise-free."""
        flat, n_rays = self._flatten(images), self.projection.n_rows
        out, order = np.empty((len(flat), n_rays), np.float32), np.arange(n_rays)
        for rows in self._blocks(len(flat)):
            to_rows(self._project(flat[rows], OFFSET), self._flat_sinogram, order, out[rows])
        sinogram = out.reshape(-1, self.spec.n_views, self.n_bins).swapaxes(1, 2)
        return sinogram.reshape(*images.shape[:-2], self.n_bins, self.spec.n_views)

    def matrix(self) -> Array:
        """The whole operator as one dense matrix [H*W, H*W]: noisy = matrix @ clean."""
        n_pixels = self.height * self.width
        out = np.empty((n_pixels, n_pixels), np.float32)
        identity, nothing = np.eye(n_pixels, dtype=np.float32), np.zeros(n_pixels, np.float32)
        for rows in self._blocks(n_pixels):
            columns = self._back_project(self._project(identity[rows], 0.0))
            to_rows(columns, nothing, self._places, out[rows])
        return out.T

    def _flatten(self, images: npt.NDArray[np.floating]) -> Array:
        """Images as [B, H*W] float32, checked."""
        if images.shape[-2:] != (self.height, self.width):
            raise InputError(
                f"This operator is for {self.height}x{self.width} images, but got "
                f"{images.shape[-2]}x{images.shape[-1]}."
            )
        if not np.issubdtype(images.dtype, np.floating):
            raise InputError(
                f"Images must be float in [0, 1], but got {images.dtype}; divide by the value "
                "that means white."
            )
        flat = np.ascontiguousarray(images, np.float32).reshape(-1, self.height * self.width)
        if not np.isfinite(flat.sum()):  # one number in place of an array of answers
            raise InputError("Images must be finite, but some hold NaN or infinity.")
        return flat

    def _blocks(self, n: int) -> list[slice]:
        return [slice(k, min(k + self.block, n)) for k in range(0, n, self.block)]

    def _project(self, flat: Array, offset: float) -> Block:
        """Sinograms [A*N, B] of images [n, H*W] less an offset; B fills n up to vectors."""
        n_columns = -(-len(flat) // LANES) * LANES
        pixels = scratch("pixels", flat.shape[1], n_columns)
        to_columns(flat, offset, self.order, pixels)
        sinogram = scratch("sinogram", self.projection.n_rows, n_columns)
        self.projection.times(pixels, sinogram)
        return sinogram

    def _back_project(self, sinogram: Block) -> Block:
        """Images [H*W, B] of sinograms [A*N, B], filtered before."""
        filtered = scratch("filtered", *sinogram.shape)
        self.filter.times(sinogram, filtered)
        pixels = scratch("pixels", self.back.n_rows, sinogram.shape[1])
        self.back.times(filtered, pixels)
        return pixels

    def _measured(self, sinogram: Array, rng: np.random.Generator) -> npt.NDArray[np.float64]:
        """One sinogram as a detector counts it: I ~ Poisson(I_0 exp(-p)), then p = -ln(I / I_0).

        A bin that counts no photon counts one. Source: Buzug, Computed Tomography (2008), 2.4.
        """
        scale = ATTENUATION / max(self.height, self.width)
        counts = rng.poisson(self.spec.photons * np.exp(-scale * sinogram.astype(np.float64)))
        return -np.log(np.maximum(counts, 1) / self.spec.photons) / scale


@functools.lru_cache(maxsize=32)
def noise_operator(spec: NoiseSpec, height: int, width: int) -> RadonNoise:
    """The operator of one spec and shape, built at the first call in each process."""
    return RadonNoise(spec, height, width)


def _tiles(height: int, width: int) -> npt.NDArray[np.int64]:
    """Pixels [H*W], counted by rows, in the order of tiles."""
    i, j = np.mgrid[:height, :width].reshape(2, -1)
    return np.lexsort((j, i, j // TILE, i // TILE, j // PART, i // PART))


def _projection(
    height: int,
    width: int,
    n_bins: int,
    angles: npt.NDArray[np.float64],
    order: npt.NDArray[np.int64],
) -> Rows:
    """[A*N, H*W]: rotate about the pixel (H//2, W//2) with bilinear sampling, sum columns.

    Bilinear weights of the rotated grid are those of `skimage.transform.warp(order=1)`.
    """
    n_parts = -(-height // PART) * -(-width // PART)
    i, j = np.mgrid[:height, :width]
    part = (i // PART * -(-width // PART) + j // PART).astype(np.int32)
    places = np.argsort(order).astype(np.int32).reshape(height, width)
    counts = np.zeros(n_parts * len(angles) * n_bins + 1, np.int64)
    nothing = np.empty(0, np.int32), np.empty(0, np.float32)
    _trace(places, part, n_bins, angles, counts, *nothing)
    starts = np.cumsum(counts)
    columns, weights = np.empty(starts[-1], np.int32), np.empty(starts[-1], np.float32)
    _trace(places, part, n_bins, angles, starts[:-1].copy(), columns, weights)
    return Rows(starts, columns, weights, len(angles) * n_bins, height * width)


@compiled
def _trace(places, part, n_bins, angles, rows, columns, weights):  # type: ignore[no-untyped-def]
    """Follow every ray through the image, whose pixels have `places` and a `part` [H, W].

    Without room in `columns`, count the pixels of each row in `rows[row + 1]`; with it, write them
    from `rows[row]` on, which moves along.
    """
    height, width = places.shape
    center, fill = n_bins // 2, len(columns) > 0
    entry = np.full(height * width, -1, np.int32)  # of a pixel among those of the ray
    pixels, sums = np.empty(4 * n_bins, np.int32), np.empty(4 * n_bins, np.float64)
    part_of = np.empty(4 * n_bins, np.int32)
    for view in range(len(angles)):
        cos, sin = np.cos(angles[view]), np.sin(angles[view])
        for ray in range(n_bins):
            n = 0
            for step in range(n_bins):
                # Position in the image that the rotated grid point (step, ray) samples.
                x = cos * ray + sin * step - center * (cos + sin - 1) - (center - width // 2)
                y = -sin * ray + cos * step - center * (cos - sin - 1) - (center - height // 2)
                if x <= -1 or y <= -1 or x >= width or y >= height:
                    continue
                left, top = int(np.floor(x)), int(np.floor(y))
                dx, dy = x - left, y - top
                for corner in range(4):
                    j, i = left + corner % 2, top + corner // 2
                    if j < 0 or i < 0 or j >= width or i >= height:
                        continue
                    weight = (dx if corner % 2 else 1 - dx) * (dy if corner // 2 else 1 - dy)
                    if weight == 0:
                        continue
                    pixel = places[i, j]
                    if entry[pixel] < 0:
                        entry[pixel] = n
                        pixels[n], sums[n], part_of[n] = pixel, 0.0, part[i, j]
                        n += 1
                    sums[entry[pixel]] += weight
            for k in range(n):
                entry[pixels[k]] = -1
                row = (part_of[k] * len(angles) + view) * n_bins + ray
                if fill:
                    columns[rows[row]], weights[rows[row]] = pixels[k], sums[k]
                    rows[row] += 1
                else:
                    rows[row + 1] += 1


def _filter(n_bins: int, name: str) -> npt.NDArray[np.float64]:
    """Dense [N, N]: the frequency filter of back projection as a matrix on detector bins.

    Source: Kak and Slaney, Principles of Computerized Tomographic Imaging (1988), chapter 3,
    equation 61: the ramp is transformed from its spatial form, which removes a small bias.
    """
    size = max(64, 2 ** int(np.ceil(np.log2(2 * n_bins))))
    odd = np.concatenate([np.arange(1, size / 2 + 1, 2), np.arange(size / 2 - 1, 0, -2)])
    kernel = np.zeros(size)
    kernel[0] = 0.25
    kernel[1::2] = -1 / (np.pi * odd) ** 2
    response = 2 * np.real(fft.fft(kernel))  # the ramp, [size]
    if name == "shepp-logan":
        omega = np.pi * fft.fftfreq(size)[1:]
        response[1:] *= np.sin(omega) / omega
    elif name == "cosine":
        response *= fft.fftshift(np.sin(np.linspace(0, np.pi, size, endpoint=False)))
    elif name == "hamming":
        response *= fft.fftshift(np.hamming(size))
    elif name == "hann":
        response *= fft.fftshift(np.hanning(size))
    elif name == "none":
        response[:] = 1
    impulse = np.real(fft.ifft(response))  # the filter is a circular convolution
    bins = np.arange(n_bins)
    return impulse[(bins[:, None] - bins) % size]


def _back_projection(
    height: int,
    width: int,
    n_bins: int,
    angles: npt.NDArray[np.float64],
    order: npt.NDArray[np.int64],
) -> Rows:
    """[H*W, A*N]: each pixel interpolates its ray's bin linearly; rays outside count 0.

    Every pixel has two entries per view, in the order of views.
    """
    n_pixels, n_views = height * width, len(angles)
    y, x = order // width - height // 2, order % width - width // 2
    columns = np.empty((n_pixels, n_views, 2), np.int32)
    weights = np.empty((n_pixels, n_views, 2), np.float32)
    for view, angle in enumerate(angles):
        t = x * np.cos(angle) - y * np.sin(angle) + n_bins // 2  # position in bins
        low = np.clip(np.floor(t).astype(np.int32), 0, n_bins - 2)
        inside = (t >= 0) & (t <= n_bins - 1)
        columns[:, view, 0] = view * n_bins + low
        columns[:, view, 1] = view * n_bins + low + 1
        weights[:, view, 0] = inside * (1 - (t - low))
        weights[:, view, 1] = inside * (t - low)
    starts = np.arange(n_pixels + 1, dtype=np.int64) * (2 * n_views)
    return Rows(starts, columns.ravel(), weights.ravel(), n_pixels, n_views * n_bins)
