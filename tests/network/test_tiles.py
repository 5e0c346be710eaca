"""Tiles cut and joined give back what a local function makes of the whole."""

import numpy as np
import pytest
from scipy.ndimage import uniform_filter

from snr_ray.network.tiles import OVERLAP, TILE, in_tiles

SIDES = (5, TILE, TILE + 1, 2 * TILE - OVERLAP, 3 * TILE + 17)


@pytest.mark.parametrize("height", SIDES)
@pytest.mark.parametrize("width", SIDES)
def test_tiles_give_back_the_image(height: int, width: int) -> None:
    image = np.random.default_rng(0).random((1, height, width), dtype=np.float32)
    sizes = set()

    def same(tiles: np.ndarray) -> np.ndarray:
        sizes.add(tiles.shape[2:])
        return tiles

    np.testing.assert_allclose(in_tiles(image, same), image, rtol=1e-5)
    assert sizes == {(min(height, TILE), min(width, TILE))}


def test_seams_of_a_local_filter_do_not_show() -> None:
    image = np.random.default_rng(0).random((3, TILE + 200, TILE + 300), dtype=np.float32)

    def blur(tiles: np.ndarray) -> np.ndarray:
        return uniform_filter(tiles, (0, 0, 9, 9), mode="nearest")

    whole = blur(image[None])[0]
    assert np.abs(in_tiles(image, blur) - whole).max() < 0.06  # an edge of a tile sees less
    assert np.abs(in_tiles(image, blur) - whole).mean() < 1e-3
