"""The flags of each stage of `snr`, and what they take."""

import argparse
from pathlib import Path
from typing import Any

from snr_ray import __version__
from snr_ray import configfile as configs
from snr_ray.address import local_path, without_secrets
from snr_ray.config import FILTERS
from snr_ray.usage import EXAMPLES, PURPOSE, SRC_HELP, USES

DEFAULT_MODEL = "any"
"""Serves images of any size and view count, and so is what `snr denoise` takes by itself."""
MODEL_HELP = "model folder (RUN/model), or the name of a model that comes with snr_ray"
MEASUREMENTS = ("radon", "simulate", "data", "train", "denoise", "sweep")


def parser() -> argparse.ArgumentParser:
    """What reads a command line of `snr`."""
    whole = argparse.ArgumentParser(
        prog="snr",
        description="Remove sparse-view CT streaks from image collections, on a laptop or a Ray "
        "cluster (RAY_ADDRESS).",
    )
    whole.add_argument("--version", action="version", version=f"snr_ray {__version__}")
    stages = whole.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for name, flags in (
        ("demo", _demo),
        ("simulate", _simulate),
        ("train", _train),
        ("sweep", _sweep),
        ("denoise", _denoise),
        ("evaluate", _evaluate),
        ("reconstruct", _reconstruct),
        ("bench", _bench),
        ("plan", _plan),
    ):
        flags(_stage(stages, name))
    return whole


