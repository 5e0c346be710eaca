"""What SRC may name: ids, splits, reading, and the sentences for what it may not."""

import io
import itertools
import os
import pickle
import signal
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl
from urllib.request import urlopen

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from PIL import Image

from snr_ray.bucketcreate import create_object
from snr_ray.config import ImagesConfig
from snr_ray.errors import InputError
from snr_ray.images.collection import SPLITS, Source
from snr_ray.images.sources import open_source


def png(seed: int, side: int = 12) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side), dtype=np.uint8)
    Image.fromarray(pixels).save(out, format="png")
    return out.getvalue()


@pytest.mark.parametrize("name", ["glyphs", "photos"])
def test_built_in_source_is_the_same_every_time(name: str) -> None:
    a, b = open_source(name), open_source(name)
    config = ImagesConfig(size=20)
    assert a.ids == b.ids
    assert len(a.ids) > 3000
    np.testing.assert_array_equal(a.load(17, config), b.load(17, config))


def test_glyphs_are_bright_letters_on_black() -> None:
    source = open_source("glyphs")
    for index in range(0, len(source.ids), 397):
        image = source.load(index, ImagesConfig(size=28))
        assert image.max() > 0.7, source.ids[index]
        assert 0.02 < (image > 0.5).mean() < 0.7, source.ids[index]


@pytest.mark.parametrize("name", ["glyphs", "photos"])
def test_splits_share_no_group(name: str) -> None:
    # Variants of one letter, and crops of one patch, are one source image.
    source = open_source(name)
    groups = [{source.group(source.ids[i]) for i in source.select(split)} for split in SPLITS]
    assert all(groups)
    assert not (groups[0] & groups[1])
    assert not (groups[0] & groups[2])
    assert not (groups[1] & groups[2])


def test_split_does_not_change_when_images_are_added(image_folder: Path) -> None:
    before = open_source(str(image_folder))
    splits = {before.ids[i]: before.split(i) for i in range(len(before.ids))}
    (image_folder / "a" / "new.png").write_bytes(png(1))
    after = open_source(str(image_folder))
    assert {after.ids[i]: after.split(i) for i in range(len(after.ids))}.items() >= splits.items()


def test_splits_cover_every_image_once(image_folder: Path) -> None:
    source = open_source(str(image_folder))
    assert sorted(i for split in SPLITS for i in source.select(split)) == list(range(24))


def test_limit_keeps_the_same_images_in_every_split() -> None:
    source = open_source("glyphs")
    limited = {split: source.select(split, 500) for split in SPLITS}
    assert sum(map(len, limited.values())) == 500
    for split in SPLITS:
        assert set(limited[split]) <= set(source.select(split))


def test_folder_ids_are_relative_paths_and_other_files_are_ignored(image_folder: Path) -> None:
    (image_folder / "notes.txt").write_text("hello")
    (image_folder / ".hidden.png").write_bytes(png(2))
    source = open_source(str(image_folder))
    assert source.ids == sorted(f"{'ab'[k % 2]}/{k:02d}.png" for k in range(24))


def test_one_file_and_glob_and_uri(image_folder: Path) -> None:
    assert open_source(str(image_folder / "a" / "00.png")).ids == ["00.png"]
    assert open_source(str(image_folder / "a" / "0*.png")).ids == [
        "00.png", "02.png", "04.png", "06.png", "08.png"]  # fmt: skip
    assert len(open_source(str(image_folder / "*" / "1?.png")).ids) == 10
    assert len(open_source(image_folder.as_uri()).ids) == 24


def test_glob_ids_keep_their_folders_apart(tmp_path: Path) -> None:
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.png").write_bytes(png(1))
    assert open_source(f"{tmp_path}/*/same.png").ids == ["a/same.png", "b/same.png"]


