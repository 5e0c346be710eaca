"""CT slices (DICOM) <-> Hounsfield units; what comes back is a derived series of its own.

    stored --slope, intercept of the frame--> Hounsfield units --...--> stored, same slope and bits

Patient, study, geometry and all else stay; the new identifiers follow from the old ones and the
job, so slices of a series stay together and the same job writes the same bytes. pydicom is an
extra.
"""

import copy
import functools
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from snr_ray import __version__
from snr_ray.errors import InputError
from snr_ray.images.formats.pixels import Contents, Made, Stored, Values

LONGEST_TEXT = {"SeriesDescription": 64, "DerivationDescription": 1024}
"""Characters that their value representations (LO, ST) hold."""
UNITS = ("HU", "HU_MOD")
"""Rescale types that are Hounsfield units; a CT image without one is in them too."""


def read(data: bytes, name: str) -> Contents:
    """The frames of a CT image.

    Raises:
        InputError: if it is no CT image, does not say how its numbers become Hounsfield units, or
            pydicom is not there.
    """
    try:
        import pydicom
        from pydicom.errors import InvalidDicomError
        from pydicom.uid import (
            ExplicitVRBigEndian,
            ExplicitVRLittleEndian,
            ImplicitVRLittleEndian,
        )

        from snr_ray.images.formats import dicomcodecs
    except ImportError:
        raise InputError(
            f"Reading DICOM needs pydicom, and {name} is one; pip install 'snr-ray[dicom]'."
        ) from None
    with warnings.catch_warnings():  # files of older scanners break rules that do not matter here
        warnings.simplefilter("ignore")
        try:
            file = pydicom.dcmread(io.BytesIO(data))
        except InvalidDicomError:  # without the preamble, as old scanners wrote
            file = pydicom.dcmread(io.BytesIO(data), force=True)
            if "SOPClassUID" not in file:
                raise
            if "TransferSyntaxUID" not in file.file_meta:
                implicit, little = file.original_encoding
                plain = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
                file.file_meta.TransferSyntaxUID = plain if little else ExplicitVRBigEndian
        _check_kind(file, name)
        scales = [_scale_of(file, k, name) for k in range(int(file.get("NumberOfFrames") or 1))]
        dicomcodecs.register()
        stored = file.pixel_array
    frames = stored if stored.ndim == 3 else stored[None]
    units = [
        Stored((frame * slope + intercept).astype(np.float32), hounsfield=True)
        for frame, (slope, intercept) in zip(frames, scales, strict=True)
    ]

    return Contents(units, functools.partial(_write, file, frames, scales))


@dataclass(frozen=True)
class Slice:
    """What a file says of whose it is and of its grid; "" of what it does not say."""

    patient: str
    study: str
    series: str
    grid: str
    """Pixels and spacing, for people to read."""


