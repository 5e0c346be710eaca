"""The denoise stage: one output per input, names, formats, donors, failures, resume."""

import contextlib
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import psutil
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
import tifffile
from moto.s3.responses import S3Response
from PIL import Image

from snr_ray import configfile as configs
from snr_ray.address import open_folder
from snr_ray.config import Config, ImagesConfig
from snr_ray.errors import InputError, Lost
from snr_ray.images.formats.codec import decode
from snr_ray.images.sources import open_source
from snr_ray.learning.checkpoint import load_model
from snr_ray.lock import locked
from snr_ray.metrics import psnr
from snr_ray.network.swap import swap
from snr_ray.noise.operator import NoiseSpec, noise_operator
from snr_ray.stages.denoising.denoise import denoise
from snr_ray.stages.simulation.simulate import simulate

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_2_cpus")]
CONFIG = Config()
# Models of random weights explain nothing, and what they write is what is looked at here.
cleaning = functools.partial(denoise, CONFIG, doubtful="write")


def outputs(out: Path) -> set[str]:
    known = {"job.json", "failures.parquet", "report.html"}
    files = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} - known
    return {name for name in files if not name.startswith("manifest.parquet/")}


def test_one_output_per_input_under_its_name(
    model_folder: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    outcome = cleaning(model=str(model_folder), images=str(image_folder), out=out)
    assert "24 of 24 images are not 16x16" in capsys.readouterr().err
    names = {str(p.relative_to(image_folder)) for p in image_folder.rglob("*.png")}
    assert outputs(out) == names
    assert (outcome.images, outcome.failed) == (24, 0)
    rows = pq.read_table(out / "manifest.parquet").to_pylist()
    assert sorted(row["id"] for row in rows) == sorted(names)
    # What was written is the swap with the mean clean code, rounded to 8 bits.
    trained = load_model(model_folder)
    for name in list(names)[:3]:
        image = decode((image_folder / name).read_bytes(), name).pixels[None]
        expected = np.clip(swap(trained.model, image, trained.codes.mean(0)), 0, 1)[0, 0]
        written = np.asarray(Image.open(out / name)) / 255
        np.testing.assert_allclose(written, expected, atol=0.51 / 255)
    assert "24 images" in (out / "report.html").read_text()


def test_formats_depths_and_channels_are_kept(model_folder: Path, tmp_path: Path) -> None:
    rng, images = np.random.default_rng(0), tmp_path / "images"
    images.mkdir()
    Image.fromarray(rng.integers(0, 256, (20, 15, 3), dtype=np.uint8)).save(images / "rgb.jpg")
    Image.fromarray(rng.integers(0, 4096, (20, 15), dtype=np.uint16)).save(images / "deep.png")
    tifffile.imwrite(images / "ct.tif", rng.normal(2000, 3000, (17, 9)).astype(np.float32))
    np.save(images / "array.npy", rng.integers(0, 256, (8, 8), dtype=np.uint8))
    out = tmp_path / "out"
    config = configs.load([], ["images.white=4095"])
    assert (
        denoise(
            config, doubtful="write", model=str(model_folder), images=str(images), out=out
        ).failed
        == 0
    )
    assert Image.open(out / "rgb.jpg").size == (15, 20)
    assert Image.open(out / "rgb.jpg").mode == "RGB"
    assert np.asarray(Image.open(out / "deep.png")).dtype == np.uint16
    assert tifffile.imread(out / "ct.tif").dtype == np.float32
    assert tifffile.imread(out / "ct.tif").shape == (17, 9)
    assert np.load(out / "array.npy").shape == (8, 8)


def test_bad_images_fail_alone(model_folder: Path, image_folder: Path, tmp_path: Path) -> None:
    good = (image_folder / "a" / "00.png").read_bytes()
    (image_folder / "a" / "cut.png").write_bytes(good[:40])
    (image_folder / "b" / "empty.jpg").write_bytes(b"")
    alpha = np.zeros((9, 9, 4), np.uint8)
    Image.fromarray(alpha).save(image_folder / "alpha.png")
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(image_folder / "deep.png")
    tifffile.imwrite(image_folder / "float.tif", np.zeros((9, 9), np.float32))
    out = tmp_path / "out"
    outcome = cleaning(model=str(model_folder), images=str(image_folder), out=out)
    assert (outcome.images, outcome.failed) == (24, 5)
    failures = pq.read_table(out / "failures.parquet").to_pylist()
    assert {f["id"] for f in failures} == {
        "a/cut.png", "b/empty.jpg", "alpha.png", "deep.png", "float.tif"}  # fmt: skip
    assert all(f["reason"].endswith(".") for f in failures)
    # Repaired images are tried again by the same command; the others are not touched.
    stamp = (out / "a" / "00.png").stat().st_mtime_ns
    (image_folder / "a" / "cut.png").write_bytes(good)
    again = cleaning(model=str(model_folder), images=str(image_folder), out=out)
    assert (again.images, again.failed) == (25, 4)
    assert (out / "a" / "00.png").stat().st_mtime_ns == stamp


def test_random_donors_and_samples_do_not_depend_on_the_other_images(
    model_folder: Path, image_folder: Path, tmp_path: Path
) -> None:
    options = {"model": str(model_folder), "donor": "random", "samples": 3}
    cleaning(images=str(image_folder), out=tmp_path / "all", **options)
    cleaning(images=str(image_folder / "a"), out=tmp_path / "some", **options)
    rows = pq.read_table(tmp_path / "all" / "manifest.parquet").to_pylist()
    assert len({row["donor"] for row in rows}) > 4
    assert all(row["std"] > 0 for row in rows)
    deviation = np.load(tmp_path / "all" / "a" / "00.png.std.npy")
    assert deviation.shape == (20, 18)
    # Ids differ by their folder, so equal ids are compared through one more job.
    cleaning(images=str(image_folder / "a" / "0*.png"), out=tmp_path / "few", **options)
    for name in ("00.png", "02.png.std.npy"):
        assert (tmp_path / "few" / name).read_bytes() == (tmp_path / "some" / name).read_bytes()


def test_donor_images_and_injection_change_the_result(
    model_folder: Path, image_folder: Path, tmp_path: Path
) -> None:
    results = {}
    for name, options in {
        "mean": {}, "path": {"donor": str(image_folder / "b" / "01.png")}, "inject": {"inject": 6},
    }.items():  # fmt: skip
        out = tmp_path / name
        cleaning(model=str(model_folder), images=str(image_folder / "a"), out=out, **options)
        results[name] = tuple((out / f).read_bytes() for f in sorted(outputs(out)))
    assert len(set(results.values())) == 3


def test_noise_is_not_injected_by_donors_that_have_none(tmp_path: Path) -> None:
    clean = open_source("glyphs").load(0, ImagesConfig(size=28))
    noisy = noise_operator(NoiseSpec(20), 28, 28)(clean[None])[0]
    for name, pixels in (("clean", clean), ("noisy", noisy)):
        tifffile.imwrite(tmp_path / f"{name}.tif", pixels[0])
    options = {"model": "notmnist", "images": str(tmp_path / "clean.tif"), "inject": 20}
    job = functools.partial(denoise, configs.load([], ["images.white=1"]), **options)
    with pytest.raises(InputError, match=r"noisy donors, but clean\.tif of .* looks clean"):
        job(out=tmp_path / "none", donor=str(tmp_path / "clean.tif"))
    job(out=tmp_path / "out", donor=str(tmp_path / "noisy.tif"))
    assert psnr(tifffile.imread(tmp_path / "out" / "clean.tif")[None, None], noisy[None]) > 30


def test_a_job_is_that_of_its_donors_and_of_its_model_as_it_is(
    model_folder: Path, image_folder: Path, tmp_path: Path
) -> None:
    model, donor = tmp_path / "model", tmp_path / "donor.png"
    shutil.copytree(model_folder, model)
    shutil.copy(image_folder / "b" / "01.png", donor)
    job = functools.partial(cleaning, images=str(image_folder / "a"), donor=str(donor))
    job(model=str(model), out=tmp_path / "out")
    job(model=str(model_folder), out=tmp_path / "out")  # a copy is the same model
    text = (model / "config.yaml").read_text()
    (model / "config.yaml").write_text(text.replace("filter: ramp", "filter: hann"))
    with pytest.raises(InputError, match=r"belongs to another job \(settings of the model"):
        job(model=str(model), out=tmp_path / "out")
    shutil.copy(image_folder / "a" / "00.png", donor)
    with pytest.raises(InputError, match=r"belongs to another job \(sizes and times of the donors"):
        job(model=str(model_folder), out=tmp_path / "out")


def test_tensors_of_a_data_folder_become_float_tiff(
    tiny: Config, model_folder: Path, tmp_path: Path
) -> None:
    data = simulate(tiny, images="glyphs", out=tmp_path / "data").out
    out = tmp_path / "out"
    cleaning(model=str(model_folder), images=f"{data / 'test'}#noisy_6", out=out)
    ids = pq.read_table(data / "test", columns=["id"])["id"].to_pylist()
    assert outputs(out) == {name.replace(".png", ".tif") for name in ids}


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """200 random images of 32 pixels."""
    folder, rng = tmp_path / "scans", np.random.default_rng(0)
    folder.mkdir()
    for k in range(200):
        pixels = rng.integers(0, 256, (32, 32), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k:04d}.png")
    return folder


@contextlib.contextmanager
def started(out: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """`snr denoise` in a process group of its own, which is gone afterwards."""
    command = [sys.executable, "-m", "snr_ray.cli", "denoise", "--out", str(out), *options]
    with subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE) as job:
        try:
            yield job
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)


