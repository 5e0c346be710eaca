"""The command line: `snr <stage> ...`. The files in jobs/ are the same doors for a Ray cluster."""

import argparse
import os
import secrets
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

from snr_ray import __version__
from snr_ray import configfile as configs
from snr_ray.address import open_folder, without_secrets
from snr_ray.config import FILTERS, Config, InputError, Lost, RunError

SRC_HELP = """SRC is one of
  glyphs              letters A to J in matplotlib's fonts, made here
  photos              crops of scikit-image's photographs
  notmnist[:PATH]     notMNIST_small: the tar.gz, its folder, or downloaded
  cifar10[:PATH]      CIFAR-10: Parquet files, a folder, or downloaded
  places365[:PATH]    Places365: a folder, or downloaded
  PATH, glob or URI   a folder of images (png jpg tif bmp webp npy dcm nii zarr)
                      or of Parquet files; s3://, gs:// and file:// work; #COLUMN picks
                      a Parquet column"""

EXAMPLES = {
    "demo": "snr demo --out demo",
    "simulate": """snr simulate --images glyphs --out data
  snr simulate --config cifar10 --images cifar10:cifar10/ --out data
  snr simulate --config places64 --images 's3://bucket/photos?region=eu-west-1' --out data""",
    "train": """snr train --images glyphs --out run
  snr train --config notmnist --images notmnist:notMNIST_small.tar.gz --out run
  snr train --config notmnist --config unet --data data --out unet
  snr train --config notmnist --images scans/ --out tuned --set train.start=notmnist
  snr train --config places64 --images photos/ --out run --batch-size 128 --set train.use_gpu=true
  snr train --config notmnist --config seed --data data --out run-seed --set train.num_workers=2
  MLFLOW_TRACKING_URI=sqlite:///mlflow.db snr train --images glyphs --out run""",
    "sweep": """snr sweep --images glyphs --out sweep --trials 20
  snr train --config sweep/best.yaml --images glyphs --out run
  snr sweep --images glyphs --out front --trials 40 --objective swap --objective inject
  snr sweep --images glyphs --out sweep --trials 20 --confirm 3
  snr sweep --images glyphs --out quick --trials 40 --at-most seconds=0.01
  snr sweep --images glyphs --out sweep-a --trials 90 --storage postgresql://user@host/optuna
  optuna-dashboard sweep/study.journal
  optuna-dashboard postgresql+psycopg://user@host/optuna""",
    "denoise": """snr denoise --images scans/ --out cleaned --views 60
  snr denoise --model ct --images series/ --out cleaned --views detect
  snr denoise --model places64 --images scans/ --out cleaned
  snr denoise --model run/model --images scans/ --out cleaned --views 30
  snr denoise --model run/model --images scans/ --out cleaned --views detect
  snr denoise --model run/model --images 'data/test#noisy_20' --out cleaned
  snr denoise --model run/model --images photos/ --out noisy --inject 20
  snr denoise --model run/model --images scans/ --out cleaned --donor random --samples 16""",
    "evaluate": """snr evaluate --model run/model --images glyphs --out report
  snr evaluate --model notmnist --images notmnist:notMNIST.tar.gz --out report --limit 200
  snr evaluate --model run/model --beside unet/model --images glyphs --out report
  snr evaluate --model places64 --images slices/ --out report --size 128 --views 80,40,20 \\
      --split all --baselines tvrec --set images.window=[-1000,1000]""",
    "reconstruct": """snr reconstruct --sinogram scan.h5 --center 295.5 --out slices
  snr reconstruct --sinogram scan.h5 --center 295.5 --every 4 --bin 4 --out slices45
  snr reconstruct --sinogram sinogram.npy --flats flats.npy --darks darks.npy --out slices
  snr denoise --model places64 --images slices45/ --out cleaned --views 45 \\
      --set images.white=0.03""",
    "bench": """snr bench radon
  snr bench train --out train.json
  snr bench simulate --set images.size=32 --set images.limit=1000000 --out simulate.json""",
}


EXAMPLES["plan"] = """snr plan --images 1e6 --size 128 --views 30 --model places64
  snr plan --images 1e8 --size 512 --views 90 --nodes 20 --cores 32 --price 1.1
  snr plan --images 1e6 --size 512 --views 160 --model ct --like 'slices/a*.dcm'
  snr plan --images 1e8 --size 128 --views 30 --rates there.json --gpus 8 --nodes 4"""

