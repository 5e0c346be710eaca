"""Large images as several that are turned, each seen in a part of the views.

With the origin at the centre pixel, which views of images with an odd number of rows and columns
have as their axis of symmetry, a view of a turned image is another view of the image:

    mirrored left to right         the view at 180 - theta
    a quarter turn clockwise       the view at theta + 90

So a square image and three turned ones, side by side in a block, need the views up to 45 degrees
alone, and what is computed of a weight serves all four. A single image of 512 pixels takes a third
of the time, four of them half to two thirds. Images get a row or a column of zeros to be odd.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Places = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Turns:
    """How images of one shape and so many views over 180 degrees are turned."""

    height: int
    width: int
    turns: Places
    """The turned image that has each of the views, [A]."""
    views: Places
    """Which of the first views it is there, [A]."""

    @classmethod
    def of(cls, height: int, width: int, n_views: int) -> "Turns":
        """Those of a shape."""
        view = np.arange(n_views)
        if height != width or n_views % 2:  # a quarter turn is no whole number of views
            mirrored = view > n_views // 2
            return cls(height, width, 1 * mirrored, np.where(mirrored, n_views - view, view))
        half = n_views // 2
        turned, within = view >= half, view % half
        mirrored = within > half // 2
        # The view at 90 degrees less theta is that at theta of what is mirrored and then turned.
        return cls(
            height,
            width,
            np.where(turned, np.where(mirrored, 1, 2), np.where(mirrored, 3, 0)),
            np.where(mirrored, half - within, within),
        )

    @property
    def n(self) -> int:
        """Turned images of each image."""
        return int(self.turns.max()) + 1

    @property
    def n_views(self) -> int:
        """Views of each of them, the first of the image's."""
        return int(self.views.max()) + 1

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of turned images: the odd ones."""
        return self.height | 1, self.width | 1

    def turn(self, images: Array, offset: float) -> Array:
        """Images [n, H, W] less an offset, all of them as they are, then all mirrored ...:
        [turns n, *shape]."""
        odd = np.zeros((len(images), *self.shape), np.float32)
        np.subtract(images, np.float32(offset), out=odd[:, : self.height, : self.width])
        return np.concatenate([_turned(odd, k) for k in range(self.n)])

    def sum(self, turned: Array) -> Array:
        """The transpose of `turn`: [turns n, *shape] -> [n, H, W]."""
        parts = turned.reshape(self.n, -1, *self.shape)
        total = parts[0].copy()
        for k in range(1, self.n):
            total += _back(parts[k], k)
        return total[:, : self.height, : self.width]

    def gather(self, sinograms: Array, n_images: int, out: Array) -> Array:
        """Sinograms [A, N, B] of images from those of turned ones [views, N, turns n ...]."""
        out[..., n_images:] = 0
        for k in range(self.n):
            its = self.turns == k
            out[its, :, :n_images] = sinograms[
                self.views[its], :, k * n_images : (k + 1) * n_images
            ]
        return out

    def spread(self, sinograms: Array, n_images: int, out: Array) -> Array:
        """The transpose of `gather`."""
        out[:] = 0
        for k in range(self.n):
            its = self.turns == k
            out[self.views[its], :, k * n_images : (k + 1) * n_images] = sinograms[
                its, :, :n_images
            ]
        return out


def _turned(images: Array, turn: int) -> Array:
    """As it is, mirrored, turned, mirrored and then turned."""
    mirrored = images[..., ::-1] if turn in (1, 3) else images
    return np.rot90(mirrored, -1, axes=(1, 2)) if turn >= 2 else mirrored


def _back(images: Array, turn: int) -> Array:
    turned = np.rot90(images, 1, axes=(1, 2)) if turn >= 2 else images
    return turned[..., ::-1] if turn in (1, 3) else turned
