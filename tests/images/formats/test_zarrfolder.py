"""Folders that are OME-Zarr images: known by what they hold, named, found, packed, stamped."""

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow.fs as pafs
import pytest
import zarr_images
from PIL import Image
from zarr_images import describe, small, write

from snr_ray.config import ImagesConfig
from snr_ray.errors import InputError
from snr_ray.images.formats.codec import open_file, output_name
from snr_ray.images.formats.zarrfolder import is_archive, pack, unpack
from snr_ray.images.sources import open_source
from snr_ray.localfolder import LocalFolder


def test_the_same_bytes_each_time_and_the_file_that_makes_it_an_image_last(tmp_path: Path) -> None:
    values = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)
    for version, last in ((2, ".zattrs"), (3, "zarr.json")):
        folder = LocalFolder(write(tmp_path / f"{version}.zarr", values, version=version))
        data = pack(folder, "a.zarr")
        assert is_archive(data)
        assert data == pack(folder, "a.zarr")
        assert list(unpack(data))[-1] == last
        file = open_file(data, "a.zarr")
        assert list(unpack(file.encode([f.pixels for f in file.frames], "a.zarr")))[-1] == last
    assert output_name("x/a.ome.zarr", tensors=False, file=True) == "x/a.ome.zarr"


def test_a_folder_that_is_an_image_is_one_and_not_looked_into(tmp_path: Path) -> None:
    small(tmp_path / "a.zarr")
    small(tmp_path / "b.ome.zarr", 3)
    small(tmp_path / "deep" / "plain name", 3)
    (tmp_path / "deep" / "named.ZARR").mkdir()
    (tmp_path / "deep" / "other").mkdir()
    (tmp_path / "deep" / "other" / "zarr.json").write_text("no JSON")
    Image.new("L", (8, 8), 9).save(tmp_path / "deep" / "c.png")
    (tmp_path / "link.zarr").symlink_to("a.zarr")
    source = open_source(str(tmp_path))
    assert source.ids == ["a.zarr", "b.ome.zarr", "deep/c.png", "deep/named.ZARR",
                          "deep/plain name"]  # fmt: skip
    assert dict(source.left_out.counts) == {
        ".json files": 1, "links to folders that are listed anyhow": 1}  # fmt: skip
    assert [len(source.pictures(k, ImagesConfig())) for k in (0, 1, 2, 4)] == [2, 2, 1, 2]
    with pytest.raises(InputError, match=r"`multiscales`.* but deep/named\.ZARR has none"):
        source.read(3)


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.zarr", ["a.zarr", "raw.zarr"]),
        ("a.zarr", ["a.zarr"]),
        ("**/*.png", ["sub/x.png"]),
        ("su*", ["sub/b", "sub/x.png"]),
        ("raw.zarr/*", ["0", "1"]),
        ("*/[01]", ["raw.zarr/0", "raw.zarr/1"]),
        ("**/0", ["raw.zarr/0"]),
    ],
)
def test_globs_choose_images_and_those_of_a_collection(
    pattern: str, found: list[str], tmp_path: Path, bucket: tuple[pafs.FileSystem, str]
) -> None:
    small(tmp_path / "a.zarr")
    small(tmp_path / "sub" / "b")
    Image.new("L", (8, 8), 9).save(tmp_path / "sub" / "x.png")
    describe(tmp_path / "raw.zarr", {"bioformats2raw.layout": 3})
    for k in range(2):
        small(tmp_path / "raw.zarr" / str(k), fill=k)
    assert list(open_source(f"{tmp_path}/{pattern}").ids) == found
    fs, query = bucket
    pafs.copy_files(str(tmp_path), "bucket/in", destination_filesystem=fs)
    assert list(open_source(f"s3://bucket/in/{pattern}?{query}").ids) == found


def test_an_image_in_a_bucket_is_read_as_it_is_from_a_disk(
    bucket: tuple[pafs.FileSystem, str], tmp_path: Path
) -> None:
    fs, query = bucket
    small(tmp_path / "in" / "a.zarr")
    small(tmp_path / "in" / "sub" / "b", 3, fill=200)
    Image.new("L", (8, 8), 9).save(tmp_path / "in" / "c.png")
    pafs.copy_files(str(tmp_path), "bucket", destination_filesystem=fs)
    here, there = open_source(str(tmp_path / "in")), open_source(f"s3://bucket/in?{query}")
    assert here.ids == there.ids == ["a.zarr", "c.png", "sub/b"]
    for k in range(3):
        assert here.file(k) == there.file(k)
        assert here.stamp(k).split("-")[0] == there.stamp(k).split("-")[0]
    assert not there.left_out.counts
    alone = open_source(f"s3://bucket/in/sub/b?{query}")
    assert alone.file(0)[1] == here.file(2)[1]
    assert alone.stamp(0) == there.stamp(2)
    assert pickle.loads(pickle.dumps(alone)).file(0) == alone.file(0)
    fs.delete_dir("bucket/in/sub/b")
    with pytest.raises(InputError, match="is gone"):
        there.file(2)


def test_an_image_that_is_named_itself_is_meant_alone(tmp_path: Path) -> None:
    small(tmp_path / "a.zarr")
    small(tmp_path / "b.zarr")
    alone = open_source(f"{tmp_path}/a.zarr/")
    assert alone.ids == ["a.zarr"]
    assert alone.home == open_source(str(tmp_path)).home
    assert alone.stamp(0) == open_source(str(tmp_path)).stamp(0)


def test_a_changed_chunk_changes_the_stamp(tmp_path: Path) -> None:
    small(tmp_path / "a.zarr")
    source = open_source(str(tmp_path))
    before = source.stamp(0)
    chunk = tmp_path / "a.zarr" / "0" / "1.1.0"
    os.utime(chunk, (2e9, 2e9))
    assert source.stamp(0) != before
    chunk.unlink()
    assert len({before, source.stamp(0)}) == 2
    shutil.rmtree(tmp_path / "a.zarr")
    assert source.stamp(0) == ""
    with pytest.raises(InputError, match=r"a\.zarr is gone"):
        source.read(0)


def test_files_beside_chunks_are_no_part_of_a_result(tmp_path: Path) -> None:
    folder = small(tmp_path / "a.zarr")
    (folder / "0" / ".DS_Store").write_bytes(b"x")
    (folder / "notes.txt").write_bytes(b"x")
    (folder / ".zmetadata").write_text("{}")
    names = set(unpack(pack(LocalFolder(folder), "a.zarr")))
    chunks = {f"0/{z}.{y}.0" for z in range(2) for y in range(2)}
    assert names == chunks | {"0/.zarray", "0/.zattrs", ".zgroup", ".zattrs"}
    assert zarr_images.pixels(folder).max() == 5
