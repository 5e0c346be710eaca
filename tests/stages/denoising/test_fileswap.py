"""Files in, files out, without Ray: what a notebook runs is what the batch job runs."""

import io
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch
import zarr_images
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from snr_ray import configfile as configs
from snr_ray.config import ImagesConfig
from snr_ray.hashing import hash64
from snr_ray.images.sources import open_source
from snr_ray.learning.checkpoint import load_model
from snr_ray.localfolder import LocalFolder
from snr_ray.metrics import psnr
from snr_ray.network.swap import swap
from snr_ray.network.viewcount import ViewCountMaker
from snr_ray.noise.likelyviews import Likely, likely
from snr_ray.noise.operator import NoiseSpec, noise_operator
from snr_ray.stages.denoising.cleaning import Cleaning, _read_block
from snr_ray.stages.denoising.fileswap import FileSwapper, _joined, lent_codes
from snr_ray.stages.denoising.imagefiles import (
    MANIFEST_SCHEMA,
    Answer,
    ImageFile,
    Row,
    Stack,
    Target,
    read_files,
)


def png(seed: int, *shape: int) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(out, format="png")
    return out.getvalue()


def swapper(model_folder: Path, out: Path, **options: Any) -> Callable[..., list[Row]]:
    trained = load_model(model_folder)
    pool = [level[0].numpy() for level in trained.codes.donors]
    swapper = FileSwapper(trained, pool, **options)
    target = Target(LocalFolder(out), inject="inject" in options, doubtful="write")
    return lambda files: swapper.run(files, ImagesConfig(), target)


def test_every_file_gets_a_row_or_a_failure(model_folder: Path, tmp_path: Path) -> None:
    files = [ImageFile(f"{k}.png", f"{k}.png", f"{k}.png", png(k, 9 + k % 3, 12)) for k in range(7)]
    files.append(ImageFile("bad.png", "bad.png", "bad.png", b""))
    files.append(ImageFile("lost.png", "lost.png", "", b"", error="lost.png cannot be read."))
    rows = swapper(model_folder, tmp_path)(files)
    assert sorted(row["id"] for row in rows) == sorted(file.id for file in files)
    good = [row for row in rows if not row.get("error")]
    assert all(set(row) == set(MANIFEST_SCHEMA.names) for row in good)
    assert {path.name for path in tmp_path.iterdir()} == {row["output"] for row in good}
    assert {row["stage"] for row in rows if row.get("error")} == {"read"}


