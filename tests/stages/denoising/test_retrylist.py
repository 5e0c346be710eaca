"""Lists of failures as sources: what they name, wherever they lie."""

from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pytest

from snr_ray.address import open_folder
from snr_ray.errors import InputError
from snr_ray.images.datafolder import FAILURES_SCHEMA
from snr_ray.stages.denoising.retrylist import NAME, asked_for, write_failures

BAD = ["a/00.png", "b/01.png"]


def failures(*ids: str) -> pa.Table:
    rows = [{"id": name, "stage": "read", "reason": "why"} for name in ids]
    return pa.Table.from_pylist(rows, FAILURES_SCHEMA)


@pytest.mark.parametrize("where", ["path", "file", "bucket"])
def test_a_list_means_the_images_that_failed(
    where: str, image_folder: Path, tmp_path: Path, bucket: tuple[pafs.FileSystem, str]
) -> None:
    out, query = {
        "path": (str(tmp_path / "out"), ""),
        "file": ((tmp_path / "out").as_uri(), ""),
        "bucket": ("s3://bucket/out", f"?{bucket[1]}"),
    }[where]
    bad = sorted(str(path.relative_to(image_folder)) for path in image_folder.rglob("*.png"))[3:5]
    write_failures(open_folder(out + query), [failures(*bad)], str(image_folder))
    asked = asked_for(f"{out}/{NAME}{query}")
    assert asked.text == str(image_folder)
    assert [asked.source.ids[k] for k in asked.wanted.nonzero()[0]] == bad


def test_a_list_of_other_images_is_refused(image_folder: Path, tmp_path: Path) -> None:
    write_failures(open_folder(tmp_path), [failures("none.png")], str(image_folder))
    with pytest.raises(InputError, match=r"names 1, none of which are in"):
        asked_for(str(tmp_path / NAME))
