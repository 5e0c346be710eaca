"""TIFF <-> stored pixels: every tag that says what numbers mean is obeyed, or the file refused.

    page --tifffile--> samples --photometric, extra samples, bits--> grey or RGB --turned--> upright

Pages are pictures of their own and are written back as a stack, with resolution, colour profile,
compression and place on the map; thumbnails and masks beside them are left out.
"""

import functools
import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image
from tifffile import COMPRESSION, PHOTOMETRIC, PLANARCONFIG

from snr_ray.errors import InputError
from snr_ray.images.formats.pixels import Contents, Made, Stored, Values, turn, without_alpha

COLOURS = {
    PHOTOMETRIC.MINISBLACK: 1,
    PHOTOMETRIC.MINISWHITE: 1,
    PHOTOMETRIC.PALETTE: 1,
    PHOTOMETRIC.RGB: 3,
    PHOTOMETRIC.YCBCR: 3,
    PHOTOMETRIC.SEPARATED: 4,
}
"""Samples of a pixel, without extra ones, of the kinds that are read."""
WRITTEN_AS = {
    COMPRESSION.NONE: None,
    COMPRESSION.LZW: "lzw",
    COMPRESSION.ZSTD: "zstd",
    COMPRESSION.PACKBITS: "packbits",
}
"""What a result is compressed with; all else becomes zlib, which like these loses nothing."""
MOST_PACKED = 2**14
"""Bytes of pixels that a byte of a file may become; of blank pages in Zstandard, the best packed,
a few thousand."""
SMALL = 2**24
_XMP, _NOTHING = 700, 42113
KEPT_TAGS = (
    271, 272, 305, 306, 315, 33432,  # make, model, software, date, artist, copyright
    _XMP,  # what else programs say of it, as XMP
    33550, 33922, 34264, 34735, 34736, 34737, 42112,  # place on the map
    _NOTHING,
)  # fmt: skip
_ALPHA = (1, 2)  # associated or not, in tag 338
_BESIDE = 0b101  # reduced images and masks, in tag 254
_JPEG = (COMPRESSION.OJPEG, COMPRESSION.JPEG)
_FAX = (COMPRESSION.CCITTRLE, COMPRESSION.CCITTFAX3, COMPRESSION.CCITTFAX4, COMPRESSION.CCIRLEW)


def read(data: bytes, name: str) -> Contents:
    """All pictures of a file.

    Raises:
        InputError: for kinds of pixels that are not known, or transparent ones.
    """
    with tifffile.TiffFile(io.BytesIO(data), name=name) as file:
        pages = [page for page in file.pages if not int(page.subfiletype) & _BESIDE]
        frames: list[Stored] = []
        options: list[dict[str, Any]] = []
        for page in pages or file.pages[:1]:
            _check_size(page, len(data), name)
            _check_whole(page, len(data), name)
            for samples in _samples(file, page, len(pages)):
                frames.append(_meant(samples, page, data, name))
                options.append(_options(page, frames[-1]))
        big, order = file.is_bigtiff, file.byteorder

    return Contents(frames, functools.partial(_rewrite, options, big, order))


def _rewrite(
    options: list[dict[str, Any]], big: bool, order: str, values: Sequence[Values], made: Made
) -> bytes:
    # Packed numbers are the same bytes in either order, but tifffile swaps them.
    packed = any("bitspersample" in mine for mine in options)
    return write(values, options, bigtiff=big, byteorder="<" if packed else order)


def write(
    pages: Sequence[Values], options: Sequence[dict[str, Any]] | None = None, **of_file: Any
) -> bytes:
    """A file of pictures [H, W] or [H, W, 3], each with its options of tifffile."""
    out = io.BytesIO()
    with tifffile.TiffWriter(out, **of_file) as file:
        for k, values in enumerate(pages):
            colour = "rgb" if values.ndim == 3 else "minisblack"
            mine = {"photometric": colour, "metadata": None} | (options[k] if options else {})
            if "bitspersample" in mine:  # what needs more bits would lose its highest
                values = np.minimum(values, 2 ** mine["bitspersample"] - 1)
            file.write(values, contiguous=False, **mine)
    return out.getvalue()


def _check_size(page: tifffile.TiffPage, n_bytes: int, name: str) -> None:
    """Refuse a header that asks for far more memory than the file can fill."""
    if page.nbytes > max(SMALL, MOST_PACKED * n_bytes):
        raise InputError(
            f"{name} claims {page.imagelength}x{page.imagewidth} pixels, which its {n_bytes:,} "
            "bytes cannot hold; replace the file."
        )


