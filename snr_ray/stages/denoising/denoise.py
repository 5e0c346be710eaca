"""Bulk denoising: model folder + images -> images under their own names, on a Ray cluster.

    list --blocks of images--> tasks: read, decode, exchange, encode, write --rows--> manifest

    OUT/<name of the image>        same format and depth (tensors become TIFF)
    OUT/<name>.std.npy             with --samples: standard deviation of the samples, per pixel
    OUT/manifest.parquet/          one row per image written, in parts that are one table to
                                   readers; `explained`, PSNR in dB of the noise made anew of the
                                   cleaned image, says how well without the truth, and `status` is
                                   doubtful where that is not enough
    OUT/failures.parquet           one row per image that could not be: id, stage, reason; to be
                                   given as --images, it means these images of that job
    OUT/report.html                a page to look at

Files appear whole, then their rows; a killed job continues with the images that have no row, and
a finished one tries its failures again. Images in a folder named as one of the job's own files go
to a folder with an underscore after that name.
"""

import contextlib
import functools
import json
import uuid
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from snr_ray import configfile as configs
from snr_ray.address import open_folder
from snr_ray.config import Config
from snr_ray.errors import InputError, check
from snr_ray.folder import JOB, Folder
from snr_ray.hashing import fingerprint
from snr_ray.images.collection import Source
from snr_ray.images.sources import open_source
from snr_ray.learning.modelfolder import Knowledge, is_shipped, read_model
from snr_ray.lock import check_free, locked
from snr_ray.outputs import DONORS, SETTINGS, claim
from snr_ray.stages.denoising.cleaning import Cleaning
from snr_ray.stages.denoising.denoisejob import Job, Running
from snr_ray.stages.denoising.imagefiles import (
    DEVIATIONS,
    OWN_NAMES,
    Doubtful,
    Target,
    check_output_names,
    kept,
)
from snr_ray.stages.denoising.manifest import Manifest
from snr_ray.stages.denoising.retrylist import asked_for
from snr_ray.stages.denoising.room import bytes_per_value
from snr_ray.stages.denoising.swappermaker import LENT, SwapperMaker
from snr_ray.stages.job.connection import connected
from snr_ray.stages.job.outcome import Outcome

if TYPE_CHECKING:  # torch is slow to import, and a driver needs it for a few questions only
    from snr_ray.learning.checkpoint import TrainedModel

Array = npt.NDArray[np.float32]

FORMAT = 2
"""Version of what lies in an output folder, raised when it could not be continued."""
DETECT_IMAGES = 3
"""Images that --views detect looks at."""


def denoise(
    config: Config,
    *,
    model: str,
    images: str,
    out: Path | str | Folder,
    donor: str = "mean",
    samples: int = 0,
    inject: int | None = None,
    n_views: int | Literal["detect"] | None = None,
    doubtful: Doubtful = "copy",
    running: Running | None = None,
    overwrite: bool = False,
) -> Outcome:
    """Exchange the noise code of every image of a source.

    Args:
        config: `seed` (random donors, samples) and `images.white` and `images.window` are used; a
            window of the model stands in where there is none.
        model: model folder.
        images: SRC; read at full size, never resized. The failures.parquet of an earlier job means
            those of its images.
        out: output folder, also in a bucket.
        donor: "mean" (mean noise code), "random" (a random one of the donors in the model folder
            for each image, by hash of its id) or the path of an image or folder of donor images.
        samples: 0 decodes posterior means; N > 0 averages N posterior samples and writes their
            standard deviation.
        inject: None removes noise (clean donors); a view count injects its noise: one that the
            model was trained on, or any for a model of a range.
        n_views: view count of the images, for a model with model.physics (one that it was trained
            on) or model.unrolled (any); None leaves it to the noise code of each image, which knows
            those that the model was trained on, and finds each by itself for a model of a range.
            "detect" tries all on the first images: the one whose noise explains them best is taken
            for all of them.
        doubtful: what becomes of results that do not explain their inputs: `write` them, `copy` the
            inputs' pixels in their place, or `fail` the images.
        running: on what, and when to stop.
        overwrite: replace files of the same names.

    Raises:
        InputError: for a model, source, folder or setting the user can put right.
        Lost: if the output folder is not to be reached any more.
    """
    if samples < 0:
        raise InputError(f"--samples must not be negative, but got {samples}.")
    running = running or Running()
    trained = read_model(model)

    @functools.cache
    def network() -> "TrainedModel":
        from snr_ray.learning.checkpoint import hierarchical

        return hierarchical(trained)

    if not is_shipped(model):
        network()  # says what is wrong with it
    if n_views is not None:
        _check_views(trained, n_views, inject)
    check(
        inject is None or inject >= 1,
        f"--inject must be a view count of at least 1, but got {inject}; leave it out to remove "
        "noise.",
    )
    trained.check_noise(inject or 0)
    config = _as_trained(config, trained)
    folder = open_folder(out)
    asked = asked_for(images)
    source = asked.source
    check_output_names(source, samples=samples > 0)
    lenders = None if donor in LENT else _lenders(donor)
    pool = donor if lenders is None else _pool(network(), lenders, config, inject)
    told = _detect_views(network(), source, config) if n_views == "detect" else n_views
    _check_format(folder, overwrite=overwrite)
    identity = {
        "stage": "denoise",
        "format": FORMAT,
        "model": fingerprint(trained.weights),
        SETTINGS: trained.settings,
        "source": source.home,
        "donor": donor if lenders is None else lenders.identity,
        **({} if lenders is None else {DONORS: lenders.files()}),
        "samples": samples,
        "inject": inject,
        "n_views": n_views,
        "doubtful": doubtful,
        "seed": config.seed,
        "white": config.images.white,
        "window": config.images.window,
    }
    check_free(folder)
    claim(
        folder,
        identity,
        owned=OWN_NAMES[1:],
        overwrite=overwrite,
        inputs=source.folder,
        inputs_alone=source.alone,
    )
    with locked(folder, "denoise"):
        with kept(folder):
            rows = Manifest(folder)
            done = rows.resume(source, beside=DEVIATIONS if samples else "")
        job = Job(asked, folder, config.images, running, rows, done, samples)
        if job.n_left:
            injects = inject is not None
            options = {"samples": samples, "seed": config.seed, "inject": inject, "n_views": told}
            finds = not injects and told is None and trained.views is not None
            with connected(data=False):
                cleaning = Cleaning(
                    key=uuid.uuid4().hex,
                    source=source,
                    images=config.images,
                    target=Target(folder.claimed(), fingerprint(repr(identity)), injects, doubtful),
                    per_value=bytes_per_value(trained.config, told),
                    finds_over=trained.config.noise.angle_range if finds else None,
                )
                job.run(cleaning, SwapperMaker(trained, pool, options))
        else:
            job.tell_done()
        title = "Noise removed" if inject is None else f"Noise of {inject} views injected"
        return job.finish(title, trained, files_per_image=1 + (samples > 0))


