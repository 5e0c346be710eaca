"""Results to look at: the picture grid and tables of an evaluation, the page of a denoising job."""

import base64
import functools
import html
import io
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from snr_ray.config import ImagesConfig
from snr_ray.errors import InputError
from snr_ray.folder import Folder
from snr_ray.images.collection import Source, Texts
from snr_ray.images.formats import open_file
from snr_ray.images.zarrfolder import contents

Array = npt.NDArray[np.float32]

GRID_COLUMNS = (
    "noisy",
    "reconstruction\nof noisy",
    "clean",
    "reconstruction\nof clean",
    "noise removed",
    "noise injected",
    "true noisy",
)
PAGE_FAILURES = 100_000
"""Failed images that a page looks at."""


def grid(
    rows: list[list[Array]],
    labels: list[str],
    path: Path,
    columns: tuple[str, ...] = GRID_COLUMNS,
) -> None:
    """Draw images [C, H, W], a row for each picture; by default the original figure of seven.

    Noisy images are clipped to [0, 1] for display only.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.35 * len(columns) + 0.6, 1.38 * len(rows) + 0.45))
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            axis = axes[row][column]
            shown = np.moveaxis(np.clip(image, 0, 1), 0, 2)
            axis.imshow(shown.squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            if row == 0:
                axis.set_title(columns[column], fontsize=8)
        axes[row][0].set_ylabel(labels[row], fontsize=8)
    figure.subplots_adjust(0.035, 0.01, 0.995, 1 - 0.42 / figure.get_figheight(), 0.04, 0.04)
    FigureCanvasAgg(figure).print_png(path)


def evaluation_table(metrics: dict[str, Any]) -> str:
    """metrics.json as a Markdown page."""
    results = metrics["results"]
    blind = (
        "The model sees the linear estimate for the given view count beside the image."
        if metrics["physics"]
        else "The model is blind to the view count."
    )
    of = "the test split" if metrics.get("split", "test") == "test" else "the source, all of it"
    from snr_ray.scoring.cases import TASKS  # needs torch, which the page of a job does without

    lines = [
        f"# {metrics['model']} on {metrics['source']}",
        "",
        f"{metrics['images']} images of {of}. PSNR in dB / SSIM, mean over images, "
        "data range 1; images are clipped to [0, 1] where not said otherwise; ± is the standard "
        "deviation over seeds. Milliseconds per image are those of one core. "
        + blind
        + (" It is grey and takes each channel of RGB by itself." * metrics["per_channel"])
        + (f" Images are {metrics['size']}x{metrics['size']} pixels." * (not metrics["probes"])),
        "",
        *itertools.chain.from_iterable(
            _score_table(title, [r for r in results if r["task"] == task])
            for task, title in TASKS.items()
        ),
    ]
    if metrics["probes"]:
        lines += _probe_tables(metrics)
    return "\n".join(lines)


def _probe_tables(metrics: dict[str, Any]) -> list[str]:
    """Lines about the codes, donors, injection and uncertainty."""
    trained_on = metrics["n_views"]
    probes = metrics["probes"]
    classes = "class_from_noise_code" in probes
    chance = f"(chance {probes['chance_of_noise_id']:.0%}"
    chance += f"; class {probes['chance_of_class']:.0%})" if classes else ")"
    per_view = "".join(f" {n} views |" for n in trained_on)
    rule = "|---|" + "---|" * len(trained_on)

    def cells(values: dict[str, Any], form: str) -> str:
        return "".join(f" {values[str(n)]:{form}} |" for n in trained_on)

    def uncertain(key: str, form: str) -> str:
        return cells({n: u[key] for n, u in metrics["uncertainty"].items()}, form)

    lines = [
        "## What the codes know",
        "",
        f"| accuracy on test images {chance} | noise code | content code |",
        "|---|---|---|",
        f"| noise id, linear probe | {probes['noise_id_from_noise_code']:.1%} "
        f"| {probes['noise_id_from_content_code']:.1%} |",
        f"| noise id, discriminant on the donors (what `denoise` detects) "
        f"| {probes['noise_id']:.1%} | |",
    ]
    if classes:
        lines.append(
            f"| class of the image, linear probe | {probes['class_from_noise_code']:.1%} "
            f"| {probes['class_from_content_code']:.1%} |"
        )
    lines += [
        "",
        "## Donors, injection, uncertainty",
        "",
        f"| |{per_view}",
        rule,
        f"| spread over {metrics['donors']} random donors: standard deviation of an image's PSNR, "
        f"dB |{cells(metrics['donor_std_db'], '.3f')}",
        "| accuracy of a small classifier that tells injected from truly noisy images; 0.5 is "
        f"perfect injection |{cells(metrics['injected_or_true'], '.3f')}",
        "| uncertainty: factor on the standard deviation of posterior samples, from validation "
        f"images |{uncertain('scale', '.2f')}",
        "| uncertainty: correlation of scaled deviation and true error, per pixel "
        f"|{uncertain('correlation', '.2f')}",
        "| uncertainty: mean distance from the true error over tenths of the pixels, as a share of "
        "that of all "
        f"|{uncertain('calibration_error', '.1%')}",
        "",
        "`calibration.png` draws the last line, `grid.png` shows images.",
        "",
    ]
    return lines


def _score_table(title: str, results: list[dict[str, Any]]) -> list[str]:
    """Lines of a section with a Markdown table, a row for each method; none without results."""
    if not results:
        return []
    views = sorted({r["n_views"] for r in results} - {0}, reverse=True)
    by_method: dict[str, dict[int, dict[str, Any]]] = {}
    for r in results:
        by_method.setdefault(r["method"], {})[r["n_views"]] = r
    lines = [
        f"## {title}",
        "",
        "| method | " + " | ".join(f"{n} views" for n in views) + " | ms |",
        "|---|" + "---|" * (len(views) + 1),
    ]
    for cells in by_method.values():
        row = [cells.get(n) or cells.get(0) for n in views]
        seconds = [cell["seconds"] for cell in row if cell]
        text = " | ".join(_cell(cell) for cell in row)
        seeds = next((cell["seeds"] for cell in row if cell and "seeds" in cell), 0)
        name = next(iter(cells.values()))["text"] + (f" ({seeds} seeds)" if seeds else "")
        spent = "" if not any(seconds) else f"{1000 * sum(seconds) / len(seconds):.1f}"
        lines.append(f"| {name} | {text} | {spent} |")
    return [*lines, ""]


def _cell(cell: dict[str, Any] | None) -> str:
    if not cell:
        return ""
    spread = f" ± {cell['psnr_std']:.2f}" if "psnr_std" in cell else ""
    found = f" ({cell['found']:.0%} found)" if "found" in cell else ""
    return f"{cell['psnr']:.2f}{spread} / {cell['ssim']:.3f}{found}"


def calibration(uncertainty: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw predicted against true error of denoised pixels, a line for each view count."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 4.2), layout="constrained")
    axis = figure.subplots()
    top = max(value for u in uncertainty.values() for point in u["curve"] for value in point)
    axis.plot([0, top], [0, top], color="0.6", linewidth=1, label="perfect")
    for n_views, u in uncertainty.items():
        deviation, error = zip(*u["curve"], strict=True)
        axis.plot(deviation, error, "o-", markersize=4, label=f"{n_views} views (x {u['scale']})")
    axis.set_xlabel("standard deviation of posterior samples, scaled")
    axis.set_ylabel("true error (root mean square)")
    axis.legend(frameon=False)
    FigureCanvasAgg(figure).print_png(path)


def memory_plot(curves: dict[str, list[list[float]]], path: Path) -> None:
    """Draw megabytes over seconds, a line for each job."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axis = figure.subplots()
    for name, curve in curves.items():
        seconds, megabytes = zip(*curve, strict=True)
        axis.plot(seconds, megabytes, label=name)
    axis.set_xlabel("seconds")
    axis.set_ylabel("memory of the whole job, MB")
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)
    FigureCanvasAgg(figure).print_png(path)


