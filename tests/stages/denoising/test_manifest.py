"""The rows of a job: where it continues, and what a report says of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from snr_ray.images.collection import Source
from snr_ray.localfolder import LocalFolder
from snr_ray.noise.viewrange import ViewRange
from snr_ray.stages.denoising import manifest
from snr_ray.stages.denoising.imagefiles import MANIFEST_SCHEMA
from snr_ray.stages.denoising.manifest import Manifest


def table(names: list[str], **columns: Any) -> pa.Table:
    rows = [{"id": name, "output": name, "stamp": "1", "status": "done", "height": 9, "width": 9,
             "explained": 40.0, "seconds": 0.5} | columns for name in names]  # fmt: skip
    return pa.Table.from_pylist(rows, MANIFEST_SCHEMA)


def source(names: list[str], stamp: str = "1") -> Source:
    return Source("these", names, lambda index: b"", stamps=lambda index: stamp)


def test_parts_are_one_table_and_say_what_is_done(tmp_path: Path) -> None:
    out = LocalFolder(tmp_path)
    rows = Manifest(out)
    for k in range(3):
        rows.add(table([f"{k}{j}.png" for j in (1, 0)]))
        rows.flush()
    assert len(list((tmp_path / "manifest.parquet").iterdir())) == 3
    ids = ["00.png", "01.png", "10.png", "11.png", "20.png", "21.png"]
    assert sorted(pq.read_table(tmp_path / "manifest.parquet")["id"].to_pylist()) == ids
    for name in ids:
        out.write(name, b"")
    assert Manifest(out).resume(source([*ids, "30.png"])).tolist() == [True] * 6 + [False]
    out.remove("10.png")  # its result is gone
    assert Manifest(out).resume(source(ids)).tolist() == [True, True, False, True, True, True]
    assert sorted(pq.read_table(tmp_path / "manifest.parquet")["id"].to_pylist()) == [
        name for name in ids if name != "10.png"]  # fmt: skip
    # Rows of images that are not of the source stay; those of replaced inputs go.
    assert Manifest(out).resume(source(["00.png", "30.png"], "2")).tolist() == [False, False]
    left = sorted(pq.read_table(tmp_path / "manifest.parquet")["id"].to_pylist())
    assert left == ["01.png", "11.png", "20.png", "21.png"]


def test_a_result_without_its_second_file_is_made_again(tmp_path: Path) -> None:
    out = LocalFolder(tmp_path)
    rows = Manifest(out)
    rows.add(table(["a.png", "b.png"]))
    rows.flush()
    for name in ("a.png", "a.png.std.npy", "b.png"):
        out.write(name, b"")
    these = source(["a.png", "b.png"])
    assert Manifest(out).resume(these).tolist() == [True, True]
    assert Manifest(out).resume(these, beside=".std.npy").tolist() == [True, False]


@pytest.mark.parametrize("damage", ["cut", "flipped", "another table"])
def test_a_damaged_part_is_done_again(damage: str, tmp_path: Path) -> None:
    out = LocalFolder(tmp_path)
    rows = Manifest(out)
    for name in ("a", "b"):
        out.write(name, b"")
        rows.add(table([name]))
        rows.flush()
    part = tmp_path / "manifest.parquet" / "part-000001.parquet"
    data = part.read_bytes()
    if damage == "cut":
        part.write_bytes(data[:50])
    elif damage == "flipped":  # the footer is whole
        part.write_bytes(data[:4] + bytes(byte ^ 0xFF for byte in data[4:60]) + data[60:])
    else:
        pq.write_table(pq.read_table(part).drop_columns("output"), part)
    again = Manifest(out)
    assert again.resume(source(["a", "b"])).tolist() == [True, False]
    again.add(table(["b"]))
    again.flush(last=True)
    assert pq.read_table(tmp_path / "manifest.parquet")["id"].to_pylist() == ["a", "b"]


def test_a_job_without_results_has_an_empty_table(tmp_path: Path) -> None:
    Manifest(LocalFolder(tmp_path)).flush(last=True)
    assert pq.read_table(tmp_path / "manifest.parquet").schema.equals(MANIFEST_SCHEMA)


def test_summary_is_that_of_all_rows_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "BATCH_ROWS", 7)
    rng, rows = np.random.default_rng(0), Manifest(LocalFolder(tmp_path))
    decibels = rng.normal(40, 8, 60)
    for k, value in enumerate(decibels):
        status = "doubtful" if value < 30 else "done"
        rows.add(table([f"{k:02d}"], explained=value, status=status, width=9 + (k == 3)))
    rows.add(table(["unknown"], explained=None))
    rows.flush()
    found = rows.summary(9, 5, 4)
    assert (found.images, found.odd_sizes, found.seconds) == (61, 1, 30.5)
    assert found.doubtful == (decibels < 30).sum()
    assert found.median == pytest.approx(np.median(decibels), abs=0.06)
    assert found.least == pytest.approx(decibels.min(), abs=1e-4)
    worst = [f"{k:02d}" for k in np.argsort(decibels)[:4]]
    assert [row["id"] for row in found.worst] == worst
    assert len({row["id"] for row in found.sample}) == 5
    assert rows.summary(9, 5, 4).sample == found.sample


def test_images_beyond_the_range_of_a_model_are_counted(tmp_path: Path) -> None:
    rows = Manifest(LocalFolder(tmp_path))
    for n_views in (None, 0, 3, 4, 18, 19):  # of 20 pixels at most: 4 to 18
        rows.add(table([f"{n_views}"], n_views=n_views, width=20, height=11))
    rows.flush()
    found = rows.summary(9, 5, 4, ViewRange(0.2, 0.9))
    assert (found.odd_sizes, found.odd_views) == (0, 2)
    assert rows.summary(9, 5, 4).odd_views == 0
