"""Noise as a continuum: every view count of a range that is relative to the size of the image.

What streaks look like depends on views per pixel of the longer side far more than on the size, so
one model serves the sizes and view counts of one range.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from snr_ray.config import NoiseConfig
from snr_ray.noise.spec import NoiseSpec


@dataclass(frozen=True)
class ViewRange:
    """All whole view counts from low to high times the longer side of an image, in pixels."""

    low: float
    high: float
    filter: str = "ramp"
    angle_range: float = 180.0

    @classmethod
    def of(cls, config: NoiseConfig) -> "ViewRange | None":
        """The range of a configuration; None where it lists view counts."""
        if config.views_per_pixel is None:
            return None
        return cls(*config.views_per_pixel, config.filter, config.angle_range)

    def spec(self, n_views: int) -> NoiseSpec:
        """The noise of a view count."""
        return NoiseSpec(n_views, self.filter, self.angle_range)

    def counts(self, side: int) -> tuple[int, int]:
        """The least and the most views of images whose longer side has so many pixels."""
        least = max(1, round(self.low * side))
        return least, max(least, round(self.high * side))

    def draw(
        self, side: int, shape: tuple[int, int], rng: np.random.Generator
    ) -> npt.NDArray[np.int64]:
        """View counts [rows, n] drawn from the range, the most first; one from each of n parts.

        The parts are equal on a logarithmic scale, as is the choice within each: from 10 views to
        20 is as far as from 20 to 40.
        """
        least, most = self.counts(side)
        places = (np.arange(shape[1]) + rng.random(shape)) / shape[1]
        drawn: npt.NDArray[np.float64] = most * (least / most) ** places
        return drawn.round().astype(np.int64)
