"""What a folder holds: each real file once, an end whatever the links, and a count of the rest."""

import os
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from snr_ray.errors import InputError
from snr_ray.images.collection import Source
from snr_ray.images.listing import Glob
from snr_ray.images.sources import open_source


def picture(path: Path, value: int = 9) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), value).save(path, format="png")
    return path


def counts(source: Source) -> dict[str, int]:
    return dict(source.left_out.counts)


def test_links_that_go_in_circles_list_each_file_once(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "sub" / "b.png")
    for k in range(2):  # 2^40 paths to whoever follows them
        (tmp_path / f"loop{k}").symlink_to(".")
        (tmp_path / "sub" / f"up{k}").symlink_to("..")
    source = open_source(str(tmp_path))
    assert source.ids == ["a.png", "sub/b.png"]
    assert counts(source) == {"links to folders that are listed anyhow": 4}


def test_what_links_lead_to_is_read_under_their_name_unless_it_has_one(tmp_path: Path) -> None:
    picture(tmp_path / "elsewhere" / "far.png", 1)
    picture(tmp_path / "elsewhere" / "more" / "x.png", 2)
    folder = tmp_path / "in"
    picture(folder / "own.png", 3)
    (folder / "far.png").symlink_to(tmp_path / "elsewhere" / "far.png")
    (folder / "more").symlink_to("../elsewhere/more")
    (folder / "again.png").symlink_to("own.png")
    (folder / "gone.png").symlink_to("nowhere.png")
    source = open_source(str(folder))
    assert source.ids == ["far.png", "more/x.png", "own.png"]
    assert [round(source.read(k).pixels[0, 0, 0] * 255) for k in range(3)] == [1, 2, 3]
    assert counts(source) == {"links to files that are listed anyhow": 1, "links to nothing": 1}
    assert "1 links to nothing (gone.png)" in str(source.left_out)


def test_what_is_left_out_is_counted_by_reason(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    for name in ("a.txt", "b.txt", "c.gif", "d.txt.gz", "e.jp2", "f.heic", ".hidden.png",
                 "README", "g.1234", "failures.parquet"):  # fmt: skip
        (tmp_path / name).write_bytes(b"text")
    (tmp_path / ".git").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "t.parquet")
    source = open_source(str(tmp_path))
    assert source.ids == ["a.png"]
    assert counts(source) == {
        ".txt files": 2, ".gif files": 1, ".txt.gz files": 1, ".jp2 files": 1, ".heic files": 1,
        "hidden": 2, "files of unknown format": 2, "tables that snr wrote": 1,
        "neither files nor folders": 1, "Parquet tables beside image files": 1,
    }  # fmt: skip
    with pytest.raises(InputError, match=r"holds none; it has 1 \.txt files \(b\.txt\)"):
        open_source(f"{tmp_path}/b.*")


def test_files_are_known_by_their_first_bytes_where_names_say_nothing(tmp_path: Path) -> None:
    slice_ = b"\0" * 128 + b"DICM" + b"\0" * 8
    for name in ("IM0001", "1.2.840.113619", "a.IMA", "b.dicom", "c.dcm"):
        (tmp_path / name).write_bytes(slice_)
    (tmp_path / "DICOMDIR").write_bytes(slice_)
    picture(tmp_path / "scan")
    source = open_source(str(tmp_path))
    assert source.ids == ["1.2.840.113619", "IM0001", "a.IMA", "b.dicom", "c.dcm", "scan"]
    assert [source.output(name) for name in source.ids] == list(source.ids)


def test_a_name_that_is_not_utf8_is_read_under_an_escaped_id(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path)
    picture(tmp_path / "ok.png", 1)
    (picture(tmp_path / "odd.png", 2)).rename(os.fsdecode(folder + b"/caf\xe9.png"))
    source = open_source(str(tmp_path))
    assert source.ids == ["caf\\xe9.png", "ok.png"]
    assert round(source.read(0).pixels[0, 0, 0] * 255) == 2
    assert source.stamp(0)
    alone = open_source(os.fsdecode(folder + b"/caf\xe9.png"))
    assert alone.ids == ["caf\\xe9.png"]
    alone.read(0)
    str(alone.name).encode()


def test_a_folder_that_cannot_be_read_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "locked" / "b.png")
    scandir = os.scandir

    def refuse(path: bytes) -> object:  # as the kernel does where the user is not root
        if path.endswith(b"locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    source = open_source(str(tmp_path))
    assert source.ids == ["a.png"]
    assert counts(source) == {"folders that cannot be read: Permission denied": 1}


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.png", ["a.png"]),
        ("x/*", ["x/b.png", "x/y/c.png"]),  # a folder stands for what it holds
        ("*/*.png", ["x/b.png"]),
        ("**/*.png", ["a.png", "x/b.png", "x/y/c.png"]),
        ("x/**", ["x/b.png", "x/y/c.png"]),
        ("x/**/c.png", ["x/y/c.png"]),
        ("[!a].png", []),
        ("?.png", ["a.png"]),
    ],
)
def test_globs_are_read_as_shells_read_them(pattern: str, found: list[str], tmp_path: Path) -> None:
    names = ["a.png", "x/b.png", "x/y/c.png"]
    for name in names:
        picture(tmp_path / name)
    if found:
        base = pattern.split("/*")[0] if pattern.startswith("x/") else ""
        ids = [name.removeprefix(f"{base}/") for name in found] if base else found
        assert open_source(f"{tmp_path}/{pattern}").ids == ids
    assert [name for name in names if Glob(pattern).has(name)] == found
    for name in found:
        parts = name.split("/")[:-1]
        assert all(Glob(pattern).reaches("/".join(parts[: k + 1])) for k in range(len(parts)))


def test_order_is_that_of_the_bytes_of_names_however_the_disk_gives_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["b.png", "a/z.png", "a.png", "é.png", "Z.png", "a/b/c.png"]
    for name in names:
        picture(tmp_path / name)
    scandir = os.scandir

    class Shuffled:
        def __init__(self, path: bytes) -> None:
            with scandir(path) as entries:
                self.entries = list(entries)
            random.Random(len(path)).shuffle(self.entries)

        def __enter__(self) -> list:
            return self.entries

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(os, "scandir", Shuffled)
    assert open_source(str(tmp_path)).ids == sorted(names, key=str.encode)


def test_a_large_folder_needs_few_bytes_for_an_image(tmp_path: Path) -> None:
    for k in range(3000):
        os.close(os.open(tmp_path / f"{k:05d}.png", os.O_CREAT | os.O_WRONLY))
    ids = open_source(str(tmp_path)).ids
    assert ids.array.nbytes < 3000 * (9 + 5)
    assert np.all(np.array([len(name) for name in ids]) == 9)