@dataclass(frozen=True)
class JobPage:
    """What the page of a denoising job tells."""

    title: str
    source: Source
    out: Folder
    images: int
    """Images written, of which so many are doubtful."""
    doubtful: int
    seconds: float
    """Of the network, over all images."""
    sample: list[dict[str, Any]]
    """Rows of the manifest, drawn at random: neighbours by name are often alike."""
    worst: list[dict[str, Any]]
    """Those of the images that are explained least."""
    failures: pa.Table
    curve: list[tuple[float, int]]
    """(seconds, images done) of this run."""


def denoise_report(page: JobPage, images: ImagesConfig) -> str:
    """A self-contained HTML page: counts, images/s over time, failures by reason, and some images
    before and after."""
    figure = functools.partial(_figure, page=page, images=images)
    gallery = [shown for shown in map(figure, page.sample) if shown]
    least = (
        "<h2>Least explained</h2><p>Decibels say how close noise made anew of the cleaned image "
        "comes to the input; low values tell of noise that the model does not know.</p>"
        f"<main>{''.join(map(figure, page.worst))}</main>"
        if page.worst
        else ""
    )
    counts = [f"{page.images:,} images"]
    if page.doubtful:
        counts.append(f"{page.doubtful:,} of them doubtful")
    if len(page.failures):
        counts.append(f"{len(page.failures):,} failed")
    if page.images:
        counts.append(f"{1000 * page.seconds / page.images:.1f} ms of network time each")
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>snr_ray: {html.escape(page.title)}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 68rem }}
main {{ display: flex; flex-wrap: wrap; gap: 1rem }}
figure {{ margin: 0 }} figcaption {{ font-size: 12px; max-width: 232px; overflow-wrap: anywhere }}
img {{ width: 112px; image-rendering: pixelated; margin-right: 4px; background: #888 }}
td, th {{ text-align: left; padding: .2rem .8rem .2rem 0; vertical-align: top }}
</style>
<h1>{html.escape(page.title)}</h1>
<p>{html.escape(page.source.name)}: {", ".join(counts)}. Left before, right after;
{len(gallery)} drawn at random. Full list: manifest.parquet.</p>
<main>{"".join(gallery)}</main>{least}{_curve(page.curve)}{_reasons(page.failures)}</html>
"""


def _curve(points: list[tuple[float, int]]) -> str:
    """Images per second over the time of a run, as a drawing; nothing of a short one."""
    if len(points) < 3:
        return ""
    edges = np.linspace(0, points[-1][0], min(len(points), 60) + 1)
    times, done = zip(*[(0.0, 0), *points], strict=True)
    rates = np.diff(np.interp(edges, times, done)) / np.diff(edges)
    top = max(float(rates.max()), 1e-9)
    path = " ".join(
        f"{600 * edge / edges[-1]:.1f},{110 - 100 * rate / top:.1f}"
        for edge, rate in zip(edges[1:], rates, strict=True)
    )
    return (
        f"<h2>Images per second</h2><svg viewBox='0 0 600 112' width='600' height='112'>"
        f"<polyline points='{path}' fill='none' stroke='#357' stroke-width='1.5'/></svg>"
        f"<p>Over {edges[-1]:,.0f} seconds; {top:,.0f} at the most, "
        f"{points[-1][1] / edges[-1]:,.0f} in the mean.</p>"
    )


def _reasons(failures: pa.Table) -> str:
    """Failed images by stage and reason, the most frequent first, with examples of each."""
    if not len(failures):
        return ""
    # A reason names its image; what is left without the name is shared.
    shared: dict[tuple[str, str], list[str]] = {}
    for row in failures.to_batches()[0].slice(0, PAGE_FAILURES).to_pylist():
        reason = row["reason"].replace(row["id"], "...").replace(Path(row["id"]).name, "...")
        shared.setdefault((row["stage"], reason), []).append(row["id"])
    lines = "".join(
        f"<tr><td>{len(ids):,}</td><td>{html.escape(stage)}</td><td>{html.escape(reason)}</td>"
        f"<td>{html.escape(', '.join(ids[:5]))}{', ...' if len(ids) > 5 else ''}</td></tr>"
        for (stage, reason), ids in sorted(shared.items(), key=lambda item: -len(item[1]))[:50]
    )
    return (
        f"<h2>{len(failures):,} failed</h2><table><tr><th>images</th><th>stage</th><th>reason</th>"
        f"<th>such as</th></tr>{lines}</table>"
    )


def _figure(row: dict[str, Any], *, page: JobPage, images: ImagesConfig) -> str:
    """An image before and after; nothing where one of them cannot be read any more."""
    caption = html.escape(row["id"])
    if row.get("explained") is not None:
        caption += f", {row['explained']:.0f} dB"
    if row.get("status") == "doubtful":
        caption += ", doubtful"
    assert isinstance(page.source.ids, Texts)
    names = page.source.ids.array
    index = pc.index(names, pa.scalar(row["id"], names.type)).as_py()
    if index < 0:
        return ""
    try:
        before = _first(page.source.file(index)[1], row["id"], page, images)
        after = _first(contents(page.out, row["output"]), row["output"], page, images)
    except (InputError, OSError):
        return ""
    return (
        f"<figure><img alt='before' src='{_thumbnail(before)}'><img alt='after' "
        f"src='{_thumbnail(after)}'><figcaption>{caption}</figcaption></figure>"
    )


def _first(data: bytes, name: str, page: JobPage, images: ImagesConfig) -> Array:
    """Pixels [C, H, W] of the first picture of a file, as the job read it."""
    white = 1.0 if page.source.tensors else images.white
    return open_file(data, name, white=white, window=images.window).frames[0].pixels


def _thumbnail(pixels: Array) -> str:
    """[C, H, W] as a PNG data address, at most 224 pixels wide or high."""
    stored = (np.moveaxis(np.clip(pixels, 0, 1), 0, 2) * 255).round().astype(np.uint8)
    image = Image.fromarray(stored.squeeze(2) if stored.shape[2] == 1 else stored)
    image.thumbnail((224, 224))
    out = io.BytesIO()
    image.save(out, format="png")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