def test_result_does_not_depend_on_the_company(model_folder: Path, tmp_path: Path) -> None:
    files = [ImageFile(f"{k}.png", f"{k}.png", f"{k}.png", png(k, 20, 16)) for k in range(6)]
    swapper(model_folder, tmp_path / "all", samples=2)(files)
    swapper(model_folder, tmp_path / "one", samples=2)(files[3:4])
    for name in ("3.png", "3.png.std.npy"):
        assert (tmp_path / "all" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


@settings(
    deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    others=st.lists(st.sampled_from("tcz"), unique=True, max_size=2),
    turned=st.booleans(),
    version=st.sampled_from([2, 3]),
    dtype=st.sampled_from(["u1", ">u2", "<i2", "<f4"]),
    chunks=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_slices_of_ome_zarr_are_cleaned_as_they_are_as_tiff(
    model_folder: Path,
    others: list[str],
    turned: bool,
    version: int,
    dtype: str,
    chunks: int,
    seed: int,
) -> None:
    axes = "".join(others) + ("xy" if turned else "yx")
    shape = [2] * len(others) + [15, 12]
    values = np.random.default_rng(seed).integers(0, 256, shape).astype(dtype)
    trained = load_model(model_folder)
    lender = [level[0][:1].numpy() for level in trained.codes.donors]  # ids have no say
    with tempfile.TemporaryDirectory() as place:
        here, out = Path(place) / "in", Path(place) / "out"
        zarr_images.write(here / "a.zarr", values, axes, version=version,
                          chunks=[chunks] * values.ndim)  # fmt: skip
        slices = values.reshape(-1, 15, 12)
        for k, slice_ in enumerate(slices):
            tifffile.imwrite(here / f"{k}.tif", slice_.T if turned else slice_)
        source = open_source(str(here))
        files = read_files(source, range(len(source.ids)))
        target = Target(LocalFolder(out), doubtful="write")
        rows = FileSwapper(trained, lender).run(files, ImagesConfig(white=255), target)
        assert [row.get("error") for row in rows] == [None] * (1 + len(slices))
        row = next(row for row in rows if row["id"] == "a.zarr")
        assert (row["output"], row["frames"], row["channels"]) == ("a.zarr", len(slices), 1)
        assert (row["height"], row["width"]) == ((12, 15) if turned else (15, 12))
        written = zarr_images.pixels(out / "a.zarr")
        assert (written.shape, written.dtype.kind) == (values.shape, values.dtype.kind)
        for k, slice_ in enumerate(written.reshape(-1, 15, 12)):
            tiff = tifffile.imread(out / f"{k}.tif")
            np.testing.assert_array_equal(slice_.T if turned else slice_, tiff)
            assert not np.array_equal(slice_, slices[k])


def test_grey_model_takes_rgb_channel_by_channel(model_folder: Path, tmp_path: Path) -> None:
    grey = png(1, 15, 15)
    stacked = io.BytesIO()
    pixels = np.asarray(Image.open(io.BytesIO(grey)))
    Image.fromarray(np.dstack([pixels] * 3)).save(stacked, format="png")
    files = [ImageFile("x", "g.png", "g.png", grey), ImageFile("x", "c.png", "c.png",
                                                               stacked.getvalue())]  # fmt: skip
    swapper(model_folder, tmp_path)(files)
    with Image.open(tmp_path / "g.png") as g, Image.open(tmp_path / "c.png") as c:
        difference = np.asarray(c).astype(int) - np.asarray(g)[:, :, None]
        assert np.abs(difference).max() <= 1  # rounding


def test_parts_that_failed_lack_what_the_others_have() -> None:
    pixels = np.zeros((3, 1, 4, 4), np.float32)
    bad = Answer(pixels, [-1] * 3, ["no"] * 3)
    good = Answer(pixels[:2], [0, 1], ["", ""], pixels[:2] + 1, np.array([40.0, 50.0]))
    joined = _joined([bad, good])
    assert joined.deviations is not None
    assert joined.explained is not None
    assert joined.deviations.shape == (5, 1, 4, 4)
    np.testing.assert_array_equal(joined.explained, [0, 0, 0, 40, 50])


def test_file_that_cannot_be_written_fails_alone(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where a folder is needed")
    files = [ImageFile("a", "taken/a.png", "a.png", png(0, 9, 9)),
             ImageFile("b", "b.png", "b.png", png(1, 9, 9))]  # fmt: skip
    rows = swapper(model_folder, tmp_path)(files)
    assert {row["id"]: row.get("stage") for row in rows} == {"a": "write", "b": None}


def test_physics_model_takes_the_given_or_the_detected_view_count(
    physics_folder: Path, tmp_path: Path
) -> None:
    files = [ImageFile(f"{k}.png", f"{k}.png", f"{k}.png", png(k, 16, 16)) for k in range(3)]
    files.append(ImageFile("big.png", "big.png", "big.png", png(9, 20, 20)))
    rows = swapper(physics_folder, tmp_path / "told", n_views=6)(files)
    assert [row.get("n_views") for row in rows] == [6, 6, 6, None]
    assert "16x16), but got 20x20" in rows[3]["error"]
    rows = swapper(physics_folder, tmp_path / "detected")(files[:3])
    assert all(row["n_views"] in (0, 12, 6) for row in rows)
    rows = swapper(physics_folder, tmp_path / "injected", inject=6)(files[:3])
    assert [(row["n_views"], row["explained"]) for row in rows] == [(None, None)] * 3


def test_view_count_that_no_training_image_had_can_be_told(
    model_folder: Path, tmp_path: Path
) -> None:
    images = np.random.default_rng(0).random((2, 1, 16, 20), dtype=np.float32)
    files = []
    for k, image in enumerate(images):
        out = io.BytesIO()
        np.save(out, image[0])
        files.append(ImageFile(f"{k}.npy", f"{k}.npy", f"{k}.npy", out.getvalue(), tensor=True))
    trained, means, explains = load_model(model_folder), [], []
    for name, options in (("told", {"n_views": 9}), ("samples", {"n_views": 9, "samples": 2}),
                          ("blind", {})):  # fmt: skip
        rows = swapper(model_folder, tmp_path / name, **options)(files)
        assert {row["n_views"] for row in rows} <= ({9} if "n_views" in options else {0, 12, 6})
        explains.append([row["explained"] for row in rows])
        means.append(np.stack([np.load(tmp_path / name / f"{k}.npy") for k in range(2)]))
    donors = [hash64(f"0/{file.id}") % trained.codes.n_donors for file in files]
    noise = trained.codes.pick(0, np.array(donors))
    expected = swap(trained.model, images, noise, geometry=NoiseSpec(9))
    np.testing.assert_allclose(means[0][:, None], expected.clip(0, 1), atol=1e-5)
    again = noise_operator(NoiseSpec(9), 16, 20)(expected)
    np.testing.assert_allclose(explains[0], psnr(again, images, clip=False), atol=1e-3)
    assert np.abs(np.subtract(explains[2], explains[0])).min() > 1e-3
    assert all(np.abs(mean - means[0]).max() > 1e-4 for mean in means[1:])


def test_a_model_of_a_range_injects_a_view_count_at_every_size(
    range_folder: Path, tmp_path: Path
) -> None:
    trained, files, clean = load_model(range_folder), [], {}
    for name, shape in (("a", (16, 16)), ("b", (24, 20)), ("c", (12, 31))):
        clean[name] = np.random.default_rng(0).random(shape, dtype=np.float32)
        out = io.BytesIO()
        np.save(out, clean[name])
        files.append(ImageFile(name, f"{name}.npy", f"{name}.npy", out.getvalue()))
    for n_views in (1, 9, 48, 70):  # the range is 0.2 to 0.9 per pixel
        pool, out_ = lent_codes(trained, "mean", n_views), tmp_path / str(n_views)
        target = Target(LocalFolder(out_), inject=True, doubtful="write")
        swapper = FileSwapper(trained, pool, inject=n_views)
        rows = {row["id"]: row for row in swapper.run(files, ImagesConfig(white=1.0), target)}
        for name, image in clean.items():
            if n_views > 4 * max(image.shape):
                assert "at most 4 x the image size = 64" in rows[name]["error"]
                continue
            x = torch.from_numpy(image)[None, None]
            wanted = torch.tensor([n_views])
            noisy = trained.model(x, noise=trained.codes.mean(0), wanted=wanted).image
            np.testing.assert_allclose(np.load(out_ / f"{name}.npy"), noisy[0, 0], atol=1e-4)


def test_a_model_of_a_range_finds_the_view_count_of_each_image(
    range_folder: Path, tmp_path: Path
) -> None:
    # Photographs of several counts in one stack, cleaned as if each had been told.
    config = configs.load([], ["images.size=48"]).images
    source = open_source("photos")
    clean = np.stack([source.load(row, config) for row in (3, 900, 2000)])
    counts, files = (13, 20, 30), []
    noisy = [noise_operator(NoiseSpec(n), 48, 48)(x) for n, x in zip(counts, clean, strict=True)]
    for k, image in enumerate(noisy):
        out = io.BytesIO()
        np.save(out, image[0])
        files.append(ImageFile(f"{k}", f"{k}.npy", f"{k}.npy", out.getvalue()))
    trained = load_model(range_folder)
    maker = trained.model.noise_maker
    assert isinstance(maker, ViewCountMaker)
    maker.reading.weight[0], maker.reading.bias[0] = 0.0, 20.0  # all are noisy
    pool = [level.mean(0, keepdim=True).numpy() for level in trained.donors(0)]
    for samples in (0, 2):
        out_ = tmp_path / str(samples)
        target = Target(LocalFolder(out_), inject=False, doubtful="write")
        swapper = FileSwapper(trained, pool, samples=samples)
        rows = swapper.run(files, ImagesConfig(white=1.0), target)
        assert [row["n_views"] for row in sorted(rows, key=lambda row: row["id"])] == list(counts)
        if samples:
            continue
        for k, n_views in enumerate(counts):
            code = [torch.from_numpy(level) for level in pool]
            told = swap(trained.model, noisy[k][None], code, geometry=NoiseSpec(n_views))
            np.testing.assert_allclose(np.load(out_ / f"{k}.npy"), told[0, 0].clip(0, 1), atol=1e-3)


def test_spectra_that_readers_have_seen_are_not_looked_at_again(tmp_path: Path) -> None:
    photos, config = open_source("photos"), ImagesConfig(size=48, channels=1)
    clean = np.stack([photos.load(row, config) for row in (3, 900, 2000)])
    for k, image in enumerate(noise_operator(NoiseSpec(20), 48, 48)(clean)):
        np.save(tmp_path / f"{k}.npy", image[0])
    trained, source = load_model("any"), open_source(str(tmp_path))
    job = Cleaning("key", source, ImagesConfig(white=1.0), Target(LocalFolder(tmp_path)), 0)
    ((_, [unseen]), (_, [seen]), (_, [limited])) = (
        _read_block(replace(job, finds_over=over), np.arange(3)) for over in (None, 180.0, 120.0)
    )
    assert unseen.likely is None
    assert seen.likely == likely(seen.pixels)
    assert limited.likely == likely(seen.pixels, 120.0) != seen.likely
    swapper = FileSwapper(trained, [level.numpy() for level in trained.codes.mean(0)])
    first, second = (swapper.answer(stack) for stack in (unseen, seen))
    np.testing.assert_array_equal(first.images, second.images)
    # What they say is taken, in parts of a stack, too.
    said = replace(seen, likely=[Likely(n_views, True, []) for n_views in (5, 6, 7)])
    parts = [said.part(slice(k, k + 1)) for k in range(3)]
    assert [int(swapper.answer(part).n_views[0]) for part in parts] == [5, 6, 7]


def test_injected_noise_leaves_the_range_in_float_files_alone(
    model_folder: Path, tmp_path: Path
) -> None:
    out = io.BytesIO()
    np.save(out, np.full((16, 16), 0.5, np.float32))
    files = [ImageFile("a", "a.npy", "a.npy", out.getvalue())]

    class Wild(FileSwapper):
        def answer(self, stack: Stack) -> Answer:
            answer = super().answer(stack)
            return replace(answer, images=answer.images * 0 - 2)

    trained = load_model(model_folder)
    pool = [level[1].numpy() for level in trained.codes.donors]
    for inject, lowest in ((6, -2.0), (None, 0.0)):
        target = Target(LocalFolder(tmp_path), inject=inject is not None, doubtful="write")
        Wild(trained, pool, inject=inject).run(files, ImagesConfig(white=1.0), target)
        assert np.load(tmp_path / "a.npy").min() == lowest
