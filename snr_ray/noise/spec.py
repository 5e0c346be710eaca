"""What noise depends on, in words and numbers; the loops that make it are in `operator`."""

import dataclasses
import json
import math
import numbers
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from snr_ray.config import FILTERS, LEAST_ANGLES, MOST_PHOTONS, NoiseConfig
from snr_ray.errors import check
from snr_ray.hashing import fingerprint, hash64


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
    """Degrees that the views are spread over, at least 1; below 180, a limited-angle scan."""
    photons: int = 0
    """Photons that leave the source per detector bin and view; 0 counts none (no noise)."""

    def __post_init__(self) -> None:
        check(
            isinstance(self.n_views, numbers.Integral) and not isinstance(self.n_views, bool),
            f"n_views must be a whole number of views, but got {self.n_views!r}.",
        )
        check(self.n_views >= 1, f"n_views must be at least 1, but got {self.n_views}.")
        check(
            isinstance(self.filter, str) and self.filter in FILTERS,
            f"filter must be one of {', '.join(FILTERS)}, but got {self.filter!r}.",
        )
        check(
            _is_number(self.angle_range) and LEAST_ANGLES <= self.angle_range <= 180,
            f"angle_range must be from {LEAST_ANGLES:g} to 180 degrees, but got "
            f"{self.angle_range!r}.",
        )
        whole = _is_number(self.photons) and self.photons in (math.inf, self.photons // 1)
        check(whole, f"photons must be a whole number, but got {self.photons!r}.")
        check(self.photons >= 0, f"photons must not be negative, but got {self.photons}.")
        check(
            self.photons <= MOST_PHOTONS,
            f"photons must be at most {MOST_PHOTONS:.0e}, but got {self.photons:g}.",
        )
        # As Python's own: NumPy's small integers overflow, and equal specs are to have one hash.
        for name, kind in _KINDS:
            object.__setattr__(self, name, kind(getattr(self, name)))

    @property
    def theta(self) -> npt.NDArray[np.float64]:
        """Projection angles [A] in degrees, in [0, angle_range), the end point excluded."""
        return np.arange(self.n_views) * self.angle_range / self.n_views


_KINDS = (("n_views", int), ("filter", str), ("angle_range", float), ("photons", int))


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


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


def photon_seeds(names: Iterable[str]) -> list[int]:
    """Seeds of the photon noise of images, by their ids: the same wherever it is made."""
    return [hash64(f"photons/{name}") for name in names]