def _check_format(out: Folder, *, overwrite: bool) -> None:
    """Raise InputError for a folder of an snr_ray that kept its rows in another way."""
    before: Any = None
    if out.exists(JOB) and not overwrite:
        with contextlib.suppress(ValueError, OSError):  # damaged or closed: the claim says so
            before = json.loads(out.read(JOB))
    if isinstance(before, dict) and before.get("stage") == "denoise":
        check(
            before.get("format") == FORMAT,
            f"{out} was written by another snr_ray, whose rows this one cannot continue; its "
            "results are whole as they are: give another --out, or --overwrite to do all anew.",
        )


def _check_views(trained: Knowledge, n_views: int | Literal["detect"], inject: int | None) -> None:
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


def _detect_views(trained: "TrainedModel", source: Source, config: Config) -> int:
    """The view count that explains the first readable images of a source best, said aloud.

    Raises:
        InputError: if they are not of one view count, or none can be read.
    """
    from snr_ray.network.views import explaining, find_views
    from snr_ray.noise.likelyviews import SMALLEST_SIDE

    found: dict[str, int] = {}
    decibels, reason = 0.0, ""
    for index in range(len(source.ids)):
        try:
            pictures = source.pictures(index, config.images)
            image = pictures[len(pictures) // 2].pixels
        except InputError as error:
            reason = reason or str(error)
            continue
        check(
            min(image.shape[1:]) >= SMALLEST_SIDE,
            f"--views detect needs images of at least {SMALLEST_SIDE} pixels a side, but "
            f"{source.ids[index]} has {image.shape[1]}x{image.shape[2]}; say how many there are.",
        )
        alone = image[None]
        explains = explaining(trained.model, trained.codes.mean(0), alone, trained.geometry)
        guess, over = trained.guess_views(alone), trained.config.noise.angle_range
        n_views = int(find_views(alone, explains, guess, angle_range=over)[0])
        found[source.ids[index]] = n_views
        decibels = float(explains(np.zeros(1, np.int64), n_views)[0])
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


def _as_trained(config: Config, trained: Knowledge) -> Config:
    """The config with the Hounsfield window of the model, where it names no other; said aloud."""
    window = trained.config.images.window
    if window is None or config.images.window is not None:
        return config
    print(f"denoise: CT slices are read in the model's window, {window[0]:g} to {window[1]:g} HU.")
    return configs.replace(config, {"images.window": list(window)})


def _lenders(donor: str) -> Source:
    """The images of --donor."""
    try:
        return open_source(donor)
    except InputError as error:
        raise InputError(
            f"--donor must be mean, random or images to borrow from: {error}"
        ) from None


def _pool(
    trained: "TrainedModel", lenders: Source, config: Config, inject: int | None
) -> list[Array]:
    """Noise codes of the images of a source, per level: [n_donors, C_noise, h, w].

    Raises:
        InputError: if an image cannot be read or differs in size where that matters, or noise is
            to be injected and it has none to lend.
    """
    from snr_ray.network.swap import noise_code

    codes = []
    for index in range(len(lenders.ids)):
        pixels = lenders.read(index, config.images).pixels
        check(
            inject is None or bool(trained.guess_views(pixels[None])[0]),
            f"--inject takes the noise codes of noisy donors, but {lenders.ids[index]} of "
            f"{lenders.name} looks clean; give others, or leave --donor out.",
        )
        codes.append([level.numpy() for level in noise_code(trained.model, pixels[None])])
    shapes = {tuple(level.shape for level in code) for code in codes}
    if len(shapes) > 1:
        raise InputError(
            "Donors of a model with spatial noise codes must have one size, but those of "
            f"{lenders.name} differ; give one donor or resize them."
        )
    return [np.concatenate(level) for level in zip(*codes, strict=True)]
