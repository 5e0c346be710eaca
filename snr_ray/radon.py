"""Sparse-view Radon noise: clean images -> filtered back projections from n_views projections.

    image [H, W] --project--> sinogram [N, A] --filter along N, back-project--> noisy [H, W]

Every step is linear, so each is a matrix, built once per noise spec and image shape and applied to
whole batches. It equals `skimage.transform.iradon(radon(x, theta, circle=False), theta)` with
linear interpolation, and is not clipped. Matrices and sinograms are float64: one view of 96 pixels
adds up 20 times the range of the image, and float32 sums would be 2e-5 off.
"""

import dataclasses
import functools
import json
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import fft, sparse

from snr_ray.config import FILTERS, InputError, NoiseConfig
from snr_ray.hashing import fingerprint

Array = npt.NDArray[np.float32]

DENSE_PIXELS = 32 * 32
"""Up to this many pixels one dense [H*W, H*W] product is faster than the sparse chain."""
BLOCK = 64
"""Images per sparse product: keeps the sinograms of a block near the cache."""


@dataclass(frozen=True, slots=True)
class NoiseSpec:
    """Every setting the noise depends on. The rest is fixed: theta = k * 180 / n_views degrees for
    k < n_views, circle=False, linear interpolation, float arithmetic, no clipping, no photon noise.

    Raises:
        InputError: if n_views < 1 or the filter is unknown.
    """

    n_views: int
    filter: str = "ramp"

    def __post_init__(self) -> None:
        if self.n_views < 1:
            raise InputError(f"n_views must be at least 1, but got {self.n_views}.")
        if self.filter not in FILTERS:
            raise InputError(
                f"filter must be one of {', '.join(FILTERS)}, but got {self.filter!r}."
            )

    @property
    def theta(self) -> npt.NDArray[np.float64]:
        """Projection angles [A] in degrees, in [0, 180), the end point excluded."""
        return np.arange(self.n_views) * 180.0 / self.n_views


def specs(config: NoiseConfig) -> list[NoiseSpec]:
    """Noise specs of a run in the order of their noise ids; entry k has noise id k + 1."""
    return [NoiseSpec(n_views, config.filter) for n_views in config.n_views]


def spec_hash(noise: list[NoiseSpec], size: int) -> str:
    """Key of a simulated data set: changes with anything its noise depends on."""
    fixed = {"circle": False, "interpolation": "linear", "clip": False, "photons": None}
    text = json.dumps([dataclasses.asdict(spec) | fixed for spec in noise] + [size], sort_keys=True)
    return fingerprint(text)