def wait_for_rows(job: subprocess.Popen[bytes], out: Path) -> None:
    while not list((out / "manifest.parquet").glob("part*.parquet")):
        assert job.poll() is None, job.stderr.read().decode() if job.stderr else ""
        time.sleep(0.05)


def test_outputs_of_killed_jobs_are_kept_and_completed(
    model_folder: Path, scans: Path, tmp_path: Path
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    options = ["--model", str(model_folder), "--images", str(scans), "--samples", "8",
               "--doubtful", "write"]  # fmt: skip
    with started(out, *options) as job:
        # First a worker: the job goes on. Then the driver, with all that it started.
        tasks: list[psutil.Process] = []
        while not tasks:
            tasks = [p for p in psutil.Process(job.pid).children(recursive=True)
                     if "_clean_block" in " ".join(p.cmdline())]  # fmt: skip
            time.sleep(0.05)
        tasks[0].kill()
        wait_for_rows(job, out)
    kept = pq.read_table(out / "manifest.parquet")["output"].to_pylist()
    stamps = {name: (out / name).stat().st_mtime_ns for name in kept}
    assert 0 < len(kept) < 200
    (out / ".0123456789ab.partial").write_bytes(b"cut short")
    os.utime(out / ".0123456789ab.partial", (1, 1))
    outcome = cleaning(model=str(model_folder), images=str(scans), out=out, samples=8)
    assert (outcome.images, outcome.failed) == (200, 0)
    ids = pq.read_table(out / "manifest.parquet")["id"].to_pylist()
    assert len(ids) == len(set(ids)) == 200
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == stamps
    assert not list(out.rglob("*.partial"))
    cleaning(model=str(model_folder), images=str(scans), out=whole, samples=8)
    assert outputs(out) == outputs(whole)
    for name in outputs(whole):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_second_driver_is_told_of_the_first(
    model_folder: Path, image_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with locked(out, "denoise"), pytest.raises(InputError, match="in use by snr denoise"):
        cleaning(model=str(model_folder), images=str(image_folder), out=out)
    assert not list(out.iterdir())


def test_bad_requests_are_refused(
    model_folder: Path,
    unet_folder: Path,
    blind_folder: Path,
    physics_folder: Path,
    image_folder: Path,
    tmp_path: Path,
) -> None:
    def run(**changes: object) -> None:
        options = {"model": str(model_folder), "images": str(image_folder),
                   "out": tmp_path / "out"} | changes  # fmt: skip
        cleaning(**options)

    with pytest.raises(InputError, match=r"trained on \(12, 6\), but got 7"):
        run(inject=7)
    with pytest.raises(InputError, match=r"--views tells .* but this one is blind"):
        run(n_views=12, model=str(blind_folder))
    with pytest.raises(InputError, match="view count must be at least 1, but got 0"):
        run(n_views=0)
    with pytest.raises(InputError, match="holds a supervised U-Net, the baseline"):
        run(model=str(unet_folder))
    physics = {"model": str(physics_folder)}
    with pytest.raises(InputError, match=r"--views tells .* but --inject takes clean input"):
        run(n_views=12, inject=12, **physics)
    with pytest.raises(InputError, match=r"trained on \(12, 6\), but got 7"):
        run(n_views=7, **physics)
    with pytest.raises(InputError, match="--donor must be mean, random or images to borrow"):
        run(donor="nobody")
    with pytest.raises(InputError, match="--samples must not be negative, but got -1"):
        run(samples=-1)
    with pytest.raises(InputError, match="--out must lie outside the images"):
        run(out=image_folder / "clean")
    with pytest.raises(InputError, match="A model folder holds"):
        run(model=str(tmp_path))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "00.png").write_bytes(b"precious")
    with pytest.raises(InputError, match="holds other files"):
        run(out=tmp_path / "mine")
    assert (tmp_path / "mine" / "00.png").read_bytes() == b"precious"


@pytest.mark.parametrize("form", ["{0}", "{0}/*.png", "{0}/00.png", "file://{0}"])
def test_inputs_are_never_replaced_even_on_demand(
    model_folder: Path, image_folder: Path, form: str
) -> None:
    folder = image_folder / "a"
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(InputError, match="--out must lie outside the images"):
        cleaning(model=str(model_folder), images=form.format(folder), out=folder,
                overwrite=True)  # fmt: skip
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("images", "out"),
    [
        ("in", "in"),
        ("in", "in/cleaned"),
        ("in/", "in//"),
        ("in", "i%6e"),
        ("in/*.png", "in"),
        ("in/00.png", "in"),
        ("in/**", "in/cleaned"),
    ],
)
def test_nor_are_those_in_a_bucket(
    model_folder: Path, image_folder: Path, bucket: tuple[pafs.FileSystem, str],
    images: str, out: str,
) -> None:  # fmt: skip
    there = f"s3://{{}}bucket/{{}}?{bucket[1]}"
    image = (image_folder / "a" / "00.png").read_bytes()
    open_folder(there.format("", "in")).write("00.png", image)
    with pytest.raises(InputError, match="--out must lie outside the images"):
        cleaning(model=str(model_folder), images=there.format("", images),
                 out=there.format("test:test@", out), overwrite=True)  # fmt: skip
    assert open_folder(there.format("", "in")).list() == ["00.png"]