def read_slice(data: bytes) -> Slice | None:
    """What the header of a file says; None where it has none that can be read.

    Raises:
        InputError: if pydicom is not there.
    """
    try:
        import pydicom
    except ImportError:
        raise InputError("Reading DICOM needs pydicom; pip install 'snr-ray[dicom]'.") from None
    tags = ["PatientID", "StudyInstanceUID", "SeriesInstanceUID", "Rows", "Columns", "PixelSpacing"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            file = pydicom.dcmread(
                io.BytesIO(data), stop_before_pixels=True, force=True, specific_tags=tags
            )
            patient, study, series = (str(file.get(tag) or "").strip() for tag in tags[:3])
            rows, columns = (int(file.get(tag) or 0) for tag in tags[3:5])
            spacing = [f"{float(mm):.4g}" for mm in file.get("PixelSpacing") or ()]
        except Exception:  # damaged headers raise anything; reading the image says what it is
            return None
    if not (patient or study or series or rows):
        return None
    grid = f"{rows}x{columns}" + (f" at {'x'.join(spacing)} mm" if spacing else "")
    return Slice(patient, study, series, grid)


def _check_kind(file: Any, name: str) -> None:
    modality = file.get("Modality", "unknown")
    if modality != "CT":
        raise InputError(
            f"Of DICOM files those of CT are read, whose numbers are Hounsfield units, but {name} "
            f"is of modality {modality}; convert it to TIFF and say what is white with "
            "images.white."
        )
    if "PixelData" not in file:
        raise InputError(f"A CT slice must hold pixels, but {name} has none (tag 7FE0,0010).")
    kind = str(file.get("PhotometricInterpretation", "")).strip()
    if not kind.startswith("MONOCHROME"):
        raise InputError(
            f"A CT slice must be grey, but {name} is {kind or 'of no known kind'} (tag 0028,0004); "
            "it is a picture of a slice and no slice."
        )
    high, bits = file.get("HighBit"), file.get("BitsStored")
    if high is not None and bits is not None and int(high) >= int(bits):
        raise InputError(
            f"Numbers of a CT slice must lie in the lowest bits, but {name} has {bits} of them up "
            f"to bit {high} (tags 0028,0101 and 0028,0102), which readers take for different "
            "numbers; write it again."
        )


def _scale_of(file: Any, frame: int, name: str) -> tuple[float, float]:
    """Slope and intercept of a frame: its own, those of all frames, or those of the file."""
    own = file.get("PerFrameFunctionalGroupsSequence") or []
    groups = [*own[frame : frame + 1], *(file.get("SharedFunctionalGroupsSequence") or [])]
    found = [
        item
        for group in groups
        for item in group.get("PixelValueTransformationSequence") or []
        if "RescaleSlope" in item
    ]
    item = [*found, file][0]
    if item.get("RescaleSlope") is None or item.get("RescaleIntercept") is None:
        raise InputError(
            f"A CT slice must say how its numbers become Hounsfield units, but {name} has no "
            "RescaleSlope and RescaleIntercept (tags 0028,1053 and 0028,1052); add them, or "
            "convert it to TIFF and say what is white with images.white."
        )
    units = str(item.get("RescaleType") or UNITS[0]).strip()
    if units not in UNITS:
        raise InputError(
            f"A CT slice must be in Hounsfield units, but those of {name} are {units} (tag "
            "0028,1054); convert it to TIFF and say what is white with images.white."
        )
    slope = float(item.RescaleSlope)
    if not slope:
        raise InputError(f"RescaleSlope must not be 0, but that of {name} is (tag 0028,1053).")
    return slope, float(item.RescaleIntercept)


def _write(
    old: Any,
    frames: Values,
    scales: Sequence[tuple[float, float]],
    units: Sequence[Values],
    made: Made,
) -> bytes:
    """The file with other Hounsfield units; pixels that the old one calls padding stay."""
    from pydicom.uid import ExplicitVRLittleEndian

    file = copy.deepcopy(old)
    low = -(2 ** (file.BitsStored - 1)) if file.PixelRepresentation else 0
    high = low + 2**file.BitsStored - 1
    padding = _padding(file, frames)
    stored = np.empty_like(frames)
    for k, (values, (slope, intercept)) in enumerate(zip(units, scales, strict=True)):
        numbers = np.round((values.astype(np.float64) - intercept) / slope)
        stored[k] = np.clip(numbers, low, high)
    stored[padding] = frames[padding]
    if file.file_meta.TransferSyntaxUID.is_compressed:
        file.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    little = file.file_meta.TransferSyntaxUID.is_little_endian
    size = file.BitsAllocated // 8
    kind = f"{'<' if little else '>'}{'i' if file.PixelRepresentation else 'u'}{size}"
    pixels = stored.astype(kind).tobytes()
    file.PixelData = pixels + b"\0" * (len(pixels) % 2)
    file["PixelData"].VR = "OB" if size == 1 else "OW"
    file["PixelData"].is_undefined_length = False
    for tag, value in (("SmallestImagePixelValue", stored.min()),
                       ("LargestImagePixelValue", stored.max())):  # fmt: skip
        if tag in file:
            setattr(file, tag, int(value))
    _derive(file, made)
    out = io.BytesIO()
    with warnings.catch_warnings():  # as the old file broke them
        warnings.simplefilter("ignore")
        file.save_as(out, enforce_file_format=True)
    return out.getvalue()


def _padding(file: Any, frames: Values) -> Any:
    """Where stored numbers mean "no pixel here": [n, H, W] bool."""
    value = file.get("PixelPaddingValue")
    if value is None:
        return np.zeros(frames.shape, bool)
    limit = file.get("PixelPaddingRangeLimit", value)
    ends = np.array([value, limit], np.int64)
    bits = 2**file.BitsAllocated
    if file.PixelRepresentation:  # some writers store a negative one as unsigned
        ends = np.where(ends >= bits // 2, ends - bits, ends)
    return (frames >= ends.min()) & (frames <= ends.max())


def _derive(file: Any, made: Made) -> None:
    """Make it an image of its own, derived from the old one.

    Source: DICOM PS3.3, C.7.6.1.1.2 (image type), C.12.4 (derivation), C.7.6.1 (source image).
    """
    from pydicom.dataset import Dataset
    from pydicom.uid import generate_uid

    if "SOPInstanceUID" in file and "SOPClassUID" in file:
        source = Dataset()
        source.ReferencedSOPClassUID = file.SOPClassUID
        source.ReferencedSOPInstanceUID = file.SOPInstanceUID
        purpose = Dataset()
        purpose.CodeValue, purpose.CodingSchemeDesignator = "121322", "DCM"
        purpose.CodeMeaning = "Source image for image processing operation"
        source.PurposeOfReferenceCodeSequence = [purpose]
        file.SourceImageSequence = [source]
    for tag in ("SOPInstanceUID", "SeriesInstanceUID"):
        old = str(file.get(tag, ""))
        if not old and tag == "SOPInstanceUID":  # which two slices never share
            old = made.image
        setattr(file, tag, generate_uid(entropy_srcs=[tag, old, made.job]))
    file.file_meta.MediaStorageSOPInstanceUID = file.SOPInstanceUID
    if "SOPClassUID" in file:
        file.file_meta.MediaStorageSOPClassUID = file.SOPClassUID
    _append(file, "SeriesDescription", f"noise {made.noise}")
    said = f"sparse-view noise {made.noise} by snr_ray {__version__}"
    _append(file, "DerivationDescription", said)
    if "ImageType" in file:
        file.ImageType = ["DERIVED", "SECONDARY", *list(file.ImageType)[2:]]
    groups = [*(file.get("SharedFunctionalGroupsSequence") or []),
              *(file.get("PerFrameFunctionalGroupsSequence") or [])]  # fmt: skip
    for group in groups:
        for item in group.get("CTImageFrameTypeSequence") or []:
            if "FrameType" in item:
                item.FrameType = ["DERIVED", *list(item.FrameType)[1:]]


def _append(file: Any, tag: str, text: str) -> None:
    old = str(file.get(tag) or "").strip()
    room = LONGEST_TEXT[tag] - len(text) - 2
    setattr(file, tag, f"{old[:room].rstrip()}; {text}" if old else text)
