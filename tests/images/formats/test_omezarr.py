"""OME-Zarr images: slice by slice, back with axes, units, transformations, chunks and numbers."""

import builtins
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr_images import describe, described, multiscales, pixels, small, write

from snr_ray.config import ImagesConfig
from snr_ray.errors import InputError
from snr_ray.images.formats import memory
from snr_ray.images.formats.codec import encode, open_file
from snr_ray.images.formats.headers import n_values
from snr_ray.images.formats.zarrfolder import write_image
from snr_ray.images.sources import open_source
from snr_ray.localfolder import LocalFolder

WINDOW = (-1000.0, 400.0)
WHITE = 4095.0
DTYPES = ("u1", "<u2", ">u2", "<i2", ">i4", "<u4", "<f2", "<f4", "<f8", "<i8")


@st.composite
def images(draw: st.DrawFn) -> dict[str, Any]:
    """Axes in any order, a shape, chunks that need not divide it, shards, numbers."""
    others = draw(st.lists(st.sampled_from("tcz"), unique=True, max_size=3))
    axes = draw(st.permutations([*others, "y", "x"]))
    shape = [draw(st.integers(1, 3 if a in others else 9)) for a in axes]
    chunks = [draw(st.integers(1, 1 + n)) for n in shape]
    version = draw(st.sampled_from([2, 3]))
    made: dict[str, Any] = {"axes": "".join(axes), "version": version, "chunks": chunks}
    if version == 3 and draw(st.booleans()):
        made["shards"] = [2 * c for c in chunks]
    if draw(st.booleans()):
        made["compressors"] = None
    made["path"] = draw(st.sampled_from(["0", "s0", "scale0/image"]))
    made["levels"] = draw(st.integers(1, 3))
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    seed = draw(st.integers(0, 2**32 - 1))
    values = np.random.default_rng(seed).integers(0, 256 if dtype == "u1" else 4096, shape)
    return made | {"values": values.astype(dtype)}


def slices_of(values: np.ndarray, axes: str) -> list[np.ndarray]:
    """What lies along y and x, in the order of the array, found the slow way."""
    y, x = axes.index("y"), axes.index("x")
    others = [n for k, n in enumerate(values.shape) if k not in (y, x)]
    found = []
    for place in np.ndindex(*others):
        index: list[Any] = list(place)
        for k in sorted((y, x)):
            index.insert(k, slice(None))
        part = values[tuple(index)]
        found.append(part if y < x else part.T)
    return found


def halved(frames: list[np.ndarray]) -> list[np.ndarray]:
    return [frame * np.float32(0.5) + np.float32(0.25) for frame in frames]


@settings(deadline=None, max_examples=60)
@given(images())
def test_a_result_has_all_of_its_input_but_values_which_are_those_of_slices_as_tiff(
    made: dict[str, Any],
) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = write(Path(place) / "in" / "a.ome.zarr", **made)
        source = open_source(str(folder))
        name, data = source.file(0)
        opened = open_file(data, name, white=WHITE)
        slices = slices_of(made["values"], made["axes"])
        assert n_values(data, name) == made["values"].size
        frames = [frame.pixels for frame in opened.frames]
        expected = []
        for slice_, frame in zip(slices, frames, strict=True):
            native = slice_.astype(slice_.dtype.newbyteorder("="))
            span = (0.0, 255.0 if native.dtype == np.uint8 else WHITE)
            np.testing.assert_array_equal(frame[0], native.astype(np.float32) / span[1])
            tiff = open_file(
                encode(frame, "a.tif", depth=native.dtype, span=span), "a.tif", white=WHITE
            )
            written = open_file(
                tiff.encode(halved([f.pixels for f in tiff.frames]), "a.tif"), "a.tif", white=WHITE
            )
            expected.append(written.frames[0].pixels[0] * span[1])
        out = Path(place) / "out"
        result = opened.encode(halved(frames), name)
        assert result == opened.encode(halved(frames), name)
        write_image(LocalFolder(out), name, result)
        after, before = out / "a.ome.zarr", folder
        path = made["path"]
        for got, want in zip(slices_of(pixels(after, path), made["axes"]), expected, strict=True):
            np.testing.assert_allclose(got.astype(np.float64), want, rtol=1e-6, atol=1e-6)
        for file in ("zarr.json", ".zarray"):  # shape, chunks, shards, codecs and kind of numbers
            here, there = before / path / file, after / path / file
            assert here.exists() == there.exists()
            assert not here.exists() or here.read_bytes() == there.read_bytes()
        old, new = described(before), described(after)
        old["multiscales"][0]["datasets"] = old["multiscales"][0]["datasets"][:1]
        del old["multiscales"][0]["type"]
        assert new == old
        tops = {entry.name for entry in after.iterdir() if entry.is_dir()}
        assert tops == {path.split("/")[0]}


