"""Sparse-view Radon noise: clean images -> filtered back projections from n_views projections.

    image [H, W] --project--> sinogram [N, A] --filter along N, back-project--> noisy [H, W]

It equals `skimage.transform.iradon(radon(x, theta, circle=False), theta)` with linear
interpolation, and is not clipped. No weight is stored: the compiled loops of `rays` compute each
where it is used, for a block of images at once, so an operator costs nothing to build or keep.

Arithmetic is float32. One view of 96 pixels adds up 20 times the range of the image, and sums that
large would be 2e-5 off: half the range is subtracted before the sums, and its response, known in
float64, added after the filter, where sums are small again.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from snr_ray.config import VIEWS_PER_PIXEL
from snr_ray.errors import InputError, check
from snr_ray.noise.blocks import block_of, block_width, n_bins_of, n_turns, working_bytes
from snr_ray.noise.filters import filtered
from snr_ray.noise.rays import (
    back_project,
    back_project_transposed,
    empty,
    fill,
    flat_sinogram,
    project,
    project_transposed,
    tiles,
)
from snr_ray.noise.spec import NoiseSpec, noise_specs, spec_hash
from snr_ray.noise.sums import Block, scratch
from snr_ray.noise.turns import Turns

__all__ = [
    "NoiseSpec",
    "RadonNoise",
    "n_bins_of",
    "noise_operator",
    "noise_specs",
    "spec_hash",
    "working_bytes",
]

Array = npt.NDArray[np.float32]
Exponents = npt.NDArray[np.int32]

MIN_SIZE = 4
"""Smaller images have no rays to speak of."""
KEPT_BYTES = 2**20
"""An operator keeps what it can compute again up to so many bytes."""
OFFSET = 0.5
"""Subtracted from pixels before sums: the middle of the range. Images that are nowhere as far from
0 are scaled for the sums, where it would swamp them: one that reaches 0.02 would be 6e-5 of its
range off."""
WITHIN = (-0.25, 2.0)
"""Pixels of which photons can be counted: resampled ones are a little beyond [0, 1], and of others
more arrive than left, or none."""
ATTENUATION = 4.0
"""Line integral of a white image along its longer side, where photons are counted: e^-4 of them
arrive. It is that of 20 cm of water at 70 keV (0.19 per cm; Hubbell and Seltzer, NIST XCOM)."""


class RadonNoise:
    """The noise operator of one spec for images of one shape; calls on batches.

    Attributes:
        n_bins: N, detector bins of a view.
        angles: [A] in radians.
    """

    def __init__(self, spec: NoiseSpec, height: int, width: int) -> None:
        """Of a spec, for images of a shape.

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
        self.n_bins = n_bins_of(height, width)
        self.angles = np.deg2rad(spec.theta)
        self._kept: tuple[Array, Array] | None = None

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
            InputError: if images have another shape, are integers, hold NaN or infinity, or lie
                beyond WITHIN where photons are counted.
        """
        flat = self._checked(images)
        if not self.spec.photons:
            return self._times(flat).reshape(images.shape)
        out = np.empty_like(flat)
        for rows, sinogram in self._counted(flat, images, seeds):
            self._reconstruct(sinogram, out[rows])
        return out.reshape(images.shape)

    def times(self, images: npt.NDArray[np.floating]) -> Array:
        """The linear map alone, of images [..., H, W] of any values: [..., H, W] float32."""
        return self._times(self._flatten(images)).reshape(images.shape)

    def _times(self, flat: Array) -> Array:
        flat, exponents = _as_bright(flat)
        out = np.empty_like(flat)
        for rows in self._blocks(len(flat)):
            self._reconstruct(self._sinograms(project, flat[rows], OFFSET), out[rows])
        return _as_faint(out, exponents)

    def transposed(self, images: npt.NDArray[np.floating]) -> Array:
        """The transpose of `times`: of gradients [..., H, W] by noisy images, those by clean ones,
        float32."""
        flat = self._flatten(images)
        out = np.empty_like(flat)
        for rows in self._blocks(len(flat)):
            sinogram = self._sinograms(back_project_transposed, flat[rows], 0.0)
            clean = self._filtered(sinogram)
            self._images(project_transposed, clean, out[rows])
        return out.reshape(images.shape)

    @property
    def nbytes(self) -> int:
        """Memory in bytes of what the operator computes once, if at most KEPT_BYTES."""
        return self.angles.nbytes + 2 * 4 * self.spec.n_views * self.n_bins

    @property
    def block(self) -> int:
        """Images that go through the loops together."""
        return block_of(self.height, self.width)

    def project(
        self, images: npt.NDArray[np.floating], seeds: Sequence[int] | None = None
    ) -> Array:
        """Sinograms [..., N, A] of images [..., H, W]: N detector bins, A angles; as a detector
        counts them where there are spec.photons. Arguments and errors are those of a call."""
        flat = self._checked(images)
        out = np.empty((len(flat), self.n_bins, self.spec.n_views), np.float32)
        exponents = None
        if self.spec.photons:
            parts = self._counted(flat, images, seeds)
        else:
            flat, exponents = _as_bright(flat)
            parts = ((rows, self._sinograms(project, flat[rows], OFFSET))
                     for rows in self._blocks(len(flat)))  # fmt: skip
        for rows, sinogram in parts:
            sinogram += self._flat[0][..., None]
            out[rows] = sinogram.T[: len(out[rows])]
        return _as_faint(out, exponents).reshape(*images.shape[:-2], *out.shape[1:])

    def matrix(self) -> Array:
        """The whole operator as one dense matrix [H*W, H*W]: noisy = matrix @ clean."""
        n_pixels = self.height * self.width
        columns = np.empty((n_pixels, self.height, self.width), np.float32)
        identity = np.eye(n_pixels, dtype=np.float32).reshape(columns.shape)
        for rows in self._blocks(n_pixels):
            self._reconstruct(self._sinograms(project, identity[rows], 0.0), columns[rows], 0.0)
        return columns.reshape(n_pixels, n_pixels).T

    def _checked(self, images: npt.NDArray[np.floating]) -> Array:
        flat = self._flatten(images)
        with np.errstate(over="ignore", invalid="ignore"):
            total = flat.sum()  # one number in place of an array of answers
        if not np.isfinite(total):
            check(
                bool(np.isfinite(images).all()),
                "Images must be finite, but some hold NaN or infinity.",
            )
            raise InputError(
                f"Images must have white at 1, but some values are near "
                f"{np.abs(images).max():.1g}, whose sums are no numbers any more; divide by the "
                "value that means white."
            )
        return flat

    def _flatten(self, images: npt.NDArray[np.floating]) -> Array:
        """Images as [B, H, W] float32."""
        check(
            images.shape[-2:] == (self.height, self.width),
            f"This operator is for {self.height}x{self.width} images, but got "
            f"{'x'.join(map(str, images.shape[-2:]))}.",
        )
        if not np.issubdtype(images.dtype, np.floating):
            raise InputError(
                f"Images must be float in [0, 1], but got {images.dtype}; divide by the value "
                "that means white."
            )
        with np.errstate(over="ignore"):  # infinity, which is checked
            flat = np.ascontiguousarray(images, np.float32)
        return flat.reshape(-1, self.height, self.width)

    def _blocks(self, n: int) -> list[slice]:
        return [slice(k, min(k + self.block, n)) for k in range(0, n, self.block)]

    @functools.cached_property
    def _its_turns(self) -> Turns:
        return Turns.of(self.height, self.width, self.spec.n_views)

    def _turns(self, n_images: int) -> Turns | None:
        """How so many images are turned, None if they stay as they are."""
        half_turn = self.spec.angle_range == 180
        turns = n_turns(self.height, self.width, n_images) > 1 and half_turn
        return self._its_turns if turns else None

    def _sinograms(self, loop: Callable[..., None], flat: Array, offset: float) -> Block:
        """Sinograms [A, N, B], B at least n, that a loop makes of images [n, H, W] less an
        offset; those from n on are 0."""
        n_images, turns, n_views = len(flat), self._turns(len(flat)), self.spec.n_views
        if turns is not None:
            flat, offset, n_views = turns.turn(flat, offset), 0.0, turns.n_views
        shape, columns = flat.shape[1:], block_width(len(flat))
        pixels = scratch("pixels", math.prod(shape), columns)
        fill(flat, np.float32(offset), tiles(*shape, columns), pixels)
        sinogram = self._scratch("seen", n_views, columns)
        sinogram[:] = 0
        self._loop(loop, pixels, sinogram, shape)
        if turns is None:
            return sinogram
        whole = self._scratch("sinogram", self.spec.n_views, block_width(n_images))
        return turns.gather(sinogram, n_images, whole)

    def _images(self, loop: Callable[..., None], sinogram: Block, out: Array) -> None:
        """Images [n, H, W] that a loop makes of sinograms [A, N, B], times the weight of a view."""
        turns, made = self._turns(len(out)), out
        if turns is not None:
            made = np.empty((turns.n * len(out), *turns.shape), np.float32)
            columns = block_width(len(made))
            parts = self._scratch("seen", turns.n_views, columns)
            sinogram = turns.spread(sinogram, len(out), parts)
        shape, columns = made.shape[1:], sinogram.shape[2]
        pixels = scratch("pixels", math.prod(shape), columns)
        pixels[:] = 0
        self._loop(loop, pixels, sinogram, shape)
        weight = np.float32(np.pi / (2 * self.spec.n_views))
        empty(pixels, weight, tiles(*shape, columns), made)
        if turns is not None:
            out[:] = turns.sum(made)

    def _loop(
        self, loop: Callable[..., None], pixels: Block, sinogram: Block, shape: tuple[int, ...]
    ) -> None:
        """Run a loop between pixels [H*W, B] of a shape and sinograms [A, N, B]."""
        columns, angles = pixels.shape[1], self.angles[: len(sinogram)]
        first, last = pixels, sinogram.reshape(-1, columns)
        if loop in (back_project, back_project_transposed):
            first, last = last, first
        loop(first, tiles(*shape, columns), angles, shape, self.n_bins, last)

    def _scratch(self, name: str, n_views: int, columns: int) -> Block:
        return scratch(name, n_views, self.n_bins, columns)

    def _filtered(self, sinogram: Block) -> Block:
        return filtered(sinogram, self.spec.filter, self._scratch("filtered", *sinogram.shape[::2]))

    def _reconstruct(self, sinogram: Block, out: Array, offset: float = OFFSET) -> None:
        """Images [n, H, W] of sinograms [A, N, B] of images less an offset."""
        clean = self._filtered(sinogram)
        if offset:
            clean += self._flat[1][..., None]
        self._images(back_project, clean, out)

    @property
    def _flat(self) -> tuple[Array, Array]:
        """Projections [A, N] of an image that is OFFSET everywhere, before and after the filter:
        kept where they are small."""
        if self._kept is None:
            flat = self._flat_projections()
            if self.nbytes > KEPT_BYTES:
                return flat
            self._kept = flat
        return self._kept

    def _flat_projections(self) -> tuple[Array, Array]:
        flat = np.empty((self.spec.n_views, self.n_bins))
        flat_sinogram(self.angles, (self.height, self.width), self.n_bins, flat)
        flat *= OFFSET
        clean = filtered(flat[..., None], self.spec.filter, np.empty_like(flat)[..., None])
        return flat.astype(np.float32), clean[..., 0].astype(np.float32)

    def _counted(
        self, flat: Array, images: npt.NDArray[np.floating], seeds: Sequence[int] | None
    ) -> Iterator[tuple[slice, Array]]:
        """Sinograms [A, N, B] of blocks of planes [B, H, W], less the flat one, as counted."""
        low, high = WITHIN
        least, most = float(flat.min(initial=0)), float(flat.max(initial=0))
        check(
            low <= least and most <= high,
            f"Images whose photons are counted must have black at 0 and white at 1, but got values "
            f"from {least:.3g} to {most:.3g}; scale them first.",
        )
        n_planes = len(flat) // max(1, len(images)) if images.ndim > 2 else 1
        for rows in self._blocks(len(flat)):
            sinogram = self._sinograms(project, flat[rows], OFFSET)
            for column in range(len(flat[rows])):
                place, plane = divmod(rows.start + column, n_planes)
                seed = place if seeds is None else seeds[place]
                rng = np.random.default_rng([seed, plane, self.spec.n_views])
                sinogram[..., column] = self._measured(sinogram[..., column], rng)
            yield rows, sinogram

    def _measured(self, sinogram: Array, rng: np.random.Generator) -> Array:
        """One sinogram [A, N] less the flat one as a detector counts it: I ~ Poisson(I_0 exp(-p)),
        then p = -ln(I / I_0).

        A bin that counts no photon counts one. Source: Buzug, Computed Tomography (2008), 2.4.
        """
        scale, flat = ATTENUATION / max(self.height, self.width), self._flat[0]
        expected = np.exp(-scale * (sinogram.astype(np.float64) + flat))
        counts = rng.poisson(self.spec.photons * expected)
        measured = -np.log(np.maximum(counts, 1) / self.spec.photons) / scale - flat
        return measured.astype(np.float32)


def _as_bright(flat: Array) -> tuple[Array, Exponents | None]:
    """Images [B, H, W], the faint ones times the power of two that brings their farthest pixel to
    half the range or more, which is exact; and the exponents [B], None if none is faint."""
    if not len(flat):
        return flat, None
    farthest = np.maximum(flat.max((1, 2)), -flat.min((1, 2)))
    if farthest.min() >= OFFSET:
        return flat, None
    exponents = np.where(farthest < OFFSET, np.frexp(farthest)[1], 0)
    return np.ldexp(flat, -exponents[:, None, None]), exponents


def _as_faint(made: Array, exponents: Exponents | None) -> Array:
    """What was made of images [B, ...] that `_as_bright` scaled, as that of the images."""
    if exponents is None:
        return made
    return np.ldexp(made, exponents.reshape(-1, *[1] * (made.ndim - 1)))


@functools.lru_cache(maxsize=256)
def noise_operator(spec: NoiseSpec, height: int, width: int) -> RadonNoise:
    """The operator of one spec and shape: a few kB each, at most 256 MB in all."""
    return RadonNoise(spec, height, width)
