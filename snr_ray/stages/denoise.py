"""Bulk denoising: model folder + images -> images under their own names, in a Ray Data job.

    index --tasks: read--> bytes --tasks: decode, swap, encode, write--> file + manifest row

    OUT/<name of the image>        same format and depth (tensors become float TIFF)
    OUT/<name>.std.npy             with --samples: standard deviation of the samples, per pixel
    OUT/manifest.parquet           one row per image written; `explained`, PSNR in dB of the noise
                                   made anew of the cleaned image, says how well without the truth
    OUT/failures.parquet           one row per image that could not be: id, stage, reason
    OUT/report.html                a page to look at
    OUT/parts/                     rows of a job that has not finished

Files appear whole, then their rows; a killed job continues with the images that have no row, and
a finished one tries its failures again.
"""

import dataclasses
import functools
import shutil
import sys
import time
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch

from snr_ray.config import Config, InputError, check
from snr_ray.hashing import fingerprint
from snr_ray.images import formats
from snr_ray.images.collection import Source
from snr_ray.images.datafolder import Failure, parquet_bytes, write_failures
from snr_ray.images.sources import open_source
from snr_ray.learning.checkpoint import TrainedModel, load_model, model_path
from snr_ray.network.swap import exchange, noise_code
from snr_ray.outputs import Progress, claim, write_atomic
from snr_ray.scoring.report import denoise_report
from snr_ray.stages.cluster import connected, gpus, shared
from snr_ray.stages.fileswap import MANIFEST_SCHEMA, FileSwapper, ImageFile
from snr_ray.stages.inputs import open_images
from snr_ray.stages.simulate import Outcome

Array = npt.NDArray[np.float32]

READ_ROWS = 64
"""Images per task."""
DETECT_IMAGES = 3
"""Images that --views detect looks at."""
DETECT_SIDE = 128
"""Height and width that it takes at most: larger images would take it hours."""
FEWEST_VIEWS = 4
"""View counts that --views detect begins with."""
ROW_SCHEMA = MANIFEST_SCHEMA.append(pa.field("error", pa.string())).append(
    pa.field("stage", pa.string())
)


def denoise(
    config: Config,
    *,
    model: str,
    images: str,
    out: Path,
    donor: str = "mean",
    samples: int = 0,
    inject: int | None = None,
    n_views: int | Literal["detect"] | None = None,
    overwrite: bool = False,
) -> Outcome:
    """Exchange the noise code of every image of a source.

    Args:
        config: `seed` (random donors, samples) and `images.white` and `images.window` are used.
        model: model folder.
        images: SRC; read at full size, never resized.
        out: output folder.
        donor: "mean" (mean noise code), "random" (a random one of the donors in the model folder
            for each image, by hash of its id) or the path of an image or folder of donor images.
        samples: 0 decodes posterior means; N > 0 averages N posterior samples and writes their
            standard deviation.
        inject: None removes noise (clean donors); a view count injects its noise.
        n_views: view count of the images, for a model with model.physics (one that it was trained
            on) or model.unrolled (any); None leaves it to the noise code of each image, which knows
            those that the model was trained on. "detect" tries all on the first images: the one
            whose noise explains them best is taken for all of them.
        overwrite: replace files of the same names.

    Raises:
        InputError: for a model, source, folder or setting the user can put right.
    """
    if samples < 0:
        raise InputError(f"--samples must not be negative, but got {samples}.")
    trained = load_model(model)
    if n_views is not None:
        _check_views(trained, n_views, inject)
    noise_id = 0 if inject is None else trained.noise_id(inject)
    source = open_images(images)
    out = out.absolute()
    outputs = _output_names(source, samples)
    pool = _pool(trained, donor, noise_id, config)
    told = _detect_views(trained, source, config) if n_views == "detect" else n_views
    resumed = claim(
        out,
        {
            "stage": "denoise",
            "model": fingerprint((model_path(model) / "model.safetensors").read_bytes()),
            "source": source.home,
            "donor": donor,
            "samples": samples,
            "inject": inject,
            "n_views": n_views,
            "seed": config.seed,
            "white": config.images.white,
            "window": config.images.window,
        },
        owned=("manifest.parquet", "failures.parquet", "report.html", "parts"),
        overwrite=overwrite,
        inputs=source.folder,
        inputs_alone=source.alone,
    )
    rows = _rows_done(out) if resumed else []
    done = {row["id"] for row in rows}
    todo = [i for i, name in enumerate(source.ids) if name not in done]
    failures: list[Failure] = []
    if todo:
        with connected():
            work = {
                "model": str(model_path(model).absolute()),
                "inject": inject is not None,
                "n_views": told,
                "pool": pool,
                "out": str(out),
                "samples": samples,
                "seed": config.seed,
                "images": config.images,
            }
            new, failures = _run(source, outputs, todo, work, out)
        rows += new
    its = trained.config.images
    others = sum((row["height"], row["width"]) != (its.size, its.size) for row in rows)
    if others and its.crop is None:
        print(
            f"{others} of {len(rows)} images are not {its.size}x{its.size}, the size that this "
            "model was trained on; the larger they are, the less it knows of their noise.",
            file=sys.stderr,
        )
    known = [row["explained"] for row in rows if row.get("explained") is not None]
    if known:
        print(
            f"denoise: what was cleaned explains its input to {np.median(known):.0f} dB in the "
            f"median, {min(known):.0f} dB at the least: `explained` in the manifest, the lower the "
            "more of it is noise that the model does not know."
        )
    rows.sort(key=lambda row: row["id"])
    table = pa.Table.from_pylist(rows, MANIFEST_SCHEMA)
    write_atomic(out / "manifest.parquet", parquet_bytes(table))
    write_failures(out / "failures.parquet", failures)
    verb = "Noise removed" if inject is None else f"Noise of {inject} views injected"
    write_atomic(
        out / "report.html",
        denoise_report(verb, source, out, rows, failures, images=config.images),
    )
    shutil.rmtree(out / "parts", ignore_errors=True)
    return Outcome(out, len(rows), len(failures))