@pytest.mark.parametrize("version", [2, 3])
def test_hounsfield_units_are_cut_to_their_window(version: int, tmp_path: Path) -> None:
    values = np.linspace(-1024, 900, 4 * 9 * 12).round().reshape(4, 9, 12).astype(np.int16)
    folder = write(tmp_path / "ct.zarr", values, version=version, chunks=(1, 9, 12))
    source = open_source(str(tmp_path))
    frames = source.pictures(0, ImagesConfig(window=WINDOW))
    cut = np.clip(values, *WINDOW)
    np.testing.assert_allclose(frames[2].pixels[0], (cut[2] + 1000) / 1400, atol=1e-6)
    name, data = source.file(0)
    opened = open_file(data, name, window=WINDOW)
    write_image(LocalFolder(tmp_path / "out"), name, opened.encode(
        [frame.pixels for frame in opened.frames], name))  # fmt: skip
    above = np.maximum(values, WINDOW[0])  # what is above the window is still there
    np.testing.assert_array_equal(pixels(tmp_path / "out" / "ct.zarr"), above)
    with pytest.raises(InputError, match=r"int16 pixels have no agreed white, and ct\.zarr"):
        source.read(0)
    with pytest.raises(InputError, match=r"must hold one image, but ct\.zarr holds 4; split it"):
        source.read(0, ImagesConfig(window=WINDOW))
    assert zarr.open_group(str(folder), mode="r").metadata.zarr_format == version


