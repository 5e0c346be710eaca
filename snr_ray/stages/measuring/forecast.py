"""What a job of many images will take, by the rates of one image, and how that is said."""

from dataclasses import dataclass

from snr_ray.stages.denoising.denoisejob import images_per_block
from snr_ray.stages.measuring.planrates import Rates


@dataclass(frozen=True)
class Forecast:
    """What a job will take."""

    hours: float
    head_bytes: float
    node_bytes: float
    """Of each node, beside its operating system."""
    store_bytes: float
    """Object store of each node: blocks under way."""
    output_bytes: float
    price: float | None


def forecast_job(
    rates: Rates, *, images: int, nodes: int, cores: int, gpus: int, price: float | None
) -> Forecast:
    """What `images` images take on `nodes` machines of `cores` cores each and `gpus` GPUs in all.

    With GPUs the cores only read and write: the GPUs' own rate, measured so, is taken.
    """
    if gpus:
        assert rates.images_per_s_per_gpu is not None
        rate = gpus * rates.images_per_s_per_gpu
    else:
        rate = nodes * cores * rates.images_per_s_per_core
    hours = (rates.start_s + images / rate) / 3600
    values = rates.channels * rates.size**2
    block = 4 * values * images_per_block(values)  # of a task, as float32
    return Forecast(
        hours=hours,
        head_bytes=rates.driver_bytes,
        node_bytes=cores * rates.worker_bytes + rates.shared_bytes,
        store_bytes=2.0 * cores * block,
        output_bytes=images * rates.output_bytes,
        price=None if price is None else price * nodes * hours,
    )


def table(
    rates: Rates, forecast: Forecast, *, measured: bool, cores: int, nodes: int, here: int
) -> str:
    """The forecast as text, each line with where its figure is from."""
    source = "measured here" if measured else "given"
    kind = "8-bit PNG" if rates.stage == "denoise" else "Parquet"
    same = measured and (cores, nodes) == (here, 1)
    scaled = "measured here" if same else f"{source}, times {nodes} x {cores} cores"
    lines = [
        ("images/s of one core", f"{rates.images_per_s_per_core:,.2f}", source),
        ("start", f"{rates.start_s:,.0f} s", source),
        (
            "hours",
            f"{forecast.hours:,.{2 if forecast.hours >= 1 else 4}f}",
            f"extrapolated: {scaled}",
        ),
        ("memory of the head", _bytes(forecast.head_bytes), source),
        ("memory of a node's workers", _bytes(forecast.node_bytes), f"{source}, times cores"),
        ("object store of a node", _bytes(forecast.store_bytes), "reckoned: two blocks a core"),
        ("output", _bytes(forecast.output_bytes), f"extrapolated: {kind}, {source}"),
    ]
    if rates.images_per_s_per_gpu:
        rate = f"{rates.images_per_s_per_gpu:,.1f}"
        lines.insert(1, ("images/s of one GPU", rate, "given"))
    if forecast.price is not None:
        lines.append(("price", f"{forecast.price:,.2f}", "given, times hours"))
    widths = [max(len(line[k]) for line in lines) for k in (0, 1)]
    return "\n".join(f"{a:{widths[0]}}  {b:>{widths[1]}}  {c}" for a, b, c in lines)


def _bytes(number: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.3g} TB"
