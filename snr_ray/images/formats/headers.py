"""How many values an image file holds, by its header: known before it is decoded."""

import io
import math

import numpy as np
import tifffile
from PIL import Image

from snr_ray.images.formats import nifti, zarrfolder
from snr_ray.images.formats.codec import HEAD_BYTES, KINDS, recognise, split


def n_values(data: bytes, name: str) -> int | None:
    """Pictures x height x width x channels of a file; None where its header does not say, or not in
    a way that is understood here."""
    kind = recognise(data[:HEAD_BYTES]) or KINDS.get(split(name)[1].lower())
    file = io.BytesIO(data)
    try:
        if kind == "npy":
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0
            if version > (1, 0):
                read = np.lib.format.read_array_header_2_0
            return int(np.prod(read(file)[0]))
        if kind == "tiff":
            with tifffile.TiffFile(file, name=name) as tiff:
                return len(tiff.pages) * int(np.prod(tiff.pages[0].shape))
        if kind == "dicom":
            import pydicom  # an extra

            tags = ["Rows", "Columns", "NumberOfFrames"]
            head = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=tags)
            return int(head.Rows) * int(head.Columns) * int(head.get("NumberOfFrames") or 1)
        if kind == "nifti":
            return math.prod(nifti.shape(data))
        if kind == "zarr":
            return math.prod(zarrfolder.shape(data))
        with Image.open(file) as picture:  # of any size, as raster.py says
            return picture.width * picture.height * len(picture.getbands())
    except Exception:  # libraries raise anything on damaged bytes; decoding will say what it is
        return None