def test_parquet_of_structs_bytes_and_tensors(tmp_path: Path) -> None:
    files = [png(k) for k in range(5)]
    structs = [{"bytes": data, "path": f"p{k}.png"} for k, data in enumerate(files)]
    tensors = np.random.default_rng(0).random((5, 1, 12, 12), dtype=np.float32)
    tables = {
        "structs": pa.table({"img": structs, "label": [[k, k + 1] for k in range(5)]}),
        "bytes": pa.table({"name": [f"p{k}.png" for k in range(5)], "image": files}),
        "plain": pa.table({"image": files}),
        "tensors": pa.table({"id": [f"x/{k}.png" for k in range(5)],
                             "clean": pa.FixedShapeTensorArray.from_numpy_ndarray(tensors)}),
    }  # fmt: skip
    for name, table in tables.items():
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=2)
    expected = {
        "structs": "structs/p3.png", "bytes": "bytes/p3.png", "plain": "plain/1-000001",
        "tensors": "x/3.png",
    }  # fmt: skip
    for name in tables:
        source = open_source(str(tmp_path / f"{name}.parquet"))
        assert source.ids[3] == expected[name]
        pixels = source.load(3, ImagesConfig(size=12))
        truth = tensors[3] if name == "tensors" else None
        if truth is not None:
            np.testing.assert_array_equal(pixels, truth)
        else:
            stored = np.asarray(Image.open(io.BytesIO(files[3])))
            np.testing.assert_allclose(pixels[0], stored / 255, atol=1e-6)
    chosen = open_source(f"{tmp_path / 'structs.parquet'}#img")
    assert len(chosen.ids) == 5


def test_parquet_without_images_says_which_columns_it_has(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1], "b": [2]}), tmp_path / "t.parquet")
    with pytest.raises(InputError, match=r"t\.parquet has a, b"):
        open_source(str(tmp_path))
    with pytest.raises(InputError, match="must have the column z with"):
        open_source(f"{tmp_path}#z")


def test_notmnist_archive_equals_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "notMNIST_small"
    for letter in "AB":
        (folder / letter).mkdir(parents=True)
        (folder / letter / "x.png").write_bytes(png(ord(letter)))
    (folder / "B" / "broken.png").write_bytes(b"")
    with tarfile.open(tmp_path / "n.tar.gz", "w:gz") as archive:
        archive.add(folder, "notMNIST_small")
    packed = open_source("notmnist:~/n.tar.gz")  # which a shell leaves as it is
    unpacked = open_source(f"notmnist:{folder}")
    assert sorted(packed.ids) == unpacked.ids == ["A/x.png", "B/broken.png", "B/x.png"]
    index = packed.ids.index("A/x.png")
    np.testing.assert_array_equal(packed.read(index).pixels, unpacked.read(0).pixels)
    with pytest.raises(InputError, match=r"B/broken\.png is empty"):
        packed.read(packed.ids.index("B/broken.png"))


def test_cifar10_reads_torchvision_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.datasets

    class Stub:  # stands for the verified download, which needs the network
        def __init__(self, root: str, train: bool, download: bool) -> None:
            self.data = np.full((3 if train else 2, 32, 32, 3), 7, np.uint8)

        def __len__(self) -> int:
            return len(self.data)

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Stub)
    (tmp_path / "cifar-10-batches-py").mkdir()
    source = open_source(f"cifar10:{tmp_path}")
    assert source.ids[-1] == "test/00001.png"
    assert source.load(0, ImagesConfig(size=32, channels=3)).shape == (3, 32, 32)


