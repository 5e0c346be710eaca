"""The page of an evaluation: its tables, and the plot of its uncertainty."""

import itertools
from pathlib import Path
from typing import Any

from snr_ray.scoring.cases import TASKS


def evaluation_table(metrics: dict[str, Any]) -> str:
    """metrics.json as a Markdown page."""
    results = metrics["results"]
    blind = (
        "The model sees the linear estimate for the given view count beside the image."
        if metrics["physics"]
        else "The model is blind to the view count."
    )
    of = "the test split" if metrics.get("split", "test") == "test" else "the source, all of it"
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