def _check_whole(page: tifffile.TiffPage, n_bytes: int, name: str) -> None:
    """Refuse a page of which a part is missing: what is not there would be black, and decoders of
    JPEG and LZW make up the rest of what was cut."""
    missing, parts = page.databytecounts.count(0), len(page.databytecounts)
    if missing:
        raise InputError(
            f"A TIFF must hold all of its pixels, but {name} lacks {missing:,} of {parts:,} strips "
            "or tiles; write it again, without SPARSE_OK."
        )
    # Where there are no offsets, tifffile says so; plain pixels it reads whole or not at all.
    end = max(map(sum, zip(page.dataoffsets, page.databytecounts, strict=False)), default=0)
    if page.compression > 1 and end > n_bytes:
        raise InputError(
            f"{name} is cut short: its pixels go on to byte {end:,} of {n_bytes:,}; replace the "
            "file."
        )


def _samples(file: tifffile.TiffFile, page: tifffile.TiffPage, n_pages: int) -> Iterator[Values]:
    """The pictures of a page, [H, W, samples]: one, but for volumes and stacks of one header."""
    whole = page.asarray(squeeze=False)  # [planes, depth, H, W, samples]
    if n_pages == 1 and _goes_on(file, page):
        whole = file.series[0].asarray().reshape(-1, *whole.shape)
    else:
        whole = whole[None]
    for volume in whole:
        if page.planarconfig == PLANARCONFIG.SEPARATE and page.samplesperpixel > 1:
            yield from np.moveaxis(volume[..., 0], 0, -1)
        else:
            yield from volume[0]


def _goes_on(file: tifffile.TiffFile, page: tifffile.TiffPage) -> bool:
    """Whether the bytes behind the only page are more pictures, as ImageJ and tifffile write stacks
    under one header. Descriptions also tell of pictures of other files (OME), or of the file that
    this one was cut from; the bytes are then too few."""
    if not (page.is_imagej or page.is_shaped or page.is_stk) or page.compression > 1:
        return False
    room = file.filehandle.size - page.dataoffsets[0]
    needed = 2 * min(page.nbytes, sum(page.databytecounts))
    return room >= needed and bool(file.series[0].size > page.size)


def _meant(samples: Values, page: tifffile.TiffPage, data: bytes, name: str) -> Stored:
    """What samples [H, W, samples] stand for, upright."""
    _check_meaning(samples, page, name)
    kind, bits = _kind(page), int(page.bitspersample)
    values = _without_extra(samples, page, name)
    white: float | None = None
    upright = False
    if values.dtype.kind == "b" or (values.dtype.kind == "u" and bits < 16):
        white = 2.0**bits - 1
    if kind == PHOTOMETRIC.MINISWHITE:
        values = _inverted(values, bits, name)
    elif kind == PHOTOMETRIC.PALETTE:
        values, white = _coloured(values, page.colormap), 255.0
    elif kind == PHOTOMETRIC.SEPARATED:
        values, white = _from_inks(values, page, name)
    elif kind == PHOTOMETRIC.YCBCR and page.compression not in _JPEG:
        values, upright = _by_pillow(data, page.index), True
    if white is not None and white < 255:  # 1, 2, 4 bits and so on: written as 8
        values = np.round(values * np.float32(255 / white)).astype(np.uint8)
        white = 255.0
    if not upright and 274 in page.tags:
        values = turn(values, int(page.tags[274].value))
    return Stored(values, white)


def _check_meaning(samples: Values, page: tifffile.TiffPage, name: str) -> None:
    """Refuse pixels that mean nothing, as transparent ones are: cleaned, they would mean a value,
    and of their neighbours nobody knows the noise."""
    if _NOTHING not in page.tags:
        return
    try:
        nothing = float(str(page.tags[_NOTHING].value).strip(" \0"))
    except ValueError:  # no number: then it is no pixel's
        return
    if np.any(samples == nothing):
        raise InputError(
            f"Every pixel must have a value, but some of {name} are {nothing:g}, which means that "
            "they have none (tag 42113, GDAL_NODATA); fill them, or drop the tag."
        )


def _kind(page: tifffile.TiffPage) -> PHOTOMETRIC:
    """What the samples of a page are. TIFF demands the tag; where it is missing, readers take 0 as
    black, but fax as ink on paper, and three colours as RGB.

    Source: libtiff, tif_getimage.c, TIFFRGBAImageBegin. tifffile would say that 0 is white.
    """
    if 262 in page.tags:
        return page.photometric
    if page.samplesperpixel - len(page.extrasamples) >= 3:
        return PHOTOMETRIC.RGB
    return PHOTOMETRIC.MINISWHITE if page.compression in _FAX else PHOTOMETRIC.MINISBLACK