@pytest.mark.parametrize("name", ["notmnist", "cifar10", "places365"])
def test_download_without_network_names_the_file_to_bring(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", _no_network)
    with pytest.raises(InputError, match=rf"{name} could not be downloaded .* as {name}:PATH"):
        open_source(name)


def _no_network(*_: object, **__: object) -> None:
    raise OSError("no network in tests")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("nowhere/at/all", "SRC must be a path that exists, a URI, or one of glyphs, photos"),
        ("glyph", "SRC must be a path that exists"),
        ("glyphs:somewhere", "takes no path, but got glyphs:somewhere"),
        ("notmnist:missing.tar.gz", "missing.tar.gz is missing"),
        ("ftp://host/folder", "is not a URI that can be opened"),
        ("*.nothing", "holds none"),
    ],
)
def test_unusable_source_gets_a_sentence(text: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        open_source(text)


@pytest.mark.parametrize("name", ["scans.tar.gz", "SCANS.ZIP", "a.tar"])
def test_an_archive_is_to_be_unpacked(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(InputError, match=rf"but .*{name} is an archive; unpack it"):
        open_source(str(tmp_path / name))


def test_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"at least one image .*, but .* holds none"):
        open_source(str(tmp_path))


def test_deleted_file_is_one_bad_image(image_folder: Path) -> None:
    source = open_source(str(image_folder))
    (image_folder / source.ids[0]).unlink()
    with pytest.raises(InputError, match="is gone"):
        source.read(0)


def test_bucket_is_read_through_its_uri(bucket: tuple[pafs.FileSystem, str]) -> None:
    fs, query = bucket
    for k in range(3):
        with fs.open_output_stream(f"bucket/scans/{k}.png") as stream:
            stream.write(png(k))
    source = open_source(f"s3://bucket/scans?{query}")
    assert source.ids == ["0.png", "1.png", "2.png"]
    assert source.read(2).pixels.shape == (1, 12, 12)
    for nowhere in ("nosuch/scans", "bucket/nosuch"):
        with pytest.raises(InputError, match=rf"at s3://{nowhere}\S+ nothing is; look at the buck"):
            open_source(f"s3://{nowhere}?{query}")


def test_keys_of_a_bucket_are_read_as_they_are(bucket: tuple[pafs.FileSystem, str]) -> None:
    fs, query = bucket
    keys = ["a b.png", "c#d.png", "e%20f.png", "g+h.png", "i/j.png", "ü.png", "k?l.png", "i//j.png"]
    for k, key in enumerate(keys):
        create_object(fs, f"bucket/scans/{key}", png(k))
    source = open_source(f"s3://bucket/scans?{query}")
    assert sorted(source.ids) == sorted(keys)
    for k, key in enumerate(keys[:-1]):
        assert source.file(source.ids.index(key)) == (key, png(k)), key
    with pytest.raises(InputError, match="Empty path component"):  # pyarrow's; it is not i/j.png
        source.file(source.ids.index("i//j.png"))


def test_keys_of_a_bucket_that_are_no_paths_are_told(bucket: tuple[pafs.FileSystem, str]) -> None:
    fs, query = bucket
    keys = ["a/../b.png", "./c.png", "../../d.png", "e.png", "e.png-f.png", "e.png/", "g.png/"]
    for k, key in enumerate([*keys, ".h.png"]):
        create_object(fs, f"bucket/scans/{key}", png(k))
    source = open_source(f"s3://bucket/scans?{query}")
    assert source.ids == ["e.png", "e.png-f.png", "g.png"]
    assert source.left_out.counts == {
        "keys that are no paths": 3, "keys that end in a slash": 1, "hidden": 1}  # fmt: skip
    assert [source.file(k)[1] for k in range(2)] == [png(3), png(4)]
    with pytest.raises(InputError, match=r"must not end in a slash, .* but g\.png/ does; copy it"):
        source.file(2)
    endpoint = dict(parse_qsl(query))["endpoint_override"]
    urlopen(f"http://{endpoint}/moto-api/reset", data=b"").close()  # pyarrow cannot remove them
    fs.create_dir("bucket")


def test_listing_a_bucket_without_end_can_be_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    pages, since = itertools.count(), time.monotonic()

    class Endless(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(0.1)
            more = "true" if time.monotonic() < since + 8 else "false"
            body = (
                "<?xml version='1.0'?><ListBucketResult><KeyCount>1</KeyCount><Contents><Key>scans/"
                f"{next(pages)}.png</Key><Size>9</Size></Contents><IsTruncated>{more}"
                "</IsTruncated><NextContinuationToken>t</NextContinuationToken></ListBucketResult>"
            ).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.send_error(404)

        def log_message(self, *_: object) -> None: ...

    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        query = f"scheme=http&endpoint_override=127.0.0.1:{server.server_port}&region=us-east-1"
        stop = threading.Timer(2, os.kill, (os.getpid(), signal.SIGINT))
        # Shells start what runs in the background with this signal ignored.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        stop.start()
        try:
            with pytest.raises(KeyboardInterrupt):
                open_source(f"s3://bucket/scans?{query}")
        finally:
            stop.cancel()
            signal.signal(signal.SIGINT, before)
        assert time.monotonic() < since + 6
        assert next(pages) > 3
        server.shutdown()


def test_names_with_special_characters_are_read_literally(tmp_path: Path) -> None:
    folder = tmp_path / "dir [1]*x #2"
    folder.mkdir()
    (folder / "a #1?.png").write_bytes(png(1))
    assert open_source(str(folder)).ids == ["a #1?.png"]
    assert open_source(str(folder / "a #1?.png")).read(0).pixels.shape == (1, 12, 12)


def test_null_row_is_one_bad_image(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [png(1), None]}), tmp_path / "t.parquet")
    source = open_source(str(tmp_path))
    assert source.read(0).pixels.shape == (1, 12, 12)
    with pytest.raises(InputError, match=r"must hold an image, but .* is null"):
        source.file(1)


