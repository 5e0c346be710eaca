"""Names of results, what is written where, and what is refused; no model is needed for any."""

import errno
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
import zarr_images
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from snr_ray.config import ImagesConfig
from snr_ray.errors import InputError, NoRoom
from snr_ray.images.collection import Source
from snr_ray.images.formats.codec import open_file
from snr_ray.images.formats.headers import n_values
from snr_ray.images.formats.zarrfolder import pack
from snr_ray.images.sources import open_source
from snr_ray.localfolder import LocalFolder
from snr_ray.stages.denoising.imagefiles import (
    HELD_PIXELS,
    OWN_NAMES,
    PASS_PIXELS,
    Answer,
    Doubtful,
    ImageFile,
    Target,
    check_output_names,
    open_files,
    output_name,
    read_files,
    write_files,
)


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="png")
    return out.getvalue()


def file(name: str = "a.png", shape: tuple[int, ...] = (9, 9), output: str = "") -> ImageFile:
    return ImageFile(name, output or name, name, png(np.full(shape, 100, np.uint8)))


@settings(deadline=None)
@given(st.lists(st.sampled_from([*OWN_NAMES, "Report.HTML", "parts", "a", ".x"]), min_size=1))
def test_no_image_is_written_where_the_job_writes(folders: list[str]) -> None:
    source = Source("these", ["a"], lambda index: b"")
    written = output_name(source, "/".join([*folders, "x.png"]))
    assert written.split("/")[0].casefold() not in OWN_NAMES
    assert written.endswith("/x.png")
    bare = output_name(source, folders[0])
    assert bare.casefold() not in OWN_NAMES


@pytest.mark.parametrize("name", ["../x.png", "a/../../x.png", "/etc/x.png", ".."])
def test_names_outside_the_folder_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="must stay inside the output folder"):
        output_name(Source("these", [name], lambda index: b""), name)


@pytest.mark.parametrize(
    ("ids", "samples", "clash"),
    [
        (["a/./x.png", "a/x.png"], False, "a/x.png"),
        (["report.html/x.png", "report.html_/x.png"], False, "report.html_/x.png"),
        (["x.png", "x.png.std.npy"], True, "x.png.std.npy"),
        (["x.png", "x.png.std.npy", "../x.png"], False, ""),
        (["a.dcm", "a.tif", "b", "b.png"], True, ""),
        (["t/a", "t/a.tif"], False, "t/a.tif"),
        (["t/a", "t/a.png"], False, "t/a.png"),
        (["t/a", "t/b"], True, ""),
    ],
)
def test_two_images_never_share_an_output(ids: list[str], samples: bool, clash: str) -> None:
    rows = np.zeros(1, np.int64) if ids[0] == "t/a" else None
    source = Source("these", ids, lambda index: b"", chunks=rows)
    if not clash:
        check_output_names(source, samples=samples)
        return
    with pytest.raises(InputError, match=f"2 of these would be written to '{clash}'"):
        check_output_names(source, samples=samples)


def test_what_is_held_at_once_is_bounded() -> None:
    side = 700
    files = [file(f"{k}.png", (side, side)) for k in range(20)]
    files.append(ImageFile("bad.png", "bad.png", "bad.png", b""))
    ids: list[str] = []
    for opened, stacks, failed in open_files(files, ImagesConfig()):
        assert sum(stack.pixels.size for stack in stacks) <= HELD_PIXELS
        assert all(stack.pixels.size <= PASS_PIXELS for stack in stacks)
        owners = sorted(owner for s in stacks for owner in s.owners)
        assert owners == [(k, 0) for k in range(len(opened))]
        ids += [one.file.id for one in opened] + [row["id"] for row in failed]
    assert ids == [one.id for one in files]


def test_tensors_of_integers_are_scaled_as_files_are() -> None:
    for depth, white in ((np.uint8, None), (np.uint16, 65535.0), (np.float32, None)):
        out = io.BytesIO()
        np.save(out, np.full((9, 9), np.iinfo(depth).max if depth != np.float32 else 1, depth))
        one = ImageFile("a", "a.tif", "a.npy", out.getvalue(), tensor=True)
        ((_, (stack,), failed),) = open_files([one], ImagesConfig(white=white))
        assert not failed
        np.testing.assert_array_equal(stack.pixels, 1)