def test_two_inputs_with_one_output_name_are_refused(model_folder: Path, tmp_path: Path) -> None:
    rows = {"name": ["x", "x.png"], "image": [b"1", b"2"]}
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    with pytest.raises(InputError, match=r"2 of .* would be written to 't/x\.png'"):
        cleaning(model=str(model_folder), images=str(tmp_path / "t.parquet"),
                out=tmp_path / "out")  # fmt: skip


def _scans(folder: Path, views: list[int]) -> npt.NDArray[np.float32]:
    """Letters of 28 pixels as scans of so many views, in files; the clean ones are returned."""
    images, source = ImagesConfig(), open_source("glyphs")
    rows = source.select("test")[: len(views)]
    clean = np.stack([source.load(row, images) for row in rows])
    folder.mkdir()
    for k, n_views in enumerate(views):
        scan = noise_operator(NoiseSpec(n_views), 28, 28)(clean[k : k + 1])
        np.save(folder / f"{k}.npy", scan[0, 0])
    return clean


def test_view_count_that_nobody_knows_is_detected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configs.load([], ["images.white=1"])
    clean = _scans(tmp_path / "scans", [13] * 4)
    explains: dict[str | None, float] = {}

    def cleaned(n_views: Literal["detect"] | None) -> float:
        out = tmp_path / f"{n_views}"
        denoise(
            config,
            doubtful="write",
            model="notmnist",
            images=str(tmp_path / "scans"),
            out=out,
            n_views=n_views,
        )
        rows = pq.read_table(out / "manifest.parquet").to_pylist()
        assert {row["n_views"] for row in rows} <= ({13} if n_views else {0, 10, 20, 40})
        known = [row["explained"] for row in rows]
        said = re.search(r"to (.*) dB in the median, (.*) dB at the", capsys.readouterr().out)
        assert said
        assert float(said[1]) == pytest.approx(np.median(known), abs=0.6)
        assert float(said[2]) == pytest.approx(min(known), abs=0.6)
        explains[n_views] = min(known) if n_views else max(known)
        images = np.stack([np.load(out / f"{k}.npy") for k in range(4)])[:, None]
        return float(psnr(images, clean).mean())

    assert cleaned("detect") > cleaned(None) + 10
    assert explains["detect"] > explains[None] + 5
    assert "Least explained" in (tmp_path / "detect" / "report.html").read_text()


