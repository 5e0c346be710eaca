"""How a job runs: bounds, lists of failures, names of its own, doubt, a GPU that is played."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from bisect import bisect
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
import zarr_images
from PIL import Image

from snr_ray.cli import main
from snr_ray.config import Config
from snr_ray.errors import InputError, Lost
from snr_ray.images.formats import memory
from snr_ray.stages.denoising import cleaning as cleaning_of_blocks
from snr_ray.stages.denoising import room
from snr_ray.stages.denoising.cleaning import on_gpus
from snr_ray.stages.denoising.denoise import denoise
from snr_ray.stages.denoising.denoisejob import Job, Running, gpu_block

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_2_cpus")]
# Models of random weights explain nothing, and what they write is what is looked at here.
cleaning = functools.partial(denoise, Config(), doubtful="write")


def rows(out: Path) -> dict[str, dict]:
    return {row["id"]: row for row in pq.read_table(out / "manifest.parquet").to_pylist()}


@pytest.mark.parametrize(
    ("n_images", "n_cores", "per_block"),
    [(1, 16, 256), (9_000, 16, 562), (24_000, 16, 1024), (10**8, 16, 1024), (9, 0, 256)],
)
def test_blocks_for_gpus_are_large_where_all_cores_have_some(
    n_images: int, n_cores: int, per_block: int
) -> None:
    assert gpu_block(256, n_images, n_cores) == per_block


def test_names_of_the_job_never_meet_those_of_images(
    model_folder: Path, image_folder: Path, tmp_path: Path
) -> None:
    image = (image_folder / "a" / "00.png").read_bytes()
    odd = ["parts", "manifest.parquet", "Report.html", "job.json", "failures.parquet_"]
    for name in odd:
        (image_folder / name).mkdir()
        (image_folder / name / "x.png").write_bytes(image)
    job = {"model": str(model_folder), "images": str(image_folder), "out": tmp_path / "out"}
    for overwrite in (False, False, True):  # done, found done, done anew
        outcome = cleaning(**job, overwrite=overwrite)
        assert (outcome.images, outcome.failed) == (24 + len(odd), 0)
        results = [tmp_path / "out" / row["output"] for row in rows(tmp_path / "out").values()]
        assert len({path.resolve() for path in results}) == 24 + len(odd)
        assert all(path.is_file() for path in results)
    assert (tmp_path / "out" / "parts" / "x.png").is_file()
    assert json.loads((tmp_path / "out" / "job.json").read_text())["stage"] == "denoise"


def test_who_watches_the_lines_sees_the_end_also_of_a_job_that_was_done(
    model_folder: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = {"model": str(model_folder), "images": str(image_folder), "out": tmp_path / "out"}
    for _ in range(2):
        cleaning(**job, running=Running(progress="json"))
        lines = [line for line in capsys.readouterr().err.splitlines() if line[:1] == "{"]
        last = json.loads(lines[-1])
        assert (last["done"], last["total"], last["failed"]) == (24, 24, 0)


def test_a_replaced_input_is_done_again_and_another_spelling_is_the_same_job(
    model_folder: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    cleaning(model=str(model_folder), images=str(image_folder), out=out)
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    replaced = image_folder / "a" / "00.png"
    Image.fromarray(np.zeros((20, 18), np.uint8)).save(replaced)
    monkeypatch.chdir(image_folder.parent)
    assert cleaning(model=str(model_folder), images="./images/", out=out).images == 24
    changed = {path for path in stamps if path.stat().st_mtime_ns != stamps[path]}
    assert changed == {out / "a" / "00.png"}
    assert len(pq.read_table(out / "manifest.parquet")) == 24


def test_folders_that_are_images_are_done_once_and_again_where_one_was_replaced(
    model_folder: Path, image_folder: Path, tmp_path: Path
) -> None:
    values = np.random.default_rng(0).integers(0, 256, (3, 20, 16), dtype=np.uint8)
    for name, version in (("v2.ome.zarr", 2), ("sub/v3.zarr", 3), ("sub/named otherwise", 3)):
        zarr_images.write(image_folder / name, values, version=version, chunks=(1, 16, 16))
    zarr_images.describe(image_folder / "bad.zarr", {})
    out, begun = tmp_path / "out", time.time()
    job = {"model": str(model_folder), "images": str(image_folder), "out": out}
    outcome = cleaning(**job)
    assert (outcome.images, outcome.failed) == (24 + 3, 1)
    failed = pq.read_table(out / "failures.parquet").to_pylist()
    assert [(row["id"], row["stage"]) for row in failed] == [("bad.zarr", "read")]
    assert "multiscales" in failed[0]["reason"]
    assert rows(out)["v2.ome.zarr"] | {"stamp": "", "seconds": 0} == rows(out)["sub/v3.zarr"] | {
        "id": "v2.ome.zarr", "output": "v2.ome.zarr", "stamp": "", "seconds": 0,
    }  # fmt: skip
    for name in ("sub/v3.zarr", "sub/named otherwise"):
        np.testing.assert_array_equal(zarr_images.pixels(out / name),
                                      zarr_images.pixels(out / "v2.ome.zarr"))  # fmt: skip
    shown = re.findall("<figcaption>([^,<]*)", (out / "report.html").read_text())
    assert {"v2.ome.zarr", "sub/v3.zarr", "sub/named otherwise"} & set(shown)

    def stamps() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()
                and out / "sub" in path.parents}  # fmt: skip

    before = stamps()
    os.utime(image_folder / "v2.ome.zarr" / "0" / "0.0.0", (begun, begun))
    shutil.rmtree(out / "sub" / "named otherwise")
    cut_short = out / "sub" / ".0123456789ab.partial"
    (cut_short / "0").mkdir(parents=True)
    os.utime(cut_short, (1, 1))
    outcome = cleaning(**job)
    assert (outcome.images, outcome.failed) == (24 + 3, 1)
    assert not cut_short.exists()
    after = stamps()
    assert set(after) == set(before)
    changed = {path.relative_to(out / "sub").parts[0] for path in after
               if after[path] != before[path]}  # fmt: skip
    assert changed == {"named otherwise"}
    assert len(pq.read_table(out / "manifest.parquet")) == 24 + 3


@pytest.mark.parametrize("where", ["a.zarr", "a.zarr/out", "a.zarr/0/out"])
@pytest.mark.parametrize("images", ["", "a.zarr", "*.zarr"])
def test_results_never_land_in_a_folder_that_is_an_image(
    images: str, where: str, model_folder: Path, tmp_path: Path
) -> None:
    zarr_images.write(tmp_path / "in" / "a.zarr", np.zeros((2, 9, 9), np.uint8))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=r"--out must lie outside the images, .* is inside"):
        cleaning(model=str(model_folder), images=str(tmp_path / "in" / images),
                 out=tmp_path / "in" / where, overwrite=True)  # fmt: skip
    assert sorted(tmp_path.rglob("*")) == before


def test_folders_that_are_images_go_from_bucket_to_bucket(
    model_folder: Path, bucket: tuple[pafs.FileSystem, str], tmp_path: Path
) -> None:
    values = np.random.default_rng(0).integers(0, 256, (2, 20, 16), dtype=np.uint8)
    for version in (2, 3):
        zarr_images.write(tmp_path / "in" / f"{version}.zarr", values, version=version)
    pafs.copy_files(str(tmp_path / "in"), "bucket/in", destination_filesystem=bucket[0])
    there = f"s3://test:test@bucket/{{}}?{bucket[1]}"
    job = {"model": str(model_folder), "images": there.format("in"), "out": there.format("out")}
    for overwrite in (False, False, True):
        outcome = cleaning(**job, overwrite=overwrite)
        assert (outcome.images, outcome.failed) == (2, 0)
    cleaning(model=str(model_folder), images=str(tmp_path / "in"), out=tmp_path / "here")
    pafs.copy_files("bucket/out", str(tmp_path / "out"), source_filesystem=bucket[0])
    for name in ("2.zarr", "3.zarr"):
        here, out = tmp_path / "here" / name, tmp_path / "out" / name
        np.testing.assert_array_equal(zarr_images.pixels(here), zarr_images.pixels(out))
        assert zarr_images.described(here) == zarr_images.described(out)


def test_a_list_of_failures_is_a_list_of_images_to_do(
    model_folder: Path, image_folder: Path, tmp_path: Path
) -> None:
    good = (image_folder / "a" / "00.png").read_bytes()
    for name in ("one.png", "two.png", "three.png"):
        (image_folder / name).write_bytes(b"")
    out, again = tmp_path / "out", tmp_path / "again"
    assert cleaning(model=str(model_folder), images=str(image_folder), out=out).failed == 3
    (image_folder / "one.png").write_bytes(good)
    (image_folder / "late.png").write_bytes(good)  # not in the list
    failures = str(out / "failures.parquet")
    outcome = cleaning(model=str(model_folder), images=failures, out=again)
    assert (outcome.images, outcome.failed) == (1, 2)
    assert set(rows(again)) == {"one.png"}
    outcome = cleaning(model=str(model_folder), images=failures, out=out)
    assert (outcome.images, outcome.failed) == (25, 2)
    old = tmp_path / "old" / "failures.parquet"
    old.parent.mkdir()
    pq.write_table(pq.read_table(failures).replace_schema_metadata(None), old)
    with pytest.raises(InputError, match="of an older snr_ray"):
        cleaning(model=str(model_folder), images=str(old), out=tmp_path / "x")


def test_too_many_failures_end_the_job_and_all_that_was_done_stays(
    model_folder: Path, image_folder: Path, tmp_path: Path
) -> None:
    for k in range(4):
        (image_folder / f"bad{k}.png").write_bytes(b"")
    job = {"model": str(model_folder), "images": str(image_folder), "out": tmp_path / "out"}
    with pytest.raises(InputError, match=r"--max-failures 3 allows 3 of 28 .* but 4 of 28 did"):
        cleaning(**job, running=Running(max_failures="3"))
    assert len(pq.read_table(tmp_path / "out" / "failures.parquet")) == 4
    assert len(rows(tmp_path / "out")) == 24
    assert cleaning(**job, running=Running(max_failures="100%")).failed == 4
    for text in ("many", "-1", "101%", "2.5", "nan%", "%"):
        with pytest.raises(InputError, match="a number of images or a percentage"):
            Running(max_failures=text)


def test_doubtful_results_are_told_and_not_written_as_if_clean(
    model_folder: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A model of random weights explains nothing.
    out = tmp_path / "out"
    argv = ["denoise", "--model", str(model_folder), "--images", str(image_folder / "a"), "--out",
            str(out), "--progress", "json"]  # fmt: skip
    assert main(argv) == 3
    said = capsys.readouterr()
    assert "12 images are doubtful" in said.err
    assert "12 of them doubtful" in (out / "report.html").read_text()
    last = json.loads([line for line in said.err.splitlines() if line.startswith("{")][-1])
    assert (last["done"], last["total"], last["failed"]) == (12, 12, 0)
    assert {row["status"] for row in rows(out).values()} == {"doubtful"}
    for path in (image_folder / "a").iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()
    assert main([*argv, "--doubtful", "fail", "--overwrite"]) == 3
    failures = pq.read_table(out / "failures.parquet").to_pylist()
    assert {row["stage"] for row in failures} == {"doubtful"}
    assert len(failures) == 12


def test_an_image_without_room_in_memory_fails_alone(
    model_folder: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (9000, 9000)).save(image_folder / "huge.png")
    data = (image_folder / "huge.png").read_bytes()
    monkeypatch.setattr(memory, "node_memory", lambda: 8 * 2**30)
    with pytest.raises(InputError, match=r"half of a node's 8 GB .* huge.png holds 81 million"):
        room.check_room(data, "huge.png", 1000)
    room.check_room(data, "huge.png", 0)
    # A photograph of 12 million pixels and three colours does not fit where two megapixels do.
    per_value = room.bytes_per_value(Config(), None)
    assert 36e6 * per_value > memory.SHARE * memory.node_memory() > 2e6 * per_value
    room.check_room((image_folder / "a" / "00.png").read_bytes(), "00.png", 10**9)


def test_as_many_gpus_as_there_are(model_folder: Path, image_folder: Path, tmp_path: Path) -> None:
    job = {"model": str(model_folder), "images": str(image_folder), "out": tmp_path / "out"}
    with pytest.raises(InputError, match="of 2 only 0 are there"):
        cleaning(**job, running=Running(gpus=2))
    assert cleaning(**job, running=Running(gpus=0)).images == 24


KINDS = ("start", "answer")
PLAYED = """
import dataclasses, os, signal, sys, time, uuid
from pathlib import Path
from types import SimpleNamespace
from snr_ray.environment import prepare_environment
prepare_environment()
import ray
from snr_ray.config import Config
from snr_ray.errors import InputError
from snr_ray.stages.denoising import denoise
from snr_ray.stages.denoising import denoisejob
from snr_ray.stages.denoising import swappermaker
model, images, out, log, n_gpus = *map(Path, sys.argv[1:5]), int(sys.argv[5])
ray.init(address="local", num_cpus=2, num_gpus=n_gpus, include_dashboard=False,
         log_to_driver=False, object_store_memory=200 * 2**20)