def test_a_setting_that_spoils_every_image_is_told_before_any_work(tmp_path: Path) -> None:
    for k in range(3):
        Image.fromarray(np.full((8, 8), 500, np.uint16)).save(tmp_path / f"{k}.png")
    source = open_source(str(tmp_path))
    every = np.arange(3)
    with pytest.raises(InputError, match=r"Of 3 images of .* none can be read: uint16 .*white"):
        source.check(every, ImagesConfig())
    source.check(every, ImagesConfig(white=500))
    (tmp_path / "0.png").write_bytes(b"")  # one bad image is one failure
    source.check(every, ImagesConfig(white=500))


def test_one_odd_table_is_one_failed_item(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [png(1), png(2)]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"img": [png(3)]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"label": [1, 2]}), tmp_path / "classes.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 cut short")
    source = open_source(str(tmp_path))
    assert source.ids == ["a/0-000000", "a/0-000001", "b/0-000000", "broken.parquet"]
    assert source.left_out.counts == {"tables without images": 1}
    for index, seed in enumerate((1, 2, 3)):
        assert source.file(index)[1] == png(seed)
    with pytest.raises(InputError, match=r"broken\.parquet is not a readable Parquet file"):
        source.read(3)
    assert len({source.stamp(k) for k in range(4)}) == 3  # that of the table


@pytest.mark.parametrize("kind", ["binary", "large_binary", "binary_view"])
@pytest.mark.parametrize("in_struct", [False, True])
def test_bytes_of_every_arrow_kind_are_images(kind: str, in_struct: bool, tmp_path: Path) -> None:
    data = pa.array([png(1)], getattr(pa, kind)())
    if in_struct:
        data = pa.StructArray.from_arrays([data, pa.array(["x.png"])], ["bytes", "path"])
    pq.write_table(pa.table({"image": data}), tmp_path / "t.parquet")
    assert open_source(str(tmp_path)).file(0)[1] == png(1)


def test_integers_in_tensors_mean_what_they_do_in_files(tmp_path: Path) -> None:
    for depth, white in ((np.uint8, None), (np.uint16, 65535.0)):
        full = np.full((2, 3, 8, 8), np.iinfo(depth).max, depth)
        table = pa.table({"image": pa.FixedShapeTensorArray.from_numpy_ndarray(full)})
        pq.write_table(table, tmp_path / f"{white}.parquet")
        source = open_source(str(tmp_path / f"{white}.parquet"))
        assert source.read(1, ImagesConfig(white=white)).pixels.max() == 1
    with pytest.raises(InputError, match=r"uint16 pixels have no agreed white"):
        source.read(1, ImagesConfig())


def test_columns_that_only_look_like_images_are_told_at_once(tmp_path: Path) -> None:
    last = np.zeros((2, 8, 8, 3), np.float32)
    storage = pa.FixedSizeListArray.from_arrays(pa.array(last.ravel()), 192)
    turned = pa.fixed_shape_tensor(pa.float32(), (8, 8, 3), permutation=[2, 0, 1])
    numbers = pa.StructArray.from_arrays(
        [pa.array([[1, 2]], pa.list_(pa.uint8())), pa.array(["x.png"])], ["bytes", "path"]
    )
    for column, sentence in (
        (pa.FixedShapeTensorArray.from_numpy_ndarray(last), r"holds \[8, 8, 3\]; move the chan"),
        (pa.ExtensionArray.from_storage(turned, storage), r"\[8, 8, 3\] in the order \[2, 0, 1\]"),
        (numbers, r"encoded images .* has image \(struct<bytes: list<element: uint8>"),
    ):
        pq.write_table(pa.table({"image": column}), tmp_path / "t.parquet")
        with pytest.raises(InputError, match=sentence):
            open_source(str(tmp_path / "t.parquet"))