def _stage(stages: Any, name: str) -> argparse.ArgumentParser:
    epilog = f"examples:\n  {EXAMPLES[name]}"
    if name not in ("demo", "bench", "plan", "reconstruct"):
        epilog += f"\n\n{SRC_HELP}"
    if name in ("denoise", "evaluate", "plan"):
        epilog += f"\n\nmodels for --model: a folder, or {', '.join(configs.shipped_models())}"
    configured = USES.get(name) != ()
    if configured:
        epilog += f"\n\npresets for --config: {', '.join(configs.preset_names())}"
    stage: argparse.ArgumentParser = stages.add_parser(
        name,
        help=PURPOSE[name],
        description=PURPOSE[name][0].upper() + PURPOSE[name][1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if not configured:
        stage.set_defaults(config=[], set=[])
        return stage
    stage.add_argument(
        "--config", metavar="NAME|FILE", action="append", default=[],
        help="preset or YAML file; may be given several times, later ones win",
    )  # fmt: skip
    stage.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[],
        help="one setting, such as --set train.steps=500; wins over --config",
    )  # fmt: skip
    return stage


def _demo(stage: argparse.ArgumentParser) -> None:
    _output(stage, type=_here, default=Path("demo"))


def _simulate(stage: argparse.ArgumentParser) -> None:
    _images(stage)
    _output(stage, type=_place, required=True)


def _train(stage: argparse.ArgumentParser) -> None:
    _images_or_data(stage)
    _output(stage, type=_place, required=True)
    add = stage.add_argument
    add(
        "--batch-size", metavar="N", type=int,
        help="batches of N images in place of train.batch_size, for a GPU to be busy: the rate and "
             "warm-up follow, and steps down to 1000, so that as many images are seen",
    )  # fmt: skip
    add(
        "--wait", metavar="MINUTES", type=float,
        help="wait at most so long for the processors it needs, also for machines to join; by "
             "default as long as it takes for those of the cluster to be free",
    )  # fmt: skip


def _sweep(stage: argparse.ArgumentParser) -> None:
    _images_or_data(stage)
    _output(stage, type=_place, required=True)
    add = stage.add_argument
    add("--trials", metavar="N", type=int, required=True,
        help="trials that are to finish, over all drivers of the study")  # fmt: skip
    add("--objective", metavar="swap|inject|seconds", action="append", default=[],
        help="what is looked for on validation images: swap PSNR (default), injection PSNR, or "
             "seconds to clean an image, which a trial measures while others may run beside it; "
             "may be given several times, for a Pareto front: best.yaml is the best by the first, "
             "and no trial is ended early")  # fmt: skip
    add("--at-most", metavar="NAME=NUMBER", action="append", default=[],
        help="bound on what objectives name, such as seconds=0.01: trials beyond it are never the "
             "best")  # fmt: skip
    add("--at-least", metavar="NAME=NUMBER", action="append", default=[],
        help="the same from below, such as inject=30")  # fmt: skip
    add("--confirm", metavar="SEEDS", type=int, default=0,
        help="when the trials have finished, train the best config and that as given with so many "
             "other seeds each, and say by how much it is better and how sure that is")  # fmt: skip
    add("--storage", metavar="URL",
        help="keep the study in this PostgreSQL instead of the journal in --out, so that several "
             "drivers, each with its own --out, share it; a password is best in PGPASSWORD or "
             "~/.pgpass; --overwrite leaves the study as it is")  # fmt: skip
    add("--study", metavar="NAME", default="sweep", help="name of the study in --storage")


def _denoise(stage: argparse.ArgumentParser) -> None:
    _images(stage)
    add = stage.add_argument
    add("--model", metavar="M", default=DEFAULT_MODEL,
        help=f"{MODEL_HELP}; default {DEFAULT_MODEL}")  # fmt: skip
    _output(stage, type=_place, required=True)
    add("--donor", metavar="mean|random|PATH", default="mean",
        help="whose noise code to take: the mean of the donors kept with the model (default), a "
             "random one for each image, or that of an image or folder of images")  # fmt: skip
    add("--samples", metavar="N", type=int, default=0,
        help="average N posterior samples and write their standard deviation; 0 (default) decodes "
             "the posterior mean")  # fmt: skip
    add("--inject", metavar="N_VIEWS", type=int, help="inject the noise of so many views instead")
    add(
        "--views",
        metavar="N_VIEWS|detect",
        type=_views,
        help="view count of the images, also one that the model was not trained on (but for a "
        "model with model.physics), or detect, which tries all on a few images; by default the "
        "noise code of each image says which of those that the model was trained on, or, of a "
        "model of a range such as any and ct, its spectrum does",
    )
    add("--doubtful", choices=("write", "copy", "fail"), default="copy",
        help="what becomes of a result that does not explain its image: write it all the same, "
             "copy the image's pixels in its place (default), or let the image fail")  # fmt: skip
    add("--gpus", metavar="N|none", type=_gpus,
        help="GPUs to use; by default all that Ray has; none: cores alone")  # fmt: skip
    add("--max-failures", metavar="N|P%", help="end the job when more images than that failed")
    add("--progress", choices=("text", "json"), default="text",
        help="json: one object a line on standard error, every 5 seconds")  # fmt: skip
    add("--stall", metavar="MINUTES", type=float, default=30.0,
        help="end a job that has not finished anything for so long (default 30)")  # fmt: skip


def _evaluate(stage: argparse.ArgumentParser) -> None:
    _images(stage)
    add = stage.add_argument
    add("--model", metavar="M", required=True, help=MODEL_HELP)
    _output(stage, type=_place, required=True)
    add("--baselines", metavar="tv,tvrec,...",
        help="out of tv, tvrec, sart and lmmse, comma-separated; '' for none; default all but "
             "tvrec, total variation reconstruction, which takes seconds an image")  # fmt: skip
    add("--beside", metavar="M", action="append", default=[],
        help="another model folder for the same table, such as a U-Net's; may be given several "
             "times, and models that differ only by their seed share a row")  # fmt: skip
    add("--limit", metavar="N", type=int, help="score at most N test images")
    add("--size", metavar="N", type=int,
        help="height and width of the images in pixels; default the model's own")  # fmt: skip
    add("--views", metavar="K,K,K", type=_counts, default=(),
        help="view counts of the noise; default the model's own. At another size or view count "
             "images are cleaned blind, told it, and with the count found by itself")  # fmt: skip
    add("--split", choices=("test", "all"), default="test",
        help="all: every image, of a source that no model was trained on")  # fmt: skip


def _reconstruct(stage: argparse.ArgumentParser) -> None:
    _output(stage, type=_place, required=True)
    add = stage.add_argument
    add("--sinogram", metavar="FILE[#NAME]", required=True,
        help="HDF5 (exchange/data, or the data set NAME) or NPY: [views, bins] or [views, slices, "
             "bins]; photon counts where there are flats, else line integrals")  # fmt: skip
    add("--flats", metavar="FILE[#NAME]", default="",
        help="fields without a sample; by default those in the HDF5 file")  # fmt: skip
    add("--darks", metavar="FILE[#NAME]", default="", help="fields without a beam, the same")
    add("--center", metavar="BIN", type=float,
        help="bin of the axis of rotation, from 0; default the middle of the detector")  # fmt: skip
    add("--every", metavar="K", type=int, default=1, help="take every K-th view only")
    add("--bin", metavar="K", type=int, default=1,
        help="make one bin of K neighbours, for smaller images")  # fmt: skip
    add("--size", metavar="N", type=int,
        help="height and width of the images in pixels; default the bins of a view")  # fmt: skip
    add("--filter", choices=FILTERS, default="ramp", help="of the back projection")


def _bench(stage: argparse.ArgumentParser) -> None:
    add = stage.add_argument
    add("name", choices=MEASUREMENTS)
    add(
        "--out",
        metavar="FILE",
        type=_here,
        help="write the JSON here, and a plot of what was measured over time beside it",
    )


def _plan(stage: argparse.ArgumentParser) -> None:
    add = stage.add_argument
    add("--of", choices=("denoise", "simulate"), default="denoise", help="stage of the job")
    add("--images", metavar="N", type=_count, required=True, help="how many; 1e8 is taken too")
    add("--size", metavar="PX", type=int, required=True, help="their height and width")
    add("--views", metavar="K", type=int, required=True, help="view count of their noise")
    add("--model", metavar="M", default="places64", help="model of denoise (default places64)")
    add("--nodes", metavar="N", type=int, default=1, help="machines that work (default 1)")
    add("--cores", metavar="N", type=int, help="cores of each (default: those of this machine)")
    add("--gpus", metavar="N", type=int, default=0, help="GPUs of all of them; needs --rates")
    add("--rates", metavar="FILE", type=local_path,
        help="rates that an earlier `snr plan --out` wrote, also on another machine; without, a "
             "small job is measured here")  # fmt: skip
    add("--like", metavar="SRC",
        help="measure with these images: how many bytes results have depends on what they show "
             "(default: photographs)")  # fmt: skip
    add("--price", metavar="P", type=float, help="price of a node for an hour")
    add("--out", metavar="FILE", type=_here, help="write rates and forecast here as JSON")


def _images(stage: argparse.ArgumentParser) -> None:
    stage.add_argument("--images", metavar="SRC", required=True, help="images to read")


def _images_or_data(stage: argparse.ArgumentParser) -> None:
    group = stage.add_mutually_exclusive_group(required=True)
    group.add_argument("--images", metavar="SRC", help="clean images; noise is made on the way")
    group.add_argument("--data", metavar="DIR", type=_place, help="folder made by `snr simulate`")


def _output(stage: argparse.ArgumentParser, **settings: Any) -> None:
    stage.add_argument(
        "--out", metavar="DIR", **settings,
        help="output folder; the same command continues what was interrupted",
    )  # fmt: skip
    stage.add_argument(
        "--overwrite", action="store_true", help="replace what this stage wrote there before"
    )


def _count(text: str) -> int:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 < number < 1e15 or number != int(number):
        raise argparse.ArgumentTypeError(f"takes a whole number such as 1e8, but got {text!r}")
    return int(number)


def _place(text: str) -> Path | str:
    """A path; a URI stays as it was typed, as a Path would lose one of its slashes."""
    return text if ":/" in text else local_path(text)


def _here(text: str) -> Path:
    """The same of what cannot be in a bucket."""
    if ":/" in text:
        raise argparse.ArgumentTypeError(
            f"takes a path on this machine, but got {without_secrets(text)!r}; copy the result"
        )
    return local_path(text)


def _counts(text: str) -> tuple[int, ...]:
    if all(part.strip().isdecimal() for part in text.split(",")):
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    raise argparse.ArgumentTypeError(f"takes view counts such as 80,40,20, but got {text!r}")


def _views(text: str) -> int | str:
    if text == "detect":
        return text
    if text.isdecimal():
        return int(text)
    raise argparse.ArgumentTypeError(f"takes a view count or detect, but got {text!r}")


def _gpus(text: str) -> int:
    if text == "none" or text.isdecimal():
        return 0 if text == "none" else int(text)
    raise argparse.ArgumentTypeError(f"takes a number of GPUs or none, but got {text!r}")