def _axes(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        own = multiscales("zyx", ["0"])
        own["multiscales"][0]["axes"] = [{"name": name} for name in names]
        describe(folder, own)

    return change


def _own(own: Any) -> Callable[[Path], None]:
    return lambda folder: describe(folder, own)


def _first(**changes: Any) -> Callable[[Path], None]:
    return _own({"multiscales": [multiscales("zyx", ["0"])["multiscales"][0] | changes]})


def _array(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "0" / ".zarray"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


BAD: list[tuple[Callable[[Path], Any], str]] = [
    (_own({}), r"must say what it is by `multiscales`.* but a\.zarr has none; write it again"),
    (_own([]), r"must say what it is by `multiscales`"),
    (_own({"multiscales": []}), r"must say what it is by `multiscales`"),
    (_own({"multiscales": [3]}), r"must list its `datasets`, but those of a\.zarr do not"),
    (_first(datasets=[]), r"must list its `datasets`, but those of a\.zarr do not"),
    (_first(datasets=[{"path": "../b"}]), r"must name folders in it, but a\.zarr names '\.\./b'"),
    (_first(datasets=[{"path": "/0"}]), r"must name folders in it, but a\.zarr names '/0'"),
    (_first(datasets=[{}]), r"must name folders in it, but a\.zarr names None"),
    (_first(datasets=[{"path": "9"}]), r"must hold the array .* but a\.zarr has none in '9'; copy"),
    (_first(axes=None), r"must name its axes, as NGFF 0\.4 and 0\.5 do, but a\.zarr does not"),
    (_first(axes=["z", "y", "x"]), r"must name its axes"),
    (_axes("z", "r", "x"), r"an axis y and an axis x, but those of a\.zarr are z, r, x; name them"),
    (_axes("y", "y", "x"), r"an axis y and an axis x, but those of a\.zarr are y, y, x"),
    (_axes(), r"an axis y and an axis x, but those of a\.zarr are none"),
    (_axes("y", "x"), r"has axes y, x and the shape \[2, 6, 7\]; write it again"),
    (_own({"plate": {}}), r"is a plate; give the images in it, as a\.zarr/\*/\*/\*\."),
    (_own({"well": {}}), r"is a well of a plate; give the images in it, as a\.zarr/\*\."),
    (_own({"bioformats2raw.layout": 3}), r"is a collection of them .* as a\.zarr/\*\."),
    (_own({"labels": ["cells"]}), r"but a\.zarr holds labels; give the image that they are of"),
    (_own(multiscales("zyx", ["0"]) | {"image-label": {}}), r"but a\.zarr holds labels"),
    (_array(compressor={"id": "nope"}), r"a codec that zarr does not know \(.*nope"),
    (_array(filters=[{"id": "nope"}]), r"a codec that zarr does not know \(.*nope"),
    (_array(shape=[2, 6000, 7000]), r"which its [\d,]+ bytes cannot hold; copy the image again"),
    (_array(chunks=[9, 99999, 99999]), r"which its [\d,]+ bytes cannot hold; copy the image again"),
    (_array(shape=[0, 6, 7]), r"must have pixels along each of its axes, .* \[0, 6, 7\]"),
    (_array(dtype="nonsense"), r"a\.zarr cannot be read as an image"),
    (lambda f: (f / "0" / "1.0.0").write_bytes(b"cut"), r"a\.zarr cannot be read as an image"),
    (lambda f: (f / "0" / "1.0.0").write_bytes(b""), r"a\.zarr cannot be read as an image"),
    (lambda f: (f / "0" / ".zarray").write_text("{"), r"a\.zarr cannot be read as an image"),
    (lambda f: (f / "0" / ".zarray").unlink(), r"must hold the array .* has none in '0'"),
    (lambda f: (f / ".zattrs").write_text("{"), r"has metadata that is not JSON \(.*write the im"),
    (lambda f: (f / ".zattrs").write_bytes(b"\xff"), r"has metadata that is not JSON"),
    (lambda f: (f / ".zattrs").unlink(), r"must say what it is by `multiscales`"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "said"), BAD, ids=[str(k) for k in range(len(BAD))])
def test_what_cannot_be_read_has_its_sentence(
    change: Callable[[Path], Any], said: str, tmp_path: Path
) -> None:
    change(small(tmp_path / "a.zarr"))
    source = open_source(str(tmp_path))
    assert source.ids == ["a.zarr"]
    with pytest.raises(InputError, match=said):
        source.pictures(0, ImagesConfig())


def test_one_that_no_node_has_memory_for_is_refused_before_its_chunks_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = small(tmp_path / "a.zarr")
    chunks, real = [], LocalFolder.read

    def read(self: LocalFolder, name: str) -> bytes:
        chunks.extend([name] if name.endswith(".0") else [])
        return real(self, name)

    monkeypatch.setattr(LocalFolder, "read", read)
    _array(shape=[400, 6000, 7000])(folder)
    monkeypatch.setattr(memory, "node_memory", lambda: 8 * 2**30)
    with pytest.raises(InputError, match=r"half of a node's 8 GB .* a\.zarr holds 16,800 million"):
        open_source(str(folder)).pictures(0, ImagesConfig())
    assert not chunks


def test_one_of_a_single_slice_is_an_image_to_train_on(tmp_path: Path) -> None:
    values = np.arange(80 * 90).reshape(1, 1, 80, 90) % 251
    write(tmp_path / "a.zarr", values.astype(np.uint8), "tcyx", chunks=(1, 1, 32, 32))
    image = open_source(str(tmp_path)).load(0, ImagesConfig(size=64, fit="crop"))
    np.testing.assert_allclose(image[0], values[0, 0, 8:72, 13:77] / 255, atol=1e-6)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("dtype", [bool, np.complex64])
def test_only_numbers_that_are_grey_values_are_read(
    version: int, dtype: type, tmp_path: Path
) -> None:
    write(tmp_path / "a.zarr", np.zeros((4, 5), dtype), "yx", version=version, levels=1)
    with pytest.raises(InputError, match=r"must hold numbers, but a\.zarr holds (bool|complex64)"):
        open_source(str(tmp_path)).read(0)


def test_one_of_zarr_3_that_is_damaged_has_its_sentence(tmp_path: Path) -> None:
    folder = small(tmp_path / "a.zarr", 3)
    array = folder / "0" / "zarr.json"
    good = array.read_text()
    array.write_text(good.replace('"zstd"', '"nope"'))
    source = open_source(str(tmp_path))
    with pytest.raises(InputError, match=r"a codec that zarr does not know \(.*nope"):
        source.pictures(0, ImagesConfig())
    array.write_text(good)
    (folder / "0" / "c" / "1" / "0" / "0").write_bytes(b"cut")
    with pytest.raises(InputError, match=r"a\.zarr cannot be read as an image"):
        source.pictures(0, ImagesConfig())
    describe(folder, {"plate": {}}, 3)
    with pytest.raises(InputError, match="is a plate"):
        source.pictures(0, ImagesConfig())


def test_a_file_that_is_named_as_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.zarr").write_bytes(b"PK\x03\x04 an archive of another kind")
    with pytest.raises(InputError, match=r"must be a folder, but a\.zarr is a file; unpack it"):
        open_source(str(tmp_path)).read(0)


def test_without_zarr_a_sentence_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(tmp_path / "a.zarr")
    source, real = open_source(str(tmp_path)), builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "zarr":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"needs zarr, and a\.zarr is one; pip install 'snr-ray\["):
        source.read(0)
