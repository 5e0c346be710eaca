"""The front door: `snr STAGE ...` runs a stage and tells how it ended. The files in jobs/ are the
same doors for a Ray cluster."""

import argparse
import dataclasses
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from snr_ray import configfile as configs
from snr_ray.address import open_folder, without_secrets
from snr_ray.arguments import parser
from snr_ray.config import Config
from snr_ray.environment import prepare_environment
from snr_ray.errors import InputError, Lost, RunError
from snr_ray.usage import USES

if TYPE_CHECKING:
    from snr_ray.stages.job.outcome import Outcome


def main(argv: list[str] | None = None) -> int:
    """Run one stage. Returns 0 done, 2 wrong usage or input, 3 some images failed, 1 else; 143
    after SIGTERM."""
    args = parser().parse_args(argv)
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
        if args.stage in USES:
            configs.check_used(args.stage, USES[args.stage], args.set)
        if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:  # the entrypoint of a job
            from snr_ray.stages.job.submitted import check_paths

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
    except SystemExit as ended:
        if ended.code != signal.SIGTERM:  # which Ray answers itself while it starts
            raise
        print(f"snr {args.stage}: interrupted; the same command continues.", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print(f"\nsnr {args.stage}: interrupted; the same command continues.", file=sys.stderr)
        return 143 if terminated.is_set() else 1
    finally:
        if main_thread:
            signal.signal(signal.SIGTERM, stops)


def _run(args: argparse.Namespace, config: Config) -> int:
    if args.stage in CODES:
        return CODES[args.stage](args, config)
    outcome, what = OUTCOMES[args.stage](args, config)
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


# Stages are imported where they run: `snr --help` must not wait for ray and torch.


def _demo(args: argparse.Namespace, config: Config) -> int:
    from snr_ray.stages.demo import demo

    return demo(config, out=args.out, overwrite=args.overwrite)


def _bench(args: argparse.Namespace, config: Config) -> int:
    from snr_ray.stages.measuring.bench import bench

    return bench(config, args.name, out=args.out)


def _plan(args: argparse.Namespace, config: Config) -> int:
    from snr_ray.stages.measuring.plan import plan

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


def _simulate(args: argparse.Namespace, config: Config) -> "tuple[Outcome, str]":
    from snr_ray.stages.simulation.simulate import simulate

    outcome = simulate(config, images=args.images, out=args.out, overwrite=args.overwrite)
    return outcome, f"{outcome.images:,} images in {outcome.out}"


def _train(args: argparse.Namespace, config: Config) -> "tuple[Outcome, str]":
    from snr_ray.learning.recipe import with_batch_size
    from snr_ray.stages.simulation.dataset import Origin
    from snr_ray.stages.training.train import train

    if args.batch_size is not None:
        config = with_batch_size(config, args.batch_size)
    origin = Origin(images=args.images, data=args.data)
    outcome = train(config, origin=origin, out=args.out, wait=args.wait, overwrite=args.overwrite)
    return outcome, f"{outcome.images:,} steps; the model is {outcome.out}/model"


def _sweep(args: argparse.Namespace, config: Config) -> "tuple[Outcome, str]":
    from snr_ray.stages.simulation.dataset import Origin
    from snr_ray.stages.sweeping.objectives import read_goals
    from snr_ray.stages.sweeping.sweep import sweep

    outcome = sweep(
        config,
        origin=Origin(images=args.images, data=args.data),
        out=args.out,
        trials=args.trials,
        goals=read_goals(args.objective, args.at_most, args.at_least),
        storage=args.storage,
        name=args.study,
        seeds=args.confirm,
        overwrite=args.overwrite,
    )
    if outcome.failed:
        print(f"sweep: {outcome.failed} trials more failed; why was told above.", file=sys.stderr)
    # What was asked for is there: trials that fail are replaced by others.
    done = dataclasses.replace(outcome, failed=0)
    return done, f"{outcome.images:,} trials; the best config is {outcome.out}/best.yaml"


def _denoise(args: argparse.Namespace, config: Config) -> "tuple[Outcome, str]":
    from snr_ray.stages.denoising.denoise import denoise
    from snr_ray.stages.denoising.denoisejob import Running

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
        overwrite=args.overwrite,
    )
    what = f"{outcome.images:,} images in {outcome.out}; look at {outcome.out}/report.html"
    return outcome, what


def _evaluate(args: argparse.Namespace, config: Config) -> "tuple[Outcome, str]":
    from snr_ray.scoring.methods import QUICK_BASELINES
    from snr_ray.stages.evaluation.evaluate import evaluate

    asked = QUICK_BASELINES if args.baselines is None else args.baselines.split(",")
    outcome = evaluate(
        config,
        model=args.model,
        images=args.images,
        out=args.out,
        baselines=tuple(dict.fromkeys(name.strip() for name in asked if name.strip())),
        beside=tuple(args.beside),
        limit=args.limit,
        size=args.size,
        n_views=args.views,
        split=args.split,
        overwrite=args.overwrite,
    )
    print(open_folder(outcome.out).read("metrics.md").decode())
    return outcome, f"{outcome.images:,} images scored; look at {outcome.out}/grid.png"


def _reconstruct(args: argparse.Namespace, config: Config) -> "tuple[Outcome, str]":
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
        overwrite=args.overwrite,
    )
    return outcome, f"{outcome.images:,} slices in {outcome.out}"


CODES: dict[str, Callable[[argparse.Namespace, Config], int]] = {
    "demo": _demo,
    "bench": _bench,
    "plan": _plan,
}
"""Stages that end with an exit code of their own."""
OUTCOMES: "dict[str, Callable[[argparse.Namespace, Config], tuple[Outcome, str]]]" = {
    "simulate": _simulate,
    "train": _train,
    "sweep": _sweep,
    "denoise": _denoise,
    "evaluate": _evaluate,
    "reconstruct": _reconstruct,
}
"""Stages that tell what they did to how many images."""


if __name__ == "__main__":
    sys.exit(main())
