"""Images that need no download: letters in matplotlib's fonts, crops of scikit-image's photographs.

An image is a function of its id alone, so it is the same on every machine and in every run.
"""

import functools
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from snr_ray.hashing import hash64

Pixels = npt.NDArray[np.uint8]

GLYPH_CANVAS = 84
"""Side of a rendered glyph in pixels; three times notMNIST's, so that resizing antialiases."""
GLYPH_VARIANTS = 40
"""Random placements of each letter of each font."""
PHOTOS = ("astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel",
          "motorcycle_left", "rocket")  # fmt: skip
PHOTO_CELL = 96
"""Photographs are cut in cells of this side; a cell is one source image, so splits never share."""
PHOTO_CROPS = 16
"""Random crops per cell."""


def glyph_ids() -> list[str]:
    """LETTER/FONT/VARIANT.png for letters A to J in every text font that matplotlib ships."""
    # The other fonts hold pieces of formulas in the places of letters, or lack some.
    fonts = sorted(
        path.stem
        for path in _fonts().glob("*.ttf")
        if path.name.startswith(("DejaVu", "STIXGeneral", "cmb", "cmmi", "cmr", "cms", "cmt"))
        and "Display" not in path.name
    )
    return [
        f"{letter}/{font}/{variant:03d}.png"
        for font in fonts
        for letter in "ABCDEFGHIJ"
        for variant in range(GLYPH_VARIANTS)
    ]


def draw_glyph(name: str) -> Pixels:
    """The letter of an id, shifted, scaled and slanted: [84, 84] uint8, white on black."""
    letter, font_name, _ = name.split("/")
    rng = np.random.default_rng(hash64(name))
    extent, slant = rng.uniform(0.65, 0.88) * GLYPH_CANVAS, rng.uniform(-0.2, 0.2)
    shift = rng.uniform(-0.05, 0.05, 2) * GLYPH_CANVAS
    # Fonts disagree on ascent and width, so the ink itself is scaled and centred.
    left, top, right, bottom = _font(font_name, GLYPH_CANVAS).getbbox(letter)
    font = _font(font_name, round(GLYPH_CANVAS * extent / max(right - left, bottom - top)))
    left, top, right, bottom = font.getbbox(letter)
    center = GLYPH_CANVAS / 2
    image = Image.new("L", (GLYPH_CANVAS, GLYPH_CANVAS))
    place = (center + shift[0] - (left + right) / 2, center + shift[1] - (top + bottom) / 2)
    ImageDraw.Draw(image).text(place, letter, fill=255, font=font)
    shear = (1, slant, -slant * center, 0, 1, 0)
    sheared = image.transform(image.size, Image.Transform.AFFINE, shear, Image.Resampling.BILINEAR)
    return np.asarray(sheared)


def photo_ids() -> list[str]:
    """PHOTO/ROW-COLUMN/CROP.png for every cell of every photograph."""
    ids = []
    for name in PHOTOS:
        with Image.open(_photo_file(name)) as image:
            columns, rows = (side // PHOTO_CELL for side in image.size)
        ids += [
            f"{name}/{row:02d}-{column:02d}/{crop:02d}.png"
            for row in range(rows)
            for column in range(columns)
            for crop in range(PHOTO_CROPS)
        ]
    return ids


def crop_photo(name: str) -> Pixels:
    """The crop of an id, a random square inside its cell: [side, side, 3] uint8, side 48 to 96."""
    photo, cell, _ = name.split("/")
    top, left = (int(part) * PHOTO_CELL for part in cell.split("-"))
    rng = np.random.default_rng(hash64(name))
    side = int(rng.integers(PHOTO_CELL // 2, PHOTO_CELL + 1))
    y, x = rng.integers(0, PHOTO_CELL - side + 1, 2)
    return _photo(photo)[top + y : top + y + side, left + x : left + x + side]


def group(name: str) -> str:
    """What must stay in one split: variants of one letter and font, crops of one cell."""
    return name.rpartition("/")[0]


def _fonts() -> Path:
    import matplotlib  # slow to import, and images of users do without

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"


@functools.lru_cache(maxsize=256)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_fonts() / f"{name}.ttf", size)


def _photo_file(name: str) -> Path:
    import skimage.data

    folder = Path(skimage.data.__file__).parent
    return next(p for p in sorted(folder.glob(f"{name}.*")) if p.suffix in (".png", ".jpg"))


@functools.lru_cache(maxsize=4)
def _photo(name: str) -> Pixels:
    with Image.open(_photo_file(name)) as image:
        return np.asarray(image.convert("RGB"))