def _without_extra(samples: Values, page: tifffile.TiffPage, name: str) -> Values:
    """The colours alone; what else a pixel has must be an alpha that hides nothing."""
    colour = _kind(page)
    if colour not in COLOURS:
        raise InputError(
            f"{name} holds pixels of the kind {getattr(colour, 'name', colour)} (tag 262), which "
            "are not read; convert them to grey or RGB."
        )
    n_colours, n = COLOURS[colour], samples.shape[2]
    kinds = [int(kind) for kind in page.extrasamples]
    if n < n_colours:
        raise InputError(
            f"A pixel of the kind {colour.name} has {n_colours} samples, but {name} has "
            f"{n} (tag 277)."
        )
    if n_colours == 1 and n == 3 and not any(kind in _ALPHA for kind in kinds):
        return samples  # three channels that nobody called red, green and blue
    if n > n_colours + 1:
        raise InputError(
            f"An image must be grey or have three colours, but {name} has {n} samples in a pixel; "
            "write the ones that matter into files of their own."
        )
    if n == n_colours:
        return samples
    bits, kind = int(page.bitspersample), samples.dtype.kind
    opaque = 1.0 if kind == "f" else 2.0 ** (bits - (kind == "i")) - 1
    if kinds and kinds[0] not in _ALPHA and np.any(samples[:, :, -1] != opaque):
        raise InputError(
            f"{name} has a channel beside its colours of which it does not say what it is "
            "(tag 338); drop it, or write it into a file of its own."
        )
    return without_alpha(samples, name, opaque)


def _inverted(values: Values, bits: int, name: str) -> Values:
    if values.dtype == bool:
        return ~values
    if values.dtype.kind != "u":
        raise InputError(
            f"{name} calls 0 white (tag 262), but its {values.dtype.name} pixels have no largest "
            "value that would be black; invert it."
        )
    return np.array(2**bits - 1, values.dtype) - values


def _coloured(values: Values, colormap: npt.NDArray[np.uint16]) -> Values:
    """RGB [H, W, 3] uint8 of places [H, W, 1] in a palette [3, n] of 16 bits."""
    if colormap.max() > 255:  # some writers fill it with 8 bits
        colormap = colormap // 256
    return colormap.astype(np.uint8).T[values[:, :, 0].astype(np.intp)]


def _from_inks(values: Values, page: tifffile.TiffPage, name: str) -> tuple[Values, float]:
    """RGB of cyan, magenta, yellow and black (0: no ink), as screens show it without a profile."""
    inks = page.tags.get(332)
    if values.dtype.kind != "u" or (inks and int(inks.value) != 1):
        raise InputError(
            f"{name} is separated into inks that are not cyan, magenta, yellow and black in whole "
            "numbers (tag 332), which are not read; convert it to RGB."
        )
    top = 2.0 ** int(page.bitspersample) - 1
    paper = 1 - values.astype(np.float32) / np.float32(top)
    return np.round(paper[:, :, :3] * paper[:, :, 3:] * top).astype(values.dtype), top


def _by_pillow(data: bytes, index: int) -> Values:
    """RGB of a page of luma and chroma, which tifffile gives as they are; Pillow turns it, too."""
    with Image.open(io.BytesIO(data)) as file:
        file.seek(index)
        return np.asarray(file.convert("RGB"))


def _options(page: tifffile.TiffPage, frame: Stored) -> dict[str, Any]:
    """How to write a result like a page."""
    bits, values = int(page.bitspersample), frame.values
    compression = WRITTEN_AS.get(page.compression, "zlib")
    options: dict[str, Any] = {"compression": compression}
    if values.dtype.kind == "u" and 8 < bits < 16:
        options |= {"bitspersample": bits, "compression": None}  # packed: one or the other
    elif compression in ("lzw", "zlib", "zstd") and page.predictor > 1:
        options["predictor"] = True
    if page.is_tiled:
        options["tile"] = (page.tilelength, page.tilewidth)
    tags = page.tags
    orientation = int(tags[274].value) if 274 in tags else 1
    turned = orientation != 1
    if _kind(page) == PHOTOMETRIC.MINISBLACK and values.ndim == 3 and values.shape[2] == 3:
        options |= {"photometric": "minisblack", "planarconfig": "contig"}
    if 282 in tags and 283 in tags:
        across, down = (_ratio(tags[code].value) for code in (282, 283))
        options["resolution"] = (down, across) if orientation > 4 else (across, down)
        unit = int(tags[296].value) if 296 in tags else 2
        options["resolutionunit"] = unit if unit in (1, 2, 3) else 1
    if 34675 in tags and _kind(page) != PHOTOMETRIC.SEPARATED:
        options["iccprofile"] = tags[34675].value
    if 270 in tags and not str(tags[270].value).startswith('{"shape"'):  # tifffile's own
        options["description"] = str(tags[270].value).encode()
    options["extratags"] = [
        (code, tags[code].dtype, tags[code].count, _plain(tags[code].value), True)
        for code in KEPT_TAGS
        if code in tags and not (code == _XMP and turned)  # may say how to turn what is turned
    ]
    options["software"] = False
    return options


def _plain(value: Any) -> Any:
    """A tag as it can be written: text of more than ASCII as its bytes."""
    return value.encode() if isinstance(value, str) else value


def _ratio(value: Any) -> float:
    """A resolution: two numbers, or as some writers store it, one of float."""
    number, of = (*np.atleast_1d(value), 1)[:2]
    return float(number / of) if of else 1.0