class RadonNoise:
    """The noise operator of one spec for images of one shape; calls on batches."""

    def __init__(self, spec: NoiseSpec, height: int, width: int) -> None:
        self.spec, self.height, self.width = spec, height, width
        self.n_bins = int(np.ceil(np.sqrt(2) * max(height, width)))
        angles = np.deg2rad(spec.theta)
        self._projection = _projection(height, width, self.n_bins, angles)
        self._filter = _filter(self.n_bins, spec.filter)
        self._back = _back_projection(height, width, self.n_bins, angles)
        self._dense: Array | None = None
        if height * width <= DENSE_PIXELS:
            self._dense = self._chain(np.eye(height * width)).astype(np.float32)

    def __call__(self, images: npt.NDArray[np.floating]) -> Array:
        """Noisy versions of clean images.

        Args:
            images: [..., H, W] float in [0, 1]; leading axes (batch, channel) are independent.

        Returns:
            [..., H, W] float32, not clipped.
        """
        if images.shape[-2:] != (self.height, self.width):
            raise InputError(
                f"This operator is for {self.height}x{self.width} images, but got "
                f"{images.shape[-2]}x{images.shape[-1]}."
            )
        flat = np.asarray(images, np.float32).reshape(-1, self.height * self.width)  # [B, H*W]
        if self._dense is not None:
            return (flat @ self._dense.T).reshape(images.shape)
        out = np.empty_like(flat)
        for start in range(0, len(flat), BLOCK):
            block = np.ascontiguousarray(flat[start : start + BLOCK].T, np.float64)
            out[start : start + BLOCK] = self._chain(block).T
        return out.reshape(images.shape)

    @property
    def nbytes(self) -> int:
        """Memory of the matrices in bytes."""
        parts = [m for s in (self._projection, self._back) for m in (s.data, s.indices, s.indptr)]
        dense = [] if self._dense is None else [self._dense]
        return sum(part.nbytes for part in (*parts, self._filter, *dense))

    def project(self, images: npt.NDArray[np.floating]) -> Array:
        """Sinograms [..., N, A] of images [..., H, W]: N detector bins, A angles."""
        flat = np.asarray(images, np.float64).reshape(-1, self.height * self.width)
        sinogram = (
            (self._projection @ flat.T)
            .T.astype(np.float32)
            .reshape(-1, self.spec.n_views, self.n_bins)
        )
        return sinogram.swapaxes(1, 2).reshape(*images.shape[:-2], self.n_bins, self.spec.n_views)

    def matrix(self) -> Array:
        """The whole operator as one dense matrix [H*W, H*W]: noisy = matrix @ clean."""
        if self._dense is not None:
            return self._dense
        n_pixels = self.height * self.width
        clean = np.eye(n_pixels, dtype=np.float32).reshape(n_pixels, self.height, self.width)
        return self(clean).reshape(n_pixels, n_pixels).T

    def _chain(self, columns: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Project, filter and back-project images that are the columns of [H*W, B]."""
        sinogram = self._projection @ columns  # [A*N, B]
        by_angle = sinogram.reshape(self.spec.n_views, self.n_bins, -1)
        filtered = self._filter @ by_angle  # [A, N, B]
        return self._back @ filtered.reshape(sinogram.shape)  # [H*W, B]


@functools.lru_cache(maxsize=32)
def operator(spec: NoiseSpec, height: int, width: int) -> RadonNoise:
    """The operator of one spec and shape, built at the first call in each process."""
    return RadonNoise(spec, height, width)


def _projection(
    height: int, width: int, n_bins: int, angles: npt.NDArray[np.float64]
) -> sparse.csr_array:
    """Sparse [A*N, H*W]: rotate about the pixel (H//2, W//2) with bilinear sampling, sum columns.

    Bilinear weights of the rotated grid are those of `skimage.transform.warp(order=1)`.
    """
    center = n_bins // 2
    row, column = np.mgrid[:n_bins, :n_bins].astype(np.float64).reshape(2, -1)
    bins = column.astype(np.int32)
    per_angle = []
    for angle in angles:
        cos, sin = np.cos(angle), np.sin(angle)
        # Position in the image that the rotated grid point (row, column) samples.
        x = cos * column + sin * row - center * (cos + sin - 1) - (center - width // 2)
        y = -sin * column + cos * row - center * (cos - sin - 1) - (center - height // 2)
        left, top = np.floor(x).astype(np.int32), np.floor(y).astype(np.int32)
        dx, dy = x - left, y - top
        pixels, weights, targets = [], [], []
        for j, i, weight in (
            (left, top, (1 - dx) * (1 - dy)),
            (left + 1, top, dx * (1 - dy)),
            (left, top + 1, (1 - dx) * dy),
            (left + 1, top + 1, dx * dy),
        ):
            inside = (j >= 0) & (j < width) & (i >= 0) & (i < height)
            pixels.append(i[inside] * width + j[inside])
            weights.append(weight[inside])
            targets.append(bins[inside])
        entries = (np.concatenate(weights), (np.concatenate(targets), np.concatenate(pixels)))
        shape = (n_bins, height * width)
        per_angle.append(sparse.coo_array(entries, shape=shape).tocsr())
    return sparse.vstack(per_angle, format="csr")


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
    impulses = fft.fft(np.eye(size, n_bins), axis=0)
    return np.real(fft.ifft(impulses * response[:, None], axis=0))[:n_bins]


def _back_projection(
    height: int, width: int, n_bins: int, angles: npt.NDArray[np.float64]
) -> sparse.csr_array:
    """Sparse [H*W, A*N]: each pixel interpolates its ray's bin linearly; rays outside count 0."""
    y = np.repeat(np.arange(height) - height // 2, width)
    x = np.tile(np.arange(width) - width // 2, height)
    pixel = np.arange(height * width)
    scale = np.pi / (2 * len(angles))
    per_angle = []
    for angle in angles:
        t = x * np.cos(angle) - y * np.sin(angle) + n_bins // 2  # position in bins
        inside = (t >= 0) & (t <= n_bins - 1)
        low = np.minimum(np.floor(t[inside]).astype(np.int32), n_bins - 2)
        weight = t[inside] - low
        entries = (
            np.concatenate([1 - weight, weight]) * scale,
            (np.tile(pixel[inside], 2), np.concatenate([low, low + 1])),
        )
        shape = (height * width, n_bins)
        per_angle.append(sparse.coo_array(entries, shape=shape).tocsr())
    return sparse.hstack(per_angle, format="csr")