DEFAULT_MODEL = "any"
"""Serves images of any size and view count, and so is what `snr denoise` takes by itself."""

MEASUREMENTS = ("radon", "simulate", "data", "train", "denoise", "sweep")

PURPOSE = {
    "demo": "simulate, train, denoise and evaluate on rendered letters; about 5 minutes on 2 cores",
    "simulate": "make clean and noisy versions of images: a data folder of Parquet shards",
    "train": "train a model; the same command again continues a killed run",
    "sweep": "search the noise/content split and the loss weights with Optuna",
    "denoise": "remove (or inject) noise in any number of images",
    "evaluate": "score a model on test images beside baselines: tables and pictures",
    "reconstruct": "make images of a measured parallel-beam sinogram by filtered back projection",
    "bench": "measure the parts on this machine",
    "plan": "forecast hours, memory and bytes of a job of denoise or simulate",
}


def main(argv: list[str] | None = None) -> int:
    """Run one stage. Returns 0 done, 2 wrong usage or input, 3 some images failed, 1 else; 143
    after SIGTERM."""
    args = _parser().parse_args(argv)
    prepare_environment()
    main_thread = threading.current_thread() is threading.main_thread()
    terminated = threading.Event()

    def terminate(*_: object) -> None:
        """SIGTERM, as Slurm, Docker and Kubernetes send it: an interruption like Ctrl-C."""
        # An exception of another class would not do: Ray raises its own where it was waiting.
        terminated.set()
        raise KeyboardInterrupt

    stops = signal.signal(signal.SIGTERM, terminate) if main_thread else None
    try:
        presets = ["demo", *args.config] if args.stage == "demo" else args.config
        config = configs.load(presets, args.set)
        if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:  # the entrypoint of a job
            from snr_ray.stages.submitted import check_paths

            check_paths(args, config)
        return _run(args, config)
    except InputError as error:
        print(f"snr {args.stage}: {without_secrets(str(error))}", file=sys.stderr)
        return 2
    except Lost as error:
        print(f"snr {args.stage}: {error}; the same command continues.", file=sys.stderr)
        return 1
    except RunError as error:
        print(f"snr {args.stage}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nsnr {args.stage}: interrupted; the same command continues.", file=sys.stderr)
        return 143 if terminated.is_set() else 1
    finally:
        if main_thread:
            signal.signal(signal.SIGTERM, stops)


def prepare_environment() -> None:
    """Settings that Ray and torch read when they are imported; what the user has set stays."""
    # torch starts a thread per core in every process otherwise; workers are told their share.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Else a process of its own reports to the makers of Ray.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A thread of Ray Data that prefetches may outlive the stage that asked for it; without this it
    # starts another Ray, which ends the process when it goes.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    # A node that is cut off is given up after 25 seconds instead of 7 minutes.
    os.environ.setdefault("RAY_grpc_client_keepalive_time_ms", "15000")
    os.environ.setdefault("RAY_grpc_client_keepalive_timeout_ms", "10000")
    address = os.environ.get("RAY_ADDRESS", "")
    if address in ("", "local"):
        # Whoever reaches a Ray runs code: a local one stays on loopback, which Ray has no other
        # option for, and asks for a token of this process's own, which leaves no file behind.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        if "RAY_AUTH_MODE" not in os.environ:
            os.environ["RAY_AUTH_MODE"] = "token"
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    elif _on_loopback_only(address):  # else Ray asks this machine's other address instead
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


def _on_loopback_only(address: str) -> bool:
    """Whether a cluster at HOST:PORT answers to this machine alone, as cluster/local.sh's does."""
    host, _, port = address.rpartition(":")
    if not (port.isdecimal() and (host == "localhost" or host.startswith("127."))):
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # of no one; nothing is sent
            others_see = probe.getsockname()[0]
        except OSError:  # no network
            return True
    return _answers(host, int(port)) and not _answers(others_see, int(port))


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError:
        return False
    return True


