"""How long a job of many images will take, and what it needs: from rates measured here, or given.

Other machines are this one times their cores, which is said; a file of rates that `snr plan --out`
wrote on one of them is better.
"""

import dataclasses
import json
import math
import os
from pathlib import Path

from snr_ray.config import Config
from snr_ray.errors import check
from snr_ray.outputs import check_file, write_atomic
from snr_ray.stages.measuring.forecast import forecast_job, table
from snr_ray.stages.measuring.planrates import Stage, measure, read_rates


def plan(
    config: Config,
    *,
    stage: Stage = "denoise",
    model: str,
    images: int,
    size: int,
    n_views: int,
    nodes: int = 1,
    cores: int | None = None,
    gpus: int = 0,
    rates: Path | None = None,
    like: str | None = None,
    price: float | None = None,
    out: Path | None = None,
) -> int:
    """Print a forecast; returns the exit code.

    Args:
        config: `images.channels` is used, and all of images and noise by simulate.
        stage: what the job is to do.
        model: model folder or name, for the measurement of denoise.
        images: how many.
        size: height and width in pixels.
        n_views: view count of their noise.
        nodes: machines that work.
        cores: of each; None takes this machine's.
        gpus: of all machines together; needs `rates` with images_per_s_per_gpu.
        rates: JSON that an earlier plan wrote, possibly on another machine; None measures here.
        like: SRC whose images the measurement takes, over and over: how many bytes a result has
            depends on what it shows; None makes some of photographs.
        price: of a node for an hour, in any currency.
        out: where to write rates and forecast as JSON.

    Raises:
        InputError: for numbers below one, or rates that do not fit.
    """
    here = os.cpu_count() or 1
    cores = here if cores is None else cores
    for name, number in (("--images", images), ("--size", size), ("--nodes", nodes),
                         ("--cores", cores)):  # fmt: skip
        check(number >= 1, f"{name} must be at least 1, but got {number}.")
    check(8 <= size <= 4096, f"--size must be from 8 to 4096 pixels, but got {size}.")
    check(
        price is None or 0 <= price < math.inf,
        f"--price must be a number of 0 or more, but got {price}.",
    )
    check_file(out)
    check(gpus >= 0, f"--gpus must not be negative, but got {gpus}.")
    check(stage == "denoise" or not gpus, "simulate uses no GPUs; leave --gpus out.")
    check(
        rates is None or like is None,
        "--like is for a measurement, which --rates spares; leave one of them out.",
    )
    if rates is None:
        check(gpus == 0, "--gpus needs --rates FILE with images_per_s_per_gpu, measured on one.")
        print(
            f"plan: measuring {stage} of {size}x{size} images on this machine's {here} cores.",
            flush=True,
        )
        known = measure(config, stage=stage, model=model, size=size, n_views=n_views, like=like)
    else:
        known = read_rates(rates, stage, size, n_views, config.images.channels, gpus, model)
    forecast = forecast_job(known, images=images, nodes=nodes, cores=cores, gpus=gpus, price=price)
    print(table(known, forecast, measured=rates is None, cores=cores, nodes=nodes, here=here))
    if out:
        data = {"rates": dataclasses.asdict(known), "forecast": dataclasses.asdict(forecast)}
        write_atomic(out, json.dumps(data, indent=2) + "\n")
    return 0