def test_rows_without_file_names_are_written_as_what_they_are(tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    from images.formats.test_dicom import dataset, saved

    ramp = np.linspace(0, 1, 81, dtype=np.float32).reshape(9, 9)
    tiff, npy, jpeg = io.BytesIO(), io.BytesIO(), io.BytesIO()
    tifffile.imwrite(tiff, np.stack([ramp, ramp]), photometric="minisblack")
    np.save(npy, ramp)
    Image.fromarray((255 * ramp).astype(np.uint8)).save(jpeg, format="jpeg")
    bits = [tiff.getvalue(), npy.getvalue(), saved(dataset()), png(ramp > 0.5), jpeg.getvalue()]
    pq.write_table(pa.table({"image": bits}), tmp_path / "t.parquet")
    source = open_source(str(tmp_path / "t.parquet"))
    images = ImagesConfig(white=1.0, window=(-1000.0, 200.0))
    for doubted in (False, True):
        inputs = list(read_files(source, range(len(bits))))
        out = LocalFolder(tmp_path / str(doubted))
        found = answered(out, inputs, "copy", doubted, images)
        assert [row["output"] for row in found] == [
            "t/0-000000.tif", "t/0-000001.npy", "t/0-000002.dcm", "t/0-000003.png",
            "t/0-000004.png"]  # fmt: skip
        for row, kind in zip(found, ("tiff", "npy", "dicom", "png", "png"), strict=True):
            written = open_file(
                out.read(row["output"]), row["output"], white=1, window=(-1000, 200)
            )
            assert written.kind == kind
            assert len(written.frames) == row["frames"]
        copied = [out.read(row["output"]) == old for row, old in zip(found, bits, strict=True)]
        assert copied == [doubted, doubted, False, doubted, False]


def answered(
    out: LocalFolder,
    inputs: list[ImageFile],
    doubtful: Doubtful,
    doubted: bool | list[bool],
    images: ImagesConfig | None = None,
) -> list[dict]:
    (opened, stacks, _) = next(iter(open_files(inputs, images or ImagesConfig(white=1.0))))
    answers = [
        Answer(
            np.zeros_like(stack.pixels),
            [0] * len(stack.ids),
            [""] * len(stack.ids),
            explained=np.full(len(stack.ids), 3.0),
            doubtful=np.broadcast_to(doubted, len(stack.ids)),
        )
        for stack in stacks
    ]
    return write_files(opened, stacks, answers, Target(out, doubtful=doubtful))


def test_a_doubtful_result_is_not_written_as_if_it_were_clean(tmp_path: Path) -> None:
    tensor = io.BytesIO()
    np.save(tensor, np.full((9, 9), 1.5, np.float32))
    inputs = [file("a.png"), ImageFile("b", "b.tif", "b.npy", tensor.getvalue(), tensor=True)]
    for doubtful, first, second in (("copy", 100, 1.5), ("write", 0, 0)):
        out = LocalFolder(tmp_path / doubtful)
        rows = answered(out, inputs, doubtful, doubted=True)
        assert [row["status"] for row in rows] == ["doubtful"] * 2
        assert np.unique(np.asarray(Image.open(out.path / "a.png"))).tolist() == [first]
        assert np.unique(tifffile.imread(out.path / "b.tif")).tolist() == [second]
    copied = (tmp_path / "copy" / "a.png").read_bytes()
    assert copied == inputs[0].data
    rows = answered(LocalFolder(tmp_path / "fail"), inputs, "fail", doubted=True)
    assert [(row["stage"], "3 dB" in row["error"]) for row in rows] == [("doubtful", True)] * 2
    assert not (tmp_path / "fail").exists()
    rows = answered(LocalFolder(tmp_path / "good"), inputs, "fail", doubted=False)
    assert [row["status"] for row in rows] == ["done"] * 2


def test_only_the_doubtful_pages_of_a_stack_stay_as_they_were(tmp_path: Path) -> None:
    pages = np.full((3, 9, 9), 100, np.uint8)
    out, stack = LocalFolder(tmp_path / "out"), io.BytesIO()
    tifffile.imwrite(stack, pages, photometric="minisblack")
    inputs = [ImageFile("a.tif", "a.tif", "a.tif", stack.getvalue())]
    rows = answered(out, inputs, "copy", doubted=[False, True, False])
    assert rows[0]["status"] == "doubtful"
    assert tifffile.imread(out.path / "a.tif")[:, 0, 0].tolist() == [0, 100, 0]


@pytest.mark.parametrize(("name", "sides"), [("a.tif", (9, 8)), ("a" * 246 + ".tif", (9, 9))])
def test_without_its_deviations_no_result_is_left_behind(
    name: str, sides: tuple[int, int], tmp_path: Path
) -> None:
    out = io.BytesIO()
    with tifffile.TiffWriter(out) as stack:
        for side in sides:
            stack.write(np.full((side, 9), 100, np.uint8), photometric="minisblack", metadata=None)
    one = ImageFile(name, name, name, out.getvalue())
    ((opened, stacks, _),) = open_files([one], ImagesConfig())
    answers = [Answer(s.pixels, [0] * len(s.ids), [""] * len(s.ids), s.pixels) for s in stacks]
    (row,) = write_files(opened, stacks, answers, Target(LocalFolder(tmp_path)))
    assert row["stage"] == "write"
    assert ("differ in size or colours; split it" in row["error"]) == (sides[0] != sides[1])
    assert not list(tmp_path.iterdir())


def test_a_doubtful_slice_stays_in_the_series_of_the_others(tmp_path: Path) -> None:
    pydicom = pytest.importorskip("pydicom")
    from images.formats.test_dicom import dataset, saved

    out, series = LocalFolder(tmp_path), []
    for doubted in (False, True):
        inputs = [ImageFile("a.dcm", "a.dcm", "a.dcm", saved(dataset()))]
        answered(out, inputs, "copy", doubted=doubted, images=ImagesConfig(window=(-100.0, 50.0)))
        series.append(pydicom.dcmread(out.path / "a.dcm"))
    assert series[0].SeriesInstanceUID == series[1].SeriesInstanceUID != dataset().SeriesInstanceUID
    np.testing.assert_array_equal(series[1].pixel_array, dataset().pixel_array)
    assert series[1].SeriesDescription.endswith("noise kept")


def test_of_a_doubtful_folder_the_largest_level_is_copied(tmp_path: Path) -> None:
    values = np.full((2, 9, 9), 100, np.uint8)
    folder = zarr_images.write(tmp_path / "in" / "a.zarr", values, levels=3)
    inputs = [ImageFile("a.zarr", "a.zarr", "a.zarr", pack(LocalFolder(folder), "a.zarr"))]
    for doubtful, value in (("copy", 100), ("write", 0)):
        rows = answered(LocalFolder(tmp_path / doubtful), inputs, doubtful, doubted=True)
        assert (rows[0]["status"], rows[0]["frames"]) == ("doubtful", 2)
        result = tmp_path / doubtful / "a.zarr"
        assert np.unique(zarr_images.pixels(result)).tolist() == [value]
        datasets = zarr_images.described(result)["multiscales"][0]["datasets"]
        assert [level["path"] for level in datasets] == ["0"]


def test_a_full_disk_is_no_failure_of_an_image(tmp_path: Path) -> None:
    class Full(LocalFolder):
        def write(self, name: str, data: bytes | str, *, durable: bool = False) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(NoRoom, match=r"No space left on device.*the same command continues"):
        answered(Full(tmp_path), [file()], "copy", doubted=False)


def test_long_names_are_written(tmp_path: Path) -> None:
    name = "n" * 250 + ".png"
    rows = answered(LocalFolder(tmp_path), [file(name)], "copy", doubted=False)
    assert rows[0].get("error") is None
    assert (tmp_path / name).is_file()


def test_headers_say_how_large_images_are() -> None:
    pixels = np.zeros((7, 5, 3), np.uint8)
    for suffix in ("png", "jpg", "bmp", "webp", "tif"):
        out = io.BytesIO()
        kind = {"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix)
        Image.fromarray(pixels).save(out, format=kind)
        assert n_values(out.getvalue(), f"x.{suffix}") == 105
    out = io.BytesIO()
    np.save(out, pixels)
    assert n_values(out.getvalue(), "x.npy") == 105
    assert n_values(b"nonsense", "x.png") is None
    assert n_values(b"", "x.tif") is None
