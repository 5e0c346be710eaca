"""How many images go through the loops together, and what memory that takes; nothing is compiled
here, so that who only counts need not wait for the compiler."""

import numpy as np

LANES = 16
"""Images of one vector; the widest registers there are hold 16 float32 numbers."""
FEW = 4
"""Images of a short vector: a batch of a few pays for no more than it has."""
MAX_BLOCK = 4 * LANES
"""Images of a block: weights and the sums of so many stay in registers."""
BLOCK_BYTES = 64 * 2**20
"""Memory for the pixels of the images that go through the loops together, if more than one."""


def working_bytes(height: int, width: int, n_views: int, n_images: int = 1) -> int:
    """Memory in bytes, about, to make the noise of so many images of a shape: what the loops and
    the filter hold at a time, and the images that go in and come out."""
    block, bins = block_width(min(n_images, block_of(height, width))), n_bins_of(height, width)
    kept = 2 * 4 * n_views * bins
    return 4 * (height * width * (block + 2 * n_images) + 2 * n_views * bins * block) + kept


def n_bins_of(height: int, width: int) -> int:
    """Detector bins of a view: the diagonal of a square image holds its rays."""
    return int(np.ceil(np.sqrt(2) * max(height, width)))


def block_of(height: int, width: int) -> int:
    """Images of a block: a whole number of vectors, or as many as fit, or a single one."""
    fits = BLOCK_BYTES // (4 * height * width)
    return next(n for n in (MAX_BLOCK, LANES, FEW, 1) if n <= max(1, fits))


def block_width(n: int) -> int:
    """Columns of a block for n images: n filled up to vectors."""
    if n == 1:
        return 1
    unit = FEW if n <= LANES - FEW else LANES
    return -(-n // unit) * unit