def test_tables_of_tensors_and_of_files_are_not_mixed(tmp_path: Path) -> None:
    pixels = pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((2, 1, 8, 8), np.float32))
    pq.write_table(pa.table({"clean": pixels}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": [png(1)]}), tmp_path / "b.parquet")
    source = open_source(str(tmp_path))
    assert len(source.ids) == 2
    assert source.tensors
    assert sum(source.left_out.counts.values()) == 1


def test_ids_of_tables_stay_inside_the_output_folder(tmp_path: Path) -> None:
    ids = ["../../up.png", "/abs/x.png", "a/../b.png", "fine..png", ".."]
    pq.write_table(pa.table({"id": ids, "image": [png(k) for k in range(5)]}),
                   tmp_path / "t.parquet")  # fmt: skip
    assert open_source(str(tmp_path)).ids == [
        "t/__/__/up.png", "t/abs/x.png", "t/a/__/b.png", "t/fine..png", "t/__"]  # fmt: skip


def test_rows_that_share_a_name_are_told_apart_by_their_place(tmp_path: Path) -> None:
    names = ["cat/0.png", "dog/0.png", "cat/0.png", None, "cat/0.png", "x", "x"]
    files = [png(k) for k in range(7)]
    images = pa.StructArray.from_arrays([pa.array(files), pa.array(names)], ["bytes", "path"])
    pq.write_table(pa.table({"image": images}), tmp_path / "t.parquet", row_group_size=3)
    source = open_source(str(tmp_path))
    assert source.ids == [
        "t/cat/0-0-000000.png", "t/dog/0.png", "t/cat/0-0-000002.png", "t/1-000000",
        "t/cat/0-1-000001.png", "t/x-1-000002", "t/x-2-000000"]  # fmt: skip
    assert [source.file(k)[1] for k in range(7)] == files
    pq.write_table(pa.table({"image": [png(8)], "id": ["cat/0.png"]}), tmp_path / "more.parquet")
    assert set(source.ids) < set(open_source(str(tmp_path)).ids)
    pixels = pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((2, 1, 8, 8), np.float32))
    pq.write_table(pa.table({"clean": pixels, "id": ["a", "a"]}), tmp_path / "tensors.parquet")
    with pytest.raises(InputError, match="holds 2 images named 'a'"):  # a copied shard
        open_source(str(tmp_path / "tensors.parquet"))


def test_empty_text_is_refused() -> None:
    with pytest.raises(InputError, match="but is empty"):
        open_source(" ")


def test_rows_that_are_read_together_stay_together(tmp_path: Path) -> None:
    out = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(out, format="png")
    table = pa.table({"bytes": [out.getvalue()] * 60, "label": [k // 10 for k in range(60)]})
    for name in ("a", "b"):
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=10)
    source = open_source(str(tmp_path))
    rows = source.select("train")
    gathered = source.gathered(rows)
    assert sorted(gathered) == sorted(rows)
    chunk = gathered // 10
    assert np.count_nonzero(np.diff(chunk)) == len(set(chunk)) - 1  # each comes once
    assert list(dict.fromkeys(chunk)) != sorted(set(chunk))  # and not in the order of the files
    assert list(source.labels) == [str(k // 10) for k in range(60)] * 2


def test_a_source_is_small_on_the_way_to_workers(tmp_path: Path) -> None:
    names = [f"{k:07d}" for k in range(100_000)]
    source = Source("many", names, len)
    source.select("train")  # what it computes stays behind
    assert len(pickle.dumps(source)) < 15 * len(names)
    assert pickle.loads(pickle.dumps(source)).ids[99_999] == "0099999"
    assert source.ids[2:4] == ["0000002", "0000003"]
    assert source.ids != names[1:]


def test_ids_that_are_no_text_get_a_sentence(tmp_path: Path) -> None:
    table = pa.table({"bytes": [b"x"], "id": pa.array([{"a": [1]}])})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"must be text or numbers, but those of .*a\.parquet"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("name", ["image", "id", "label"])
def test_two_columns_of_one_name_are_refused(name: str, tmp_path: Path) -> None:
    columns = [pa.array([png(1)])] + 2 * [pa.array([png(2) if name == "image" else "a"])]
    names = ["image" if name != "image" else "other", name, name]
    pq.write_table(pa.Table.from_arrays(columns, names), tmp_path / "t.parquet")
    with pytest.raises(InputError, match=rf"t\.parquet has 2 called {name}; rename"):
        open_source(str(tmp_path / "t.parquet"))


def test_images_and_ids_that_repeat_may_be_dictionaries(tmp_path: Path) -> None:
    files = pa.array([png(1), png(2), png(1)])
    ids = pa.array(["a", "b", "c"])
    plain = pa.table({"id": ids, "image": files})
    packed = pa.table({"id": ids.dictionary_encode(), "image": files.dictionary_encode()})
    sources = []
    for folder, table in (("plain", plain), ("packed", packed)):
        (tmp_path / folder).mkdir()
        pq.write_table(table, tmp_path / folder / "t.parquet")
        sources.append(open_source(str(tmp_path / folder / "t.parquet")))
    assert sources[0].ids == sources[1].ids
    for k in range(3):
        one, other = (source.load(k, ImagesConfig(size=12)) for source in sources)
        np.testing.assert_array_equal(one, other)
