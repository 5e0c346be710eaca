"""Large images in overlapping tiles, for networks that see no further than their kernels reach."""

import itertools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

TILE = 512
"""Height and width of a tile."""
OVERLAP = 64
"""Pixels that neighbours share; their answers fade into each other there."""


def in_tiles(image: Array, make: Callable[[Array], Array]) -> Array:
    """An image [C, H, W] made tile by tile: `make` takes and gives [B, C, h, w].

    Tiles of an edge reach back into the image, so that all have the same size.
    """
    height, width = image.shape[1:]
    total, weight = np.zeros_like(image), np.zeros((height, width), np.float32)
    for top, left in itertools.product(_starts(height), _starts(width)):
        place = (slice(top, min(top + TILE, height)), slice(left, min(left + TILE, width)))
        made = make(np.ascontiguousarray(image[:, *place])[None])[0]
        fade = np.outer(_fade(made.shape[1]), _fade(made.shape[2]))
        total[:, *place] += fade * made
        weight[place] += fade
    return total / weight


def _starts(side: int) -> list[int]:
    """First pixels of the tiles along one side."""
    if side <= TILE:
        return [0]
    step = TILE - OVERLAP
    return [*range(0, side - TILE, step), side - TILE]


def _fade(side: int) -> Array:
    """Weights along a tile: rising over what its neighbours have, too."""
    ramp = np.arange(1, side + 1, dtype=np.float32)
    return np.minimum(np.minimum(ramp, ramp[::-1]), OVERLAP)