def _run(
    source: Source, outputs: list[str], todo: list[int], work: dict[str, Any], out: Path
) -> tuple[list[dict[str, Any]], list[Failure]]:
    """Denoise the images at `todo`; rows reach the disk while the job runs."""
    blocks = [np.array(todo[i : i + READ_ROWS]) for i in range(0, len(todo), READ_ROWS)]
    dataset = (
        ray.data.from_numpy(blocks)
        .map_batches(
            functools.partial(_read, ref=ray.put((source, outputs))),
            batch_size=None,
            batch_format="numpy",
        )
        .map_batches(
            functools.partial(_swap, work=ray.put(work)),
            batch_size=READ_ROWS,
            batch_format="pyarrow",
            num_cpus=1,
            num_gpus=1 if gpus() else 0,
        )
    )
    progress = Progress("denoise", len(todo))
    rows: list[dict[str, Any]] = []
    failures: list[Failure] = []
    unsaved: list[dict[str, Any]] = []
    part = len(list((out / "parts").glob("*.parquet")))
    saved = time.monotonic()
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        for row in batch.to_pylist():
            reason, stage = row.pop("error"), row.pop("stage")
            if reason:
                failures.append({"id": row["id"], "stage": stage, "reason": reason})
            else:
                rows.append(row)
                unsaved.append(row)
        note = f"{len(failures)} failed" if failures else ""
        progress.update(len(rows) + len(failures), note)
        if unsaved and time.monotonic() - saved > 2:
            table = pa.Table.from_pylist(unsaved, MANIFEST_SCHEMA)
            write_atomic(out / "parts" / f"{part:06d}.parquet", parquet_bytes(table))
            unsaved, part, saved = [], part + 1, time.monotonic()
    return rows, failures


def _read(batch: dict[str, npt.NDArray[np.int64]], *, ref: "ray.ObjectRef") -> pa.Table:
    """CPU task: indices -> the fields of ImageFile."""
    source, outputs = shared(ref)
    files = []
    for index in batch["data"].tolist():
        name, data, error = "", b"", ""
        try:
            name, data = source.file(index)
        except InputError as problem:
            error = str(problem)
        file = ImageFile(source.ids[index], outputs[index], name, data, source.tensors, error)
        files.append(dataclasses.asdict(file))
    return pa.Table.from_pylist(files)


def _swap(batch: pa.Table, *, work: "ray.ObjectRef") -> pa.Table:
    """Task: the fields of ImageFile in, manifest rows and failures out."""
    rows = _swapper(work).run([ImageFile(**row) for row in batch.to_pylist()])
    return pa.Table.from_pylist(rows, ROW_SCHEMA)


@functools.lru_cache(maxsize=1)
def _swapper(work: "ray.ObjectRef") -> FileSwapper:
    """One copy of the model for all tasks of a worker process."""
    options = dict(ray.get(work))
    device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    trained = load_model(options.pop("model"), device)
    return FileSwapper(trained, options.pop("pool"), Path(options.pop("out")), **options)


