"""Buckets: claims of a name, and what a store says that cannot be written to."""

import time

import pyarrow.fs as pafs
import pytest

from snr_ray import bucketfolder
from snr_ray.address import open_folder
from snr_ray.folder import JOB


def test_a_claim_that_was_left_behind_is_soon_too_old(
    bucket: tuple[pafs.FileSystem, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = open_folder(f"s3://bucket/out?{bucket[1]}")
    place.write(".claims/dead", "")
    assert place.empty()
    assert not place.create(JOB, "x")
    monkeypatch.setattr(bucketfolder, "CLAIM_S", 0.5)
    time.sleep(1.5)  # S3 tells whole seconds
    assert place.create(JOB, "x")


def test_missing_bucket_and_wrong_key_are_told(bucket: tuple[pafs.FileSystem, str]) -> None:
    place = open_folder(f"s3://nowhere/out?{bucket[1]}")
    with pytest.raises(OSError, match="does not exist"):
        place.write("x", "")
