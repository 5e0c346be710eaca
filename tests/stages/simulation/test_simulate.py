"""The simulate stage: rows equal the operator, readable without Ray, exactly once, resumable."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from PIL import Image

from snr_ray import configfile as configs
from snr_ray.address import open_folder
from snr_ray.config import Config
from snr_ray.errors import InputError, RunError
from snr_ray.folder import JOB
from snr_ray.images.collection import SPLITS, Source
from snr_ray.images.datafolder import DataFolder, tensors
from snr_ray.images.sources import open_source
from snr_ray.learning.batches import Share
from snr_ray.learning.shardfeed import ShardFeed
from snr_ray.localfolder import LocalFolder
from snr_ray.lock import locked
from snr_ray.noise.operator import NoiseSpec, noise_operator
from snr_ray.stages.simulation import simulate as stage
from snr_ray.stages.simulation.dataset import Origin, collect_pairs, count_rows, open_rows, settle
from snr_ray.stages.simulation.simulate import simulate

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_2_cpus")]


def read(out: Path, split: str) -> dict[str, tuple[np.ndarray, ...]]:
    """id -> (clean, noisy_12, noisy_6) of a split, by plain pyarrow."""
    table = pq.read_table(out / split)
    columns = [tensors(table[name]) for name in ("clean", "noisy_12", "noisy_6")]
    return dict(zip(table["id"].to_pylist(), zip(*columns, strict=True), strict=True))


def test_rows_are_the_images_and_their_noise(tiny: Config, tmp_path: Path) -> None:
    outcome = simulate(tiny, images="glyphs", out=tmp_path / "data")
    source = open_source("glyphs")
    seen: set[str] = set()
    for split in SPLITS:
        rows = read(outcome.out, split)
        assert set(rows) == {source.ids[i] for i in source.select(split, 200)}
        seen |= set(rows)
        for name, (clean, *noisy) in list(rows.items())[:5]:
            expected = source.load(source.ids.index(name), tiny.images)
            np.testing.assert_array_equal(clean, expected)
            for n_views, image in zip((12, 6), noisy, strict=True):
                noise = noise_operator(NoiseSpec(n_views), 16, 16)
                np.testing.assert_allclose(image, noise(expected), atol=1e-5)
    assert len(seen) == outcome.images == 200
    manifest = json.loads((outcome.out / "manifest.json").read_text())
    assert manifest["noise"] == [
        {"n_views": 12, "filter": "ramp", "angle_range": 180.0, "photons": 0},
        {"n_views": 6, "filter": "ramp", "angle_range": 180.0, "photons": 0},
    ]
    assert sum(manifest["splits"].values()) == manifest["images"] == 200


@pytest.fixture
def patients(image_folder: Path, tmp_path: Path) -> Path:
    """A table of 60 images of 30 patients."""
    data = [(image_folder / "a" / "00.png").read_bytes()] * 60
    table = pa.table({"image": data, "patient": [f"p{k % 30}" for k in range(60)]})
    pq.write_table(table, tmp_path / "patients.parquet")
    return tmp_path / "patients.parquet"


def test_patients_stay_in_one_split_from_the_images_to_the_data_folder(
    tiny: Config, patients: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = simulate(tiny, images=str(patients), out=tmp_path / "data")
    assert "split by the column patient: 30 groups" in capsys.readouterr().err
    found = [{int(name[-6:]) % 30 for name in read(outcome.out, split)} for split in SPLITS]
    assert sum(map(len, found)) == len(set().union(*found)) == 30
    # What is trained from the folder, or from the table itself, remembers it, and says it once.
    config = settle(tiny, Origin(data=outcome.out))
    assert config.images.group == "patient"
    origin = Origin(images=str(patients))
    config = settle(tiny, origin)
    assert config.images.group == "patient"
    n_rows = [count_rows(config, origin, split) for split in SPLITS]
    assert n_rows == [2 * len(split) for split in found]
    assert capsys.readouterr().err.count("split by the column patient") == 1
    # A folder of before there were groups was split image by image.
    manifest = json.loads((outcome.out / "manifest.json").read_text())
    del manifest["config"]["images"]["group"]
    (outcome.out / "manifest.json").write_text(json.dumps(manifest))
    assert settle(tiny, Origin(data=outcome.out)).images.group == "none"


def test_a_split_without_patients_is_refused(tiny: Config, image_folder: Path) -> None:
    origin = Origin(images=str(image_folder))  # two folders cannot fill three splits
    config = settle(configs.replace(tiny, {"images.group": "folder"}), origin)
    source = origin.grouped("folder").source
    empty = next(split for split in SPLITS if not len(source.select(split)))
    with pytest.raises(InputError, match=r"its group \(images.group=folder\), so give images of"):
        count_rows(config, origin, empty)


def test_noise_of_a_crop_is_that_of_the_whole_image(tiny: Config, tmp_path: Path) -> None:
    config = configs.replace(tiny, {"images.size": 24, "images.crop": 16, "images.limit": 60})
    out = simulate(config, images="glyphs", out=tmp_path / "data").out
    source, noise = open_source("glyphs"), noise_operator(NoiseSpec(6), 24, 24)
    places = set()
    for name, (clean, _, noisy) in read(out, "train").items():
        whole = source.load(source.ids.index(name), config.images)
        found = [
            (top, left)
            for top in range(9)
            for left in range(9)
            if np.array_equal(whole[:, top : top + 16, left : left + 16], clean)
        ]
        assert found
        top, left = found[0]
        places.add((top, left))
        expected = noise(whole)[:, top : top + 16, left : left + 16]
        np.testing.assert_allclose(noisy, expected, atol=1e-5)
    assert len(places) > 20
    again = simulate(config, images="glyphs", out=tmp_path / "again").out
    for name, versions in read(out, "train").items():
        np.testing.assert_array_equal(read(again, "train")[name][0], versions[0])
        break


def test_photon_noise_is_that_of_the_image_id(tiny: Config, tmp_path: Path) -> None:
    config = configs.replace(tiny, {"noise.photons": 1000, "images.limit": 40})
    few = configs.replace(config, {"images.limit": 20})
    many = read(simulate(config, images="glyphs", out=tmp_path / "many").out, "train")
    for name, versions in read(simulate(few, images="glyphs", out=tmp_path / "few").out,
                               "train").items():  # fmt: skip
        np.testing.assert_allclose(versions[1], many[name][1], atol=1e-6)
        exact = noise_operator(NoiseSpec(12), 16, 16)(versions[0])
        assert np.abs(versions[1] - exact).max() > 0.02


def test_folder_that_cannot_be_written_is_a_sentence(tiny: Config, tmp_path: Path) -> None:
    out = tmp_path / "data"
    out.mkdir()
    simulate(tiny, images="glyphs", out=out)
    (out / "manifest.json").unlink()
    for shard in out.glob("train/*.parquet"):
        shard.unlink()
    (out / "train").rmdir()
    (out / "train").write_text("in the way")
    with pytest.raises(RunError, match=r"must be a folder that can be written, but .* continue"):
        simulate(tiny, images="glyphs", out=out)
    (out / "train").unlink()
    assert simulate(tiny, images="glyphs", out=out).images == 200


def test_a_second_driver_is_told_of_the_first(tiny: Config, tmp_path: Path) -> None:
    with locked(tmp_path, "simulate"), pytest.raises(InputError, match="in use by snr simulate"):
        simulate(tiny, images="glyphs", out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_bad_images_become_rows_of_failures(
    tiny: Config, image_folder: Path, tmp_path: Path
) -> None:
    (image_folder / "a" / "empty.png").write_bytes(b"")
    good = (image_folder / "a" / "00.png").read_bytes()
    (image_folder / "a" / "cut.png").write_bytes(good[: len(good) // 2])
    deep = Image.fromarray(np.zeros((20, 20), np.uint16))
    deep.save(image_folder / "b" / "deep.png")
    outcome = simulate(tiny, images=str(image_folder), out=tmp_path / "data")
    assert (outcome.images, outcome.failed) == (24, 3)
    failures = pq.read_table(outcome.out / "failures.parquet").to_pylist()
    assert {f["id"]: f["stage"] for f in failures} == {
        "a/cut.png": "read", "a/empty.png": "read", "b/deep.png": "read"}  # fmt: skip
    assert "0 bytes" in failures[1]["reason"]
    assert "images.white" in failures[2]["reason"]
    ids = [name for split in SPLITS if (outcome.out / split).is_dir()
           for name in read(outcome.out, split)]  # fmt: skip
    assert len(ids) == len(set(ids)) == 24


def test_interrupted_job_continues_and_finished_one_is_left_alone(
    tiny: Config, tmp_path: Path
) -> None:
    config = configs.replace(tiny, {"images.limit": 700})
    out = simulate(config, images="glyphs", out=tmp_path / "data").out
    shards = sorted(out.glob("train/*.parquet"))
    assert len(shards) > 1
    before = {split: read(out, split).keys() for split in SPLITS}
    stamps = [path.stat().st_mtime_ns for path in shards[1:]]
    shards[0].unlink()  # as if killed before this shard was written
    (out / "manifest.json").unlink()
    simulate(config, images="glyphs", out=out)
    assert {split: read(out, split).keys() for split in SPLITS} == before
    assert [path.stat().st_mtime_ns for path in shards[1:]] == stamps
    finished = shards[0].stat().st_mtime_ns
    simulate(config, images="glyphs", out=out)
    assert shards[0].stat().st_mtime_ns == finished


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"images": null}'])
@pytest.mark.parametrize("name", ["manifest.json", "plan.json"])
def test_damaged_files_of_a_job_are_made_anew(
    name: str, damage: str, tiny: Config, tmp_path: Path
) -> None:
    out = simulate(tiny, images="glyphs", out=tmp_path / "data").out
    whole, rows = (out / name).read_text(), {split: read(out, split).keys() for split in SPLITS}
    (out / name).write_text(damage)
    simulate(tiny, images="glyphs", out=out)
    assert (out / name).read_text() == whole
    assert {split: read(out, split).keys() for split in SPLITS} == rows


def test_folder_of_another_job_is_refused_and_replaced_on_demand(
    tiny: Config, tmp_path: Path
) -> None:
    simulate(tiny, images="glyphs", out=tmp_path / "data")
    other = configs.replace(tiny, {"noise.n_views": [8], "train.batch_size": 16})
    with pytest.raises(InputError, match=r"another job \(noise changed\); .*--overwrite"):
        simulate(other, images="glyphs", out=tmp_path / "data")
    simulate(other, images="glyphs", out=tmp_path / "data", overwrite=True)
    table = pq.read_table(tmp_path / "data" / "test")
    assert table.column_names == ["id", "clean", "noisy_8"]


def test_folder_with_files_of_the_user_is_refused(tiny: Config, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="holds other files"):
        simulate(tiny, images="glyphs", out=tmp_path)
    simulate(tiny, images="glyphs", out=tmp_path, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_overwrite_does_not_touch_what_snr_did_not_write(tiny: Config, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "mine.csv").write_text("1,2")
    with pytest.raises(InputError, match="is not from snr"):
        simulate(tiny, images="glyphs", out=tmp_path, overwrite=True)
    assert (tmp_path / "train" / "mine.csv").read_text() == "1,2"


def test_a_bucket_holds_the_same_data_folder(
    tiny: Config, bucket: tuple[pafs.FileSystem, str], tmp_path: Path
) -> None:
    config = configs.replace(tiny, {"images.limit": 40})
    here = simulate(config, images="glyphs", out=tmp_path / "data").out
    where = f"s3://test:test@bucket/data?{bucket[1]}"
    outcome = simulate(config, images="glyphs", out=where)
    place = open_folder(where)
    assert str(outcome.out) == f"s3://bucket/data?{bucket[1]}"
    assert place.list() == open_folder(here).list()
    for name in place.list():
        assert b"test:test" not in place.read(name)
        assert place.read(name) == (here / name).read_bytes()
    again = simulate(config, images="glyphs", out=where)
    assert (again.images, again.failed) == (40, 0)
    # What trains on it and what is scored on it reads the bucket.
    rows = [open_rows(config, Origin(data=data), "train") for data in (here, where)]
    ours, theirs = (collect_pairs(part, config)[0] for part in rows)
    np.testing.assert_array_equal(np.concatenate(ours.clean), np.concatenate(theirs.clean))
    feeds = [ShardFeed(DataFolder.open(data), config, Share()) for data in (here, where)]
    for one, other in zip(*(feed.batches(0) for feed in feeds), strict=False):
        np.testing.assert_array_equal(one.noisy, other.noisy)
        break


def test_a_node_without_the_mount_writes_nothing_there(tiny: Config, tmp_path: Path) -> None:
    out = open_folder(tmp_path / "data")
    out.write(JOB, "another job's, or none where the mount is missing")
    other = LocalFolder(tmp_path / "data", b"this job")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("snr_ray.stages.simulation.simulate.claim", lambda *_, **__: False)
        patch.setattr(LocalFolder, "claimed", lambda self: other)
        with pytest.raises(
            InputError, match=r"node \S+ does not see .*job.json of this job; mount"
        ):
            simulate(tiny, images="glyphs", out=out)
    assert out.list() == [JOB, "plan.json"]


@pytest.mark.parametrize(("autoscaler", "at_least", "at_most"), [(False, 3, 20), (True, 200, 300)])
def test_shards_are_many_where_nodes_may_come_but_not_without_bound(
    autoscaler: bool,
    at_least: int,
    at_most: int,
    tiny: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stage, "has_autoscaler", lambda: autoscaler)
    monkeypatch.setattr(stage, "cpus", lambda: 2)
    many = Source("many", [f"{k}.png" for k in range(100_000)], lambda index: b"")
    whole = configs.replace(tiny, {"images.limit": None})
    rows_per_shard = stage._settled(whole, many, open_folder(tmp_path))
    plan = stage._plan(whole, many, rows_per_shard)
    assert at_least <= len(plan) <= at_most
    assert sum(len(shard["rows"]) for shard in plan) == 100_000
