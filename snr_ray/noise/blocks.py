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

TURNED_PIXELS = 2**16
"""Images from so many pixels on are turned where few come together."""
TURNED = 2 * LANES
"""Turned images of a block at most; more images fill the vectors by themselves."""


def n_turns(height: int, width: int, n_images: int) -> int:
    """Turned images of each of n images of a shape (see `turns`): 4, 2, or 1 for the image itself.

    Rays have as many samples as there are bins. Where these are even there is one more on one side
    than on the other, which may meet a corner, and mirrored it would not.
    """
    turns = 4 if height == width else 2
    small = height * width < TURNED_PIXELS
    many = n_images * turns > TURNED
    large = 4 * turns * height * width > BLOCK_BYTES
    return 1 if small or many or large or n_bins_of(height, width) % 2 == 0 else turns


def working_bytes(height: int, width: int, n_views: int, n_images: int = 1) -> int:
    """Memory in bytes, about, to make the noise of so many images of a shape: what the loops and
    the filter hold at a time, and the images that go in and come out."""
    together, bins = min(n_images, block_of(height, width)), n_bins_of(height, width)
    turns = n_turns(height, width, together)
    block, columns = block_width(turns * together), block_width(together)
    copies = 0 if turns == 1 else 2 * block  # the turned images, and those that come back
    pixels = height * width * (block + copies + 2 * n_images)
    sinograms = n_views * bins * (2 * columns + (0 if turns == 1 else -(-block // turns)))
    return 4 * (pixels + sinograms) + 2 * 4 * n_views * bins


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