def test_scans_of_several_view_counts_are_not_taken_for_one(tmp_path: Path) -> None:
    _scans(tmp_path / "scans", [13, 24, 13])
    config, out = configs.load([], ["images.white=1"]), tmp_path / "out"
    with pytest.raises(InputError, match=r"one view count, .* \(0.npy: 13, 1.npy: 24, 2.npy: 13\)"):
        denoise(
            config,
            doubtful="write",
            model="notmnist",
            images=str(tmp_path / "scans"),
            out=out,
            n_views="detect",
        )
    assert not out.exists()
    with pytest.raises(InputError, match=r"none can be read: .*images\.white"):
        cleaning(model="notmnist", images=str(tmp_path / "scans"), out=out, n_views="detect")
    np.save(tmp_path / "scans" / "-.npy", np.zeros((200, 6)))
    with pytest.raises(InputError, match=r"at least 8 pixels a side, but -\.npy has 200x6"):
        denoise(
            config,
            doubtful="write",
            model="notmnist",
            images=str(tmp_path / "scans"),
            out=out,
            n_views="detect",
        )


def test_model_images_and_results_may_be_in_a_bucket(
    model_folder: Path, image_folder: Path, bucket: tuple[pafs.FileSystem, str], tmp_path: Path
) -> None:
    there = f"s3://test:test@bucket/{{}}?{bucket[1]}"
    images = sorted(image_folder.rglob("*.png"))[:6]
    for folder, paths in (("model", list(model_folder.iterdir())), ("in", images)):
        for path in paths:
            open_folder(there.format(folder)).write(path.name, path.read_bytes())
    here = tmp_path / "in"
    here.mkdir()
    for path in images:
        (here / path.name).write_bytes(path.read_bytes())
    cleaning(model=str(model_folder), images=str(here), out=tmp_path / "out")
    where = {"model": there.format("model"), "images": there.format("in")}
    for _ in range(2):  # the second finds itself done
        outcome = cleaning(**where, out=there.format("out"))
        assert (outcome.images, outcome.failed) == (6, 0)
    place = open_folder(there.format("out"))
    written = place.list()
    assert {name for name in written if name.endswith(".png")} == {path.name for path in images}
    for path in images:
        assert place.read(path.name) == (tmp_path / "out" / path.name).read_bytes()
    assert b"test:test" not in b"".join(map(place.read, written))
    assert not Path("s3:").exists()