def _output_names(source: Source, samples: int) -> list[str]:
    """Relative output path of each image; refuses two images that would share one."""
    names = []
    for name in source.ids:
        path = PurePosixPath(name)
        known = path.suffix.lower() in formats.SUFFIXES
        if source.tensors or path.suffix.lower() == ".dcm":  # float pixels need a format for them
            path = path.with_suffix(".tif") if known else PurePosixPath(name + ".tif")
        elif not known:
            path = PurePosixPath(name + ".png")
        if path.is_absolute() or ".." in path.parts:
            raise InputError(f"Image ids must stay inside the output folder, but got {name!r}.")
        names.append(str(path))
    written = names + ([name + ".std.npy" for name in names] if samples else [])
    name, times = Counter(written).most_common(1)[0]
    if times > 1:
        raise InputError(
            f"Every image needs an output name of its own, but {times} of {source.name} would be "
            f"written to {name!r}; rename them or denoise them apart."
        )
    return names


def _check_views(
    trained: TrainedModel, n_views: int | Literal["detect"], inject: int | None
) -> None:
    """Raise InputError where --views does not go with the model or the task."""
    physics = trained.config.model.physics
    if inject is not None or not trained.can_be_told:
        raise InputError(
            "--views tells a model with model.physics or model.unrolled how many views its noisy "
            "input has, but "
            + ("--inject takes clean input." if inject is not None else "this one is blind.")
        )
    if n_views != "detect":
        trained.geometry(n_views)
        if physics:
            trained.noise_id(n_views)
    elif physics:
        raise InputError(
            "--views detect tries all view counts, but a model with model.physics knows only those "
            "it was trained on; leave --views out, and it detects which."
        )


def _detect_views(trained: TrainedModel, source: Source, config: Config) -> int:
    """The view count that explains the first readable images of a source best, said aloud.

    Raises:
        InputError: if they are not of one view count, or none can be read.
    """
    found: dict[str, int] = {}
    decibels, reason = 0.0, ""
    for index in range(len(source.ids)):
        try:
            image = source.read(index, config.images).pixels[None]
        except InputError as error:
            reason = reason or str(error)
            continue
        check(
            max(image.shape[2:]) <= DETECT_SIDE,
            f"--views detect tries all view counts, on images of at most {DETECT_SIDE} pixels, but "
            f"{source.ids[index]} has {image.shape[2]}x{image.shape[3]}; say how many there are.",
        )
        counts = range(FEWEST_VIEWS, 2 * max(image.shape[2:]) + 1)
        progress = Progress(f"denoise: views of {source.ids[index]}", len(counts), "view counts")
        scores = []
        for n_views in counts:
            geometry = trained.geometry(n_views)
            assert geometry is not None
            mean = trained.codes.mean(0)
            tried = exchange(trained.model, image, mean, geometry=geometry, explain=True)
            assert tried.explained is not None
            scores += tried.explained.tolist()
            progress.update(len(scores))
        best = int(np.argmax(scores))
        found[source.ids[index]], decibels = counts[best], scores[best]
        if len(found) == DETECT_IMAGES:
            break
    if not found:
        raise InputError(
            f"--views detect needs an image to look at, but of {source.name} none can be read: "
            + reason
        )
    n_views, votes = Counter(found.values()).most_common(1)[0]
    if votes < len(found):
        seen = ", ".join(f"{name}: {views}" for name, views in found.items())
        raise InputError(
            f"--views detect is for images of one view count, but they look like several ({seen}); "
            "denoise them apart, or leave --views out."
        )
    print(f"denoise: the images have {n_views} views, which explain them to {decibels:.0f} dB.")
    return n_views


def _pool(trained: TrainedModel, donor: str, noise_id: int, config: Config) -> list[Array]:
    """Noise codes to take donors from, per level: [n_donors, C_noise, h, w]."""
    if donor == "mean":
        return [level.numpy() for level in trained.codes.mean(noise_id)]
    if donor == "random":
        return [level[noise_id].numpy() for level in trained.codes.donors]
    try:
        lenders = open_source(donor)
    except InputError as error:
        raise InputError(
            f"--donor must be mean, random or images to borrow from: {error}"
        ) from None
    codes = []
    for index in range(len(lenders.ids)):
        pixels = lenders.read(index, config.images).pixels
        codes.append([level.numpy() for level in noise_code(trained.model, pixels[None])])
    shapes = {tuple(level.shape for level in code) for code in codes}
    if len(shapes) > 1:
        raise InputError(
            "Donors of a model with spatial noise codes must have one size, but those of "
            f"{donor} differ; give one donor or resize them."
        )
    return [np.concatenate(level) for level in zip(*codes, strict=True)]


def _rows_done(out: Path) -> list[dict[str, Any]]:
    """Manifest rows of images that are finished: of the last run and of an interrupted one."""
    paths = [p for p in (out / "manifest.parquet",) if p.is_file()]
    paths += sorted((out / "parts").glob("*.parquet"))
    rows = {row["id"]: row for path in paths for row in pq.read_table(path).to_pylist()}
    return [row for row in rows.values() if (out / row["output"]).is_file()]