def _run(args: argparse.Namespace, config: Config) -> int:
    # Stages are imported where they run: `snr --help` must not wait for ray and torch.
    options: dict[str, Any] = {"overwrite": args.overwrite} if "overwrite" in args else {}
    if args.stage == "demo":
        from snr_ray.stages.demo import demo

        return demo(config, out=args.out, **options)
    if args.stage == "bench":
        from snr_ray.stages.bench import bench

        return bench(config, args.name, out=args.out)
    if args.stage == "plan":
        from snr_ray.stages.plan import plan

        return plan(
            config,
            stage=args.of,
            model=args.model,
            images=args.images,
            size=args.size,
            n_views=args.views,
            nodes=args.nodes,
            cores=args.cores,
            gpus=args.gpus,
            rates=args.rates,
            like=args.like,
            price=args.price,
            out=args.out,
        )
    if args.stage == "simulate":
        from snr_ray.stages.simulate import simulate

        outcome = simulate(config, images=args.images, out=args.out, **options)
        what = f"{outcome.images:,} images in {outcome.out}"
    elif args.stage == "denoise":
        from snr_ray.stages.denoise import denoise
        from snr_ray.stages.denoisejob import Running

        outcome = denoise(
            config,
            model=args.model,
            images=args.images,
            out=args.out,
            donor=args.donor,
            samples=args.samples,
            inject=args.inject,
            n_views=args.views,
            doubtful=args.doubtful,
            running=Running(
                gpus=args.gpus,
                max_failures=args.max_failures,
                progress=args.progress,
                stall_minutes=args.stall,
            ),
            **options,
        )
        what = f"{outcome.images:,} images in {outcome.out}; look at {outcome.out}/report.html"
    elif args.stage == "reconstruct":
        from snr_ray.stages.reconstruct import reconstruct

        outcome = reconstruct(
            sinogram=args.sinogram,
            out=args.out,
            flats=args.flats,
            darks=args.darks,
            center=args.center,
            every=args.every,
            together=args.bin,
            size=args.size,
            filter=args.filter,
            **options,
        )
        what = f"{outcome.images:,} slices in {outcome.out}"
    elif args.stage == "evaluate":
        from snr_ray.scoring.methods import QUICK_BASELINES
        from snr_ray.stages.evaluate import evaluate

        asked = QUICK_BASELINES if args.baselines is None else args.baselines.split(",")
        names = tuple(dict.fromkeys(name.strip() for name in asked if name.strip()))
        outcome = evaluate(
            config,
            model=args.model,
            images=args.images,
            out=args.out,
            baselines=names,
            beside=tuple(args.beside),
            limit=args.limit,
            size=args.size,
            n_views=args.views,
            split=args.split,
            **options,
        )
        print(open_folder(outcome.out).read("metrics.md").decode())
        what = f"{outcome.images:,} images scored; look at {outcome.out}/grid.png"
    else:
        from snr_ray.stages.dataset import Origin

        origin = Origin(images=args.images, data=args.data)
        if args.stage == "train":
            from snr_ray.learning.recipe import with_batch_size
            from snr_ray.stages.train import train

            if args.batch_size is not None:
                config = with_batch_size(config, args.batch_size)
            outcome = train(config, origin=origin, out=args.out, wait=args.wait, **options)
            what = f"{outcome.images:,} steps; the model is {outcome.out}/model"
        else:
            from snr_ray.stages.objectives import read_goals
            from snr_ray.stages.sweep import sweep

            outcome = sweep(
                config,
                origin=origin,
                out=args.out,
                trials=args.trials,
                goals=read_goals(args.objective, args.at_most, args.at_least),
                storage=args.storage,
                name=args.study,
                seeds=args.confirm,
                **options,
            )
            what = f"{outcome.images:,} trials; the best config is {outcome.out}/best.yaml"
    print(f"{args.stage}: {what}")
    if outcome.failed:
        print(
            f"{args.stage}: {outcome.failed:,} images failed; their reasons are in "
            f"{outcome.out}/failures.parquet",
            file=sys.stderr,
        )
    if outcome.doubtful:
        print(
            f"{args.stage}: {outcome.doubtful:,} images are doubtful: their results do not explain "
            "them; `status` in the manifest says which.",
            file=sys.stderr,
        )
    return 3 if outcome.failed or outcome.doubtful else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="snr",
        description="Remove sparse-view CT streaks from image collections, on a laptop or a Ray "
        "cluster (RAY_ADDRESS).",
    )
    parser.add_argument("--version", action="version", version=f"snr_ray {__version__}")
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    parsers = {name: _stage(stages, name) for name in PURPOSE}
    for name in ("simulate", "denoise", "evaluate"):
        parsers[name].add_argument("--images", metavar="SRC", required=True, help="images to read")
    for name in ("train", "sweep"):
        group = parsers[name].add_mutually_exclusive_group(required=True)
        group.add_argument("--images", metavar="SRC", help="clean images; noise is made on the way")
        group.add_argument(
            "--data", metavar="DIR", type=_place, help="folder made by `snr simulate`"
        )
    for name in ("denoise", "evaluate"):
        parsers[name].add_argument(
            "--model",
            metavar="M",
            required=name == "evaluate",
            default=DEFAULT_MODEL if name == "denoise" else None,
            help="model folder (RUN/model), or the name of a model that comes with snr_ray"
            + (f"; default {DEFAULT_MODEL}" if name == "denoise" else ""),
        )
    for name, parser_ in parsers.items():
        if name == "bench":
            parser_.add_argument("name", choices=MEASUREMENTS)
            parser_.add_argument(
                "--out",
                metavar="FILE",
                type=_here,
                help="write the JSON here, and a plot of what was measured over time beside it",
            )
            continue
        if name == "plan":
            _plan_options(parser_)
            continue
        default = Path("demo") if name == "demo" else None
        parser_.add_argument(
            "--out", metavar="DIR", type=_here if default else _place, default=default,
            required=default is None,
            help="output folder; the same command continues what was interrupted",
        )  # fmt: skip
        parser_.add_argument(
            "--overwrite", action="store_true", help="replace what this stage wrote there before"
        )
    add = parsers["sweep"].add_argument
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
    parsers["train"].add_argument(
        "--batch-size", metavar="N", type=int,
        help="batches of N images in place of train.batch_size, for a GPU to be busy: the rate and "
             "warm-up follow, and steps down to 1000, so that as many images are seen",
    )  # fmt: skip
    parsers["train"].add_argument(
        "--wait", metavar="MINUTES", type=float,
        help="wait at most so long for the processors it needs, also for machines to join; by "
             "default as long as it takes for those of the cluster to be free",
    )  # fmt: skip
    add = parsers["denoise"].add_argument
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
        "noise code of each image says which of those that the model was trained on",
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
    add = parsers["reconstruct"].add_argument
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
    add = parsers["evaluate"].add_argument
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
    return parser