@pytest.mark.parametrize("name", ["manifest.parquet", "failures.parquet", "report.html"])
def test_a_bucket_that_fails_later_ends_the_job_in_a_sentence(
    name: str, model_folder: Path, image_folder: Path, bucket: tuple[pafs.FileSystem, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    answer = S3Response._key_response
    text = "<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"

    def closed(response: S3Response, request: Any, url: str) -> Any:
        denied = (403, {"Content-Type": "application/xml"}, text)
        written = request.method in ("PUT", "POST") and name in url
        return denied if written else answer(response, request, url)

    out = f"s3://test:test@bucket/out?{bucket[1]}"
    job = {"model": str(model_folder), "images": str(image_folder / "a"), "out": out}
    with monkeypatch.context() as patch:
        patch.setattr(S3Response, "_key_response", closed)
        with pytest.raises(Lost, match=r"but s3://bucket/out\S+ cannot any more \(.*ACCESS_DENIED"):
            cleaning(**job)
    outcome = cleaning(**job)
    assert (outcome.images, outcome.failed) == (12, 0)


def test_a_driver_of_a_shipped_model_imports_little(image_folder: Path, tmp_path: Path) -> None:
    # Its tasks build the network; importing these takes longer than all else that it does.
    code = """
import sys
from snr_ray.config import Config
from snr_ray.stages.denoising import denoise
class Connects(Exception): pass
def connected(**_): raise Connects
denoise.connected = connected
try:
    denoise.denoise(Config(), model=sys.argv[1], images=sys.argv[2], out=sys.argv[3])
except Connects:
    print(sorted({"torch", "numba", "scipy", "matplotlib", "skimage"} & set(sys.modules)))
"""
    command = [sys.executable, "-c", code, "notmnist", str(image_folder), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