denoisejob.MOST_IMAGES = denoisejob.GPU_BLOCK = 2

def mark(what):
    (log / f"{what}-{os.getpid()}-{time.time():.6f}-{uuid.uuid4().hex}").touch()

class Slow:
    def __init__(self, swapper):
        self.swapper = swapper
    def run(self, *given):
        return self.swapper.run(*given)
    def answer(self, stack):
        mark("answer")
        if os.environ.get("KILLS") in stack.ids:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.3)
        return self.swapper.answer(stack)

class Maker(swappermaker.SwapperMaker):
    def __call__(self, device):
        mark("load")
        return Slow(super().__call__(device))

denoise.SwapperMaker = Maker
on_gpus = denoisejob.on_gpus

def watched(*given):
    work = on_gpus(*given)
    def start(block):
        mark("start")
        return work.start(block)
    return dataclasses.replace(work, start=start)

denoisejob.on_gpus = watched
try:
    done = denoise.denoise(Config(), model=str(model), images=str(images), out=out,
                           doubtful="write")
    print(done.images, done.failed)
except InputError as error:
    print(error)
"""


def played(
    model: Path, images: Path, place: Path, out: str, **env: str
) -> subprocess.CompletedProcess[str]:
    """PLAYED with one GPU, in a process of its own; it marks what it does in place/log."""
    (place / "log").mkdir(exist_ok=True)
    command = [sys.executable, "-c", PLAYED, str(model), str(images),
               str(place / out), str(place / "log"), "1"]  # fmt: skip
    return subprocess.run(
        command, env={**os.environ, **env}, capture_output=True, text=True, check=True
    )


def test_gpus_hold_the_model_once_and_have_several_batches_at_hand(
    model_folder: Path, image_folder: Path, tmp_path: Path
) -> None:
    # Ray counts a GPU that is the processor: who loads, who swaps, and what waits meanwhile.
    done = played(model_folder, image_folder, tmp_path, "out", SNR_RAY_GPU_IS_CPU="1")
    assert done.stdout.splitlines()[-1] == "24 0", done.stdout + done.stderr
    log = [path.name.split("-") for path in (tmp_path / "log").iterdir()]
    who = {kind: [pid for its, pid, *_ in log if its == kind] for kind in ("load", "answer")}
    assert len(who["load"]) == 1
    assert set(who["answer"]) == set(who["load"])
    when = {kind: sorted(float(t) for its, _, t, _ in log if its == kind) for kind in KINDS}
    at_hand = [bisect(when["start"], t) - k for k, t in enumerate(when["answer"])]
    assert max(at_hand) >= 3
    cleaning(model=str(model_folder), images=str(image_folder), out=tmp_path / "cores")
    for name in rows(tmp_path / "cores"):  # in other company a pixel may be rounded otherwise
        two = (np.asarray(Image.open(tmp_path / of / name), int) for of in ("out", "cores"))
        assert abs(np.subtract(*two)).max() <= 1, name
    # Without torch's leave, one sentence.
    done = played(model_folder, image_folder, tmp_path, "refused")
    assert "torch finds none on" in done.stdout


def test_an_image_that_kills_the_process_of_a_gpu_takes_no_other_with_it(
    model_folder: Path, image_folder: Path, tmp_path: Path
) -> None:
    done = played(
        model_folder, image_folder, tmp_path, "out", SNR_RAY_GPU_IS_CPU="1", KILLS="a/10.png"
    )
    assert done.stdout.splitlines()[-1] == "24 0", done.stdout + done.stderr


def test_lost_gpus_get_no_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cleaning_of_blocks, "LOST_LOOK_S", 0)
    states = {"a": [2, 3, 3, 3, 3, 3, 2], "b": [2, 2, 2, 3, 3, 3, 3]}
    actors = [
        SimpleNamespace(name=name, _get_local_state=iter(said).__next__)
        for name, said in states.items()
    ]
    turns = cleaning_of_blocks._Turns(actors, 1)
    assert [turns.next().name for _ in range(4)] == ["b", "a", "b", "b"]
    assert turns.next().name == "a"
    turns = cleaning_of_blocks._Turns([SimpleNamespace(_get_local_state=lambda: 3)], 1e-5)
    with pytest.raises(Lost, match=r"A GPU must be there within 1e-05 minutes, but all 1 are lost"):
        turns.next()


def test_gpus_that_never_come_are_told() -> None:
    with pytest.raises(InputError, match=r"1 GPUs must be free within 0\.02 minutes, but only 0"):
        on_gpus(None, lambda device: None, 1, 0.02, 1)


def test_gpus_that_never_come_are_refused() -> None:
    for wanted, taken in ((None, 0), (0, 0)):
        assert Job._gpus(SimpleNamespace(running=Running(gpus=wanted))) == taken
    with pytest.raises(InputError, match=r"or its autoscaler brings, but of 5 only 0 are there"):
        Job._gpus(SimpleNamespace(running=Running(gpus=5)))