def _plan_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--of", choices=("denoise", "simulate"), default="denoise", help="stage of the job")
    add("--images", metavar="N", type=_count, required=True, help="how many; 1e8 is taken too")
    add("--size", metavar="PX", type=int, required=True, help="their height and width")
    add("--views", metavar="K", type=int, required=True, help="view count of their noise")
    add("--model", metavar="M", default="places64", help="model of denoise (default places64)")
    add("--nodes", metavar="N", type=int, default=1, help="machines that work (default 1)")
    add("--cores", metavar="N", type=int, help="cores of each (default: those of this machine)")
    add("--gpus", metavar="N", type=int, default=0, help="GPUs of all of them; needs --rates")
    add("--rates", metavar="FILE", type=Path,
        help="rates that an earlier `snr plan --out` wrote, also on another machine; without, a "
             "small job is measured here")  # fmt: skip
    add("--like", metavar="SRC",
        help="measure with these images: how many bytes results have depends on what they show "
             "(default: photographs)")  # fmt: skip
    add("--price", metavar="P", type=float, help="price of a node for an hour")
    add("--out", metavar="FILE", type=_here, help="write rates and forecast here as JSON")


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
    return text if ":/" in text else Path(text)


def _here(text: str) -> Path:
    """The same of what cannot be in a bucket."""
    if ":/" in text:
        raise argparse.ArgumentTypeError(
            f"takes a path on this machine, but got {without_secrets(text)!r}; copy the result"
        )
    return Path(text)


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


def _stage(stages: Any, name: str) -> argparse.ArgumentParser:
    epilog = f"examples:\n  {EXAMPLES[name]}"
    if name not in ("demo", "bench", "plan", "reconstruct"):
        epilog += f"\n\n{SRC_HELP}"
    if name in ("denoise", "evaluate", "plan"):
        epilog += f"\n\nmodels for --model: a folder, or {', '.join(configs.shipped_models())}"
    epilog += f"\n\npresets for --config: {', '.join(configs.preset_names())}"
    parser: argparse.ArgumentParser = stages.add_parser(
        name,
        help=PURPOSE[name],
        description=PURPOSE[name][0].upper() + PURPOSE[name][1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", metavar="NAME|FILE", action="append", default=[],
        help="preset or YAML file; may be given several times, later ones win",
    )  # fmt: skip
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[],
        help="one setting, such as --set train.steps=500; wins over --config",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
