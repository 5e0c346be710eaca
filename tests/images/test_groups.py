"""What stays in one split: patients by DICOM or column, folders; what is said, what is refused."""

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydicom
import pytest
from PIL import Image
from pydicom import uid
from pydicom.dataset import FileDataset, FileMetaDataset

from snr_ray.errors import InputError
from snr_ray.images.collection import SPLITS, Source
from snr_ray.images.groups import group_images
from snr_ray.images.sources import open_source

PATIENTS, SLICES = 40, 3


def splits_of(source: Source, key: Callable[[str], str]) -> dict[str, set[str]]:
    """Splits in which each patient is found."""
    found: dict[str, set[str]] = {}
    for split in SPLITS:
        for row in source.select(split):
            found.setdefault(key(source.ids[row]), set()).add(split)
    return found


def save_slice(path: Path, side: int = 4, **tags: Any) -> None:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = uid.CTImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    file = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    known: dict[str, Any] = dict(
        SOPClassUID=uid.CTImageStorage, Modality="CT", RescaleSlope=1, RescaleIntercept=-1024,
        Rows=side, Columns=side, SamplesPerPixel=1, BitsAllocated=16, BitsStored=16, HighBit=15,
        PixelRepresentation=0, PhotometricInterpretation="MONOCHROME2", PixelSpacing=[0.5, 0.5],
        PixelData=np.arange(side * side, dtype=np.uint16).tobytes(),
    )  # fmt: skip
    for name, value in (known | tags).items():
        setattr(file, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    file.save_as(path, enforce_file_format=True)


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DICOM files of many patients in one folder, every third without a suffix."""
    folder = tmp_path_factory.mktemp("scans")
    for patient in range(PATIENTS):
        for k in range(SLICES):
            suffix = "" if k == 0 else ".dcm"
            save_slice(
                folder / f"{k}_{patient:02d}{suffix}",
                PatientID=f"P{patient}",
                StudyInstanceUID=f"1.{patient}",
                SeriesInstanceUID=f"1.{patient}.1",
            )
    return folder


def table(path: Path, **columns: Any) -> Path:
    out = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(out, format="png")
    n = len(next(iter(columns.values())))
    pq.write_table(pa.table({"image": [out.getvalue()] * n, **columns}), path, row_group_size=7)
    return path


def rows(**more: Any) -> dict[str, Any]:
    patients = [f"pt_{k % PATIENTS}" for k in range(PATIENTS * SLICES)]
    return {"name": [f"{p}/{k:03d}.png" for k, p in enumerate(patients)], **more}


def test_slices_of_a_patient_are_in_one_split_by_themselves(scans: Path) -> None:
    grouped = group_images(open_source(str(scans)), None)
    assert grouped.group == "PatientID"
    assert f"{PATIENTS} groups" in grouped.said[0]
    found = splits_of(grouped.source, lambda name: name[2:4])
    assert len(found) == PATIENTS
    assert all(len(splits) == 1 for splits in found.values())
    assert set().union(*found.values()) == set(SPLITS)
    # Image by image they are not: the rule is what keeps them together.
    apart = splits_of(group_images(open_source(str(scans)), "none").source, lambda n: n[2:4])
    assert any(len(splits) > 1 for splits in apart.values())


@pytest.mark.parametrize("column", ["patient", "Patient_ID"])
def test_a_patient_column_groups_by_itself_and_others_on_demand(
    column: str, tmp_path: Path
) -> None:
    patients = [k % PATIENTS for k in range(PATIENTS * SLICES)]
    scanner = [f"s{k % 11}" for k in range(PATIENTS * SLICES)]
    path = table(tmp_path / "t.parquet", **rows(**{column: patients, "scanner": scanner}))
    source = open_source(str(path))
    patient_of = dict(zip(source.ids, patients, strict=True))
    scanner_of = dict(zip(source.ids, scanner, strict=True))
    grouped = group_images(source, None)
    assert grouped.group == column
    found = splits_of(grouped.source, lambda name: str(patient_of[name]))
    assert len(found) == PATIENTS
    assert all(len(splits) == 1 for splits in found.values())
    found = splits_of(group_images(source, "scanner").source, scanner_of.__getitem__)
    assert all(len(splits) == 1 for splits in found.values())


def test_a_patient_is_in_the_same_split_whatever_lies_beside(tmp_path: Path) -> None:
    half = [k % PATIENTS for k in range(60)]
    whole = [k % PATIENTS for k in range(PATIENTS * SLICES)]
    few = table(tmp_path / "few.parquet", patient=half, id=[f"a{k}" for k in range(60)])
    many = table(tmp_path / "many.parquet", patient=whole, id=[f"b{k}" for k in range(len(whole))])
    splits = []
    for path, patients in ((few, half), (many, whole)):
        source = group_images(open_source(str(path)), None).source
        patient_of = dict(zip(source.ids, map(str, patients), strict=True))
        splits.append(splits_of(source, patient_of.__getitem__))
    assert all(splits[1][patient] == found for patient, found in splits[0].items())


def test_rows_without_a_patient_are_groups_of_their_own(tmp_path: Path) -> None:
    ct = table(tmp_path / "ct.parquet", patient=["a", None, "b", "a"])
    table(tmp_path / "photos.parquet", id=["x", "y"])  # has no such column
    assert group_images(open_source(str(ct)), None).source.group("ct/0-000001") == "ct/0-000001"
    grouped = group_images(open_source(str(tmp_path)), None)
    groups = [grouped.source.group(name) for name in grouped.source.ids]
    assert groups == ["a", "ct/0-000001", "b", "a", "photos/x", "photos/y"]
    assert "3 of its images have no patient" in grouped.said[1]


def test_folders_group_on_demand_and_are_told(tmp_path: Path) -> None:
    ids = [f"p{p}/s{s}/{k}.png" for p in range(20) for s in range(2) for k in range(2)]
    for name in ids:
        path = tmp_path / "x" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(path)
    source = open_source(str(tmp_path / "x"))
    by_itself = group_images(source, None)
    assert by_itself.group is None
    assert "images.group=folder" in by_itself.said[0]
    assert "40 folders" in by_itself.said[0]
    inner, outer = (group_images(source, group).source for group in ("folder", "folder:1"))
    assert inner.group("p3/s1/0.png") == "p3/s1"
    assert outer.group("p3/s1/0.png") == "p3"
    assert all(len(s) == 1 for s in splits_of(outer, lambda n: n.split("/")[0]).values())


def test_sets_without_patients_stay_as_they_are() -> None:
    source = open_source("glyphs")
    assert group_images(source, None).source is source
    assert group_images(source, "none").source is source  # letters of a font stay together


def test_groups_travel_with_the_source(scans: Path) -> None:
    source = group_images(open_source(str(scans)), None).source
    before = [source.split(k) for k in range(len(source.ids))]
    there = pickle.loads(pickle.dumps(source))
    assert [there.split(k) for k in range(len(there.ids))] == before


def test_anonymous_slices_stay_together_by_study_and_odd_series_are_told(tmp_path: Path) -> None:
    for k in range(6):
        save_slice(
            tmp_path / f"{k}.dcm",
            side=4 if k else 8,
            PatientID="",
            StudyInstanceUID=f"1.{k // 3}",
            SeriesInstanceUID=f"1.{k // 3}.1",
        )
    (tmp_path / "broken.dcm").write_bytes(b"no DICOM")  # told where it is read
    grouped = group_images(open_source(str(tmp_path)), None)
    groups = [grouped.source.group(f"{k}.dcm") for k in range(6)]
    assert groups == ["1.0"] * 3 + ["1.1"] * 3
    assert "6 of its DICOM files have no PatientID" in grouped.said[1]
    assert "slices of 1 series differ" in grouped.said[2]
    assert "4x4 at 0.5x0.5 mm and 8x8" in grouped.said[2]


def test_what_cannot_be_grouped_has_its_sentence(scans: Path, tmp_path: Path) -> None:
    one = table(tmp_path / "one.parquet", patient=["a"] * 9)
    nested = table(tmp_path / "nested.parquet", patient=[{"id": k} for k in range(9)])
    for path, group, sentence in (
        (one, None, "all 9 images of .* are of one"),
        (one, "patients", r"must be a column \(patient\), folder or none"),
        (one, "PatientID", "needs DICOM files"),
        (nested, None, "must hold text or numbers"),
        (scans, "folder", "by the folders of its images all 120"),
        (scans, "patient", "PatientID, folder, folder:N or none"),
        (scans, "folder:0", "folder:N"),
    ):
        with pytest.raises(InputError, match=sentence):
            group_images(open_source(str(path)), group)
    assert pydicom.dcmread(scans / "1_07.dcm").PatientID == "P7"  # nothing was written


@pytest.mark.parametrize(
    ("patients", "line"),
    [
        ([None] * 6, "split image by image, since the column patient is empty for all of them"),
        (["p"] * 4 + [None] * 2, "split by the column patient: 1 group, which is in one split"),
        (["p", "q"] * 3, "split by the column patient: 2 groups, none of which is in two splits"),
    ],
    ids=["none", "one", "two"],
)
def test_the_number_of_groups_is_said_as_it_is(
    tmp_path: Path, patients: list[str | None], line: str
) -> None:
    path = table(tmp_path / "t.parquet", patient=pa.array(patients, pa.string()))
    said = group_images(open_source(str(path)), None).said
    assert said[0] == line
    assert len(said) == 1 + (0 < patients.count(None) < 6)
