"""CT slices in and out: units, frames, compression, what is kept, what is new, what is refused."""

import functools
import io
from collections.abc import Callable
from typing import Any, Literal

import imagecodecs
import numpy as np
import pydicom
import pytest
from pydicom import uid
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset

from snr_ray.errors import InputError
from snr_ray.images.formats.codec import OpenFile, decode, open_file
from snr_ray.images.formats.pixels import Made

WINDOW = (-1000.0, 200.0)
STORED = (np.arange(48, dtype=np.uint16) * 20).reshape(8, 6)
UNITS = 2.0 * STORED - 1024


def dataset(**tags: Any) -> FileDataset:
    """A CT slice of 8x6 pixels; in HU 2 x stored - 1024. A tag of None is left out."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = uid.CTImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    file = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    known: dict[str, Any] = dict(
        SOPClassUID=uid.CTImageStorage, SOPInstanceUID="1.2.3", SeriesInstanceUID="1.2",
        StudyInstanceUID="1", FrameOfReferenceUID="1.9", PatientID="p", PatientName="A^B",
        ImagePositionPatient=[0, 1, 2], PixelSpacing=[0.5, 0.7], SliceThickness=3,
        ImageType=["ORIGINAL", "PRIMARY", "AXIAL"], SeriesDescription="Chest", Modality="CT",
        RescaleSlope=2, RescaleIntercept=-1024, Rows=8, Columns=6, SamplesPerPixel=1,
        BitsAllocated=16, BitsStored=16, HighBit=15, PixelRepresentation=0,
        PhotometricInterpretation="MONOCHROME2", PixelData=STORED.tobytes(),
    )  # fmt: skip
    for name, value in (known | tags).items():
        if value is not None:
            setattr(file, name, value)
    return file


def saved(file: FileDataset) -> bytes:
    out = io.BytesIO()
    file.save_as(out, enforce_file_format=True)
    return out.getvalue()


def rewritten(
    file: OpenFile, job: str = "a job", noise: Literal["removed", "injected"] = "removed"
) -> tuple[bytes, FileDataset]:
    data = file.encode([frame.pixels for frame in file.frames], "out.dcm", made=Made(job, noise))
    return data, pydicom.dcmread(io.BytesIO(data))


def units(file: FileDataset) -> np.ndarray:
    return file.pixel_array * float(file.RescaleSlope) + float(file.RescaleIntercept)


def test_a_slice_comes_back_as_a_derived_slice_in_its_own_units() -> None:
    before = dataset()
    file = open_file(saved(before), "a.dcm", window=WINDOW)
    np.testing.assert_allclose(
        file.frames[0].pixels[0], np.clip((UNITS + 1000) / 1200, 0, 1), atol=1e-6
    )
    _, after = rewritten(file)
    np.testing.assert_allclose(units(after), np.maximum(UNITS, -1000), atol=1)
    new = {element.keyword for element in after if element.tag not in before
           or element.value != before[element.tag].value}  # fmt: skip
    assert new == {"SOPInstanceUID", "SeriesInstanceUID", "SeriesDescription", "ImageType",
                   "DerivationDescription", "SourceImageSequence", "PixelData"}  # fmt: skip
    assert all(element.tag in after for element in before)
    assert after.ImageType == ["DERIVED", "SECONDARY", "AXIAL"]
    assert after.SourceImageSequence[0].ReferencedSOPInstanceUID == "1.2.3"
    assert after.file_meta.MediaStorageSOPInstanceUID == after.SOPInstanceUID
    assert after.SeriesDescription == "Chest; noise removed"
    assert rewritten(file, noise="injected")[1].SeriesDescription == "Chest; noise injected"


def test_identifiers_follow_from_the_old_ones_and_the_job() -> None:
    one, two = (open_file(saved(dataset(SOPInstanceUID=f"1.2.{k}")), "a.dcm", window=WINDOW)
                for k in (3, 4))  # fmt: skip
    assert rewritten(one)[0] == rewritten(one)[0]  # the same bytes each time
    first, second, other = rewritten(one)[1], rewritten(two)[1], rewritten(one, "another")[1]
    assert first.SeriesInstanceUID == second.SeriesInstanceUID != other.SeriesInstanceUID
    assert len({first.SOPInstanceUID, second.SOPInstanceUID, other.SOPInstanceUID}) == 3


def test_slices_without_identifiers_get_different_ones() -> None:
    file = open_file(saved(dataset(SOPInstanceUID=None)), "a.dcm", window=WINDOW)
    pixels = [frame.pixels for frame in file.frames]
    made = [
        pydicom.dcmread(io.BytesIO(file.encode(pixels, "a.dcm", made=Made("job", image=name))))
        for name in ("a.dcm", "b.dcm", "a.dcm")
    ]
    assert made[0].SOPInstanceUID == made[2].SOPInstanceUID != made[1].SOPInstanceUID


def test_padding_is_neither_cut_nor_cleaned() -> None:
    stored = STORED.astype(np.int16) - 500
    stored[0] = -2000
    file = open_file(
        saved(dataset(PixelRepresentation=1, PixelPaddingValue=-2000, RescaleIntercept=0,
                      PixelData=stored.tobytes())), "a.dcm", window=WINDOW)  # fmt: skip
    _, after = rewritten(file)
    assert (after.pixel_array[0] == -2000).all()
    np.testing.assert_allclose(units(after)[1:], np.maximum(2.0 * stored[1:], -1000), atol=1)


def test_values_beyond_the_bits_are_cut_to_them() -> None:
    file = open_file(saved(dataset(BitsStored=12, HighBit=11)), "a.dcm", window=(-3000.0, 9000.0))
    data = file.encode([np.linspace(-1, 2, 48, dtype=np.float32).reshape(1, 8, 6)], "a.dcm",
                       clip=False)  # fmt: skip
    stored = pydicom.dcmread(io.BytesIO(data)).pixel_array
    assert (stored.min(), stored.max()) == (0, 4095)


def enhanced(own: bool) -> FileDataset:
    """Three frames whose slope and intercept lie in functional groups, of each or of all."""
    groups = []
    for k in range(3):
        item, group = Dataset(), Dataset()
        item.RescaleSlope, item.RescaleType = 1 + k * own, "HU"
        item.RescaleIntercept = -1024 - 10 * k * own
        kind = Dataset()
        kind.FrameType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
        group.PixelValueTransformationSequence = [item]
        group.CTImageFrameTypeSequence = [kind]
        groups.append(group)
    where = {"PerFrameFunctionalGroupsSequence": groups} if own else {
        "SharedFunctionalGroupsSequence": groups[:1]}  # fmt: skip
    return dataset(SOPClassUID=uid.EnhancedCTImageStorage, RescaleSlope=None, NumberOfFrames=3,
                   RescaleIntercept=None, PixelData=STORED.tobytes() * 3, **where)  # fmt: skip


@pytest.mark.parametrize("own", [True, False], ids=["of each frame", "of all frames"])
def test_frames_of_an_enhanced_image_have_units_of_their_own(own: bool) -> None:
    file = open_file(saved(enhanced(own)), "a.dcm", window=(-1000.0, 2000.0))
    assert len(file.frames) == 3
    for k, frame in enumerate(file.frames):
        wanted = (1 + k * own) * STORED - (1024.0 + 10 * k * own)
        np.testing.assert_allclose(
            frame.pixels[0], (np.clip(wanted, -1000, 2000) + 1000) / 3000, atol=1e-6
        )
    _, after = rewritten(file)
    assert after.pixel_array.shape == (3, 8, 6)
    group = "PerFrame" if own else "Shared"
    item = after[f"{group}FunctionalGroupsSequence"][0].CTImageFrameTypeSequence[0]
    assert item.FrameType[0] == "DERIVED"
    again = open_file(rewritten(file)[0], "a.dcm", window=(-1000.0, 2000.0))
    for frame, back in zip(file.frames, again.frames, strict=True):
        np.testing.assert_allclose(back.pixels, frame.pixels, atol=2 / 3000)


ENCODERS: dict[str, Callable[[np.ndarray], bytes]] = {
    uid.JPEGLosslessSV1: imagecodecs.ljpeg_encode,
    uid.JPEGLSLossless: imagecodecs.jpegls_encode,
    uid.JPEG2000Lossless: functools.partial(
        imagecodecs.jpeg2k_encode, reversible=True, codecformat="j2k"
    ),
    uid.HTJ2KLossless: functools.partial(imagecodecs.htj2k_encode, reversible=True),
}


@pytest.mark.parametrize("syntax", ENCODERS, ids=lambda syntax: uid.UID(syntax).keyword)
def test_compressed_slices_are_read_and_written_plainly(syntax: str) -> None:
    file = dataset()
    stored = np.tile(STORED, (8, 8))
    file.Rows, file.Columns = stored.shape
    file.file_meta.TransferSyntaxUID = syntax
    file.PixelData = pydicom.encaps.encapsulate([ENCODERS[syntax](stored)])
    opened = open_file(saved(file), "a.dcm", window=(-1024.0, 4000.0))
    np.testing.assert_allclose(opened.frames[0].pixels[0] * 5024, 2.0 * stored, atol=1e-3)
    _, after = rewritten(opened)
    assert after.file_meta.TransferSyntaxUID == uid.ExplicitVRLittleEndian
    np.testing.assert_array_equal(after.pixel_array, stored)


def test_other_byte_orders_and_files_without_a_preamble() -> None:
    big = dataset()
    big.file_meta.TransferSyntaxUID = uid.ExplicitVRBigEndian
    big.PixelData = STORED.astype(">u2").tobytes()
    out = io.BytesIO()
    pydicom.dcmwrite(out, big, implicit_vr=False, little_endian=False, enforce_file_format=True)
    opened = open_file(out.getvalue(), "a.dcm", window=WINDOW)
    np.testing.assert_allclose(units(rewritten(opened)[1]), np.maximum(UNITS, -1000), atol=1)
    bare = io.BytesIO()
    del (plain := dataset()).file_meta
    plain.preamble = None
    plain.save_as(bare, implicit_vr=True, little_endian=True)
    opened = open_file(bare.getvalue(), "a.ima", window=WINDOW)
    np.testing.assert_allclose(units(rewritten(opened)[1]), np.maximum(UNITS, -1000), atol=1)


@pytest.mark.parametrize("name", ["IM0001", "a.IMA", "a.dicom", "a.png", "1.2.840.113"])
def test_a_slice_is_known_by_its_bytes_whatever_it_is_called(name: str) -> None:
    assert open_file(saved(dataset()), name, window=WINDOW).kind == "dicom"


@pytest.mark.parametrize(
    ("tags", "sentence"),
    [
        ({"Modality": "MR"}, r"those of CT are read.* a\.dcm is of modality MR"),
        ({"RescaleSlope": None}, r"a\.dcm has no RescaleSlope"),
        ({"RescaleIntercept": None}, r"a\.dcm has no RescaleSlope and RescaleIntercept"),
        ({"RescaleType": "US"}, r"must be in Hounsfield units, but those of a\.dcm are US"),
        ({"RescaleSlope": 0}, r"must not be 0"),
        ({"PixelData": None}, r"a\.dcm has none \(tag 7FE0,0010\)"),
        ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}, r"must be grey, but .* RGB"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, r"must be grey, but .* PALETTE COLOR"),
        ({"BitsStored": 12}, r"in the lowest bits, but a\.dcm has 12 of them up to bit 15"),
        ({"PixelData": STORED.tobytes()[:40]}, r"a\.dcm cannot be read as an image .*; replace"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_each_cause_has_its_sentence(tags: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        decode(saved(dataset(**tags)), "a.dcm", window=WINDOW)


def test_a_slice_needs_a_window_and_bytes_that_are_dicom() -> None:
    with pytest.raises(InputError, match=r"Hounsfield units, and a\.dcm is one; .*images\.window="):
        decode(saved(dataset()), "a.dcm", white=255)
    with pytest.raises(InputError, match=r"a\.dcm cannot be read as an image"):
        decode(b"no DICOM", "a.dcm", window=WINDOW)


def test_a_slice_may_be_written_as_tiff_but_nothing_else_as_a_slice() -> None:
    file = open_file(saved(dataset()), "a.dcm", window=WINDOW)
    pixels = [frame.pixels for frame in file.frames]
    tiff = open_file(file.encode(pixels, "a.tif"), "a.tif", window=WINDOW)
    np.testing.assert_allclose(tiff.frames[0].pixels, pixels[0], atol=1e-6)
    with pytest.raises(InputError, match=r"a\.dcm cannot hold what was not DICOM"):
        tiff.encode(pixels, "a.dcm")
