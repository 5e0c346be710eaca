"""Results to look at: the picture grid and tables of an evaluation, the page of a denoising job."""

import base64
import html
import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from snr_ray.config import InputError
from snr_ray.images import decode
from snr_ray.sources import Source

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
PAGE_IMAGES = 24
METHOD_TEXT = {
    "noisy": "noisy input",
    "recon": "reconstruction of the noisy image (against the noisy image)",
    "recon_clean": "reconstruction of the clean image: the ceiling of the swap",
    "swap": "**noise removed**, mean clean noise code",
    "swap_random": "**noise removed**, random clean donor",
    "inject": "**noise injected**, against the true noisy image, unclipped",
    "no_inject": "clean image as it is, against the true noisy image, unclipped",
    "tv": "total variation, weight chosen on validation images",
    "lmmse": "linear MMSE, knows the operator and its view count",
}


def grid(rows: list[list[Array]], labels: list[str], path: Path) -> None:
    """Draw the original figure: one row of seven images [C, H, W] per picture, columns as named.

    Noisy images are clipped to [0, 1] for display only.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.35 * len(GRID_COLUMNS) + 0.6, 1.38 * len(rows) + 0.45))
    axes = figure.subplots(len(rows), len(GRID_COLUMNS), squeeze=False)
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            axis = axes[row][column]
            shown = np.moveaxis(np.clip(image, 0, 1), 0, 2)
            axis.imshow(shown.squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            if row == 0:
                axis.set_title(GRID_COLUMNS[column], fontsize=8)
        axes[row][0].set_ylabel(labels[row], fontsize=8)
    figure.subplots_adjust(0.035, 0.01, 0.995, 1 - 0.42 / figure.get_figheight(), 0.04, 0.04)
    FigureCanvasAgg(figure).print_png(path)


def evaluation_table(metrics: dict[str, Any]) -> str:
    """metrics.json as a Markdown page."""
    views = sorted({r["n_views"] for r in metrics["results"] if r["n_views"]}, reverse=True)
    methods = list(dict.fromkeys(r["method"] for r in metrics["results"]))
    cells = {(r["method"], r["n_views"]): r for r in metrics["results"]}
    head = " | ".join(f"{n} views" for n in views)
    lines = [
        f"# {metrics['model']} on {metrics['source']}",
        "",
        f"{metrics['images']} images of the test split. PSNR in dB / SSIM, mean over images, "
        "data range 1; images are clipped to [0, 1] where not said otherwise.",
        "",
        f"| method | {head} |",
        "|---|" + "---|" * len(views),
    ]
    for method in methods:
        row = []
        for n_views in views:
            cell = cells.get((method, n_views)) or cells.get((method, 0))
            row.append(f"{cell['psnr']:.2f} / {cell['ssim']:.3f}" if cell else "")
        lines.append(f"| {METHOD_TEXT.get(method, method)} | {' | '.join(row)} |")
    spread = ", ".join(f"{v:.3f} dB at {k} views" for k, v in metrics["donor_std_db"].items())
    probes = metrics["probes"]
    lines += [
        "",
        f"Spread over {metrics['donors']} random donors (standard deviation of an image's PSNR): "
        f"{spread}.",
        "",
        f"A linear probe tells the noise id from the noise code in "
        f"{probes['noise_id_from_noise_code']:.1%} and from the content code in "
        f"{probes['noise_id_from_content_code']:.1%} of cases (chance {probes['chance']:.1%}).",
        "",
    ]
    return "\n".join(lines)


def denoise_report(
    title: str,
    source: Source,
    out: Path,
    rows: list[dict[str, Any]],
    failures: list[dict[str, str]],
    *,
    white: float | None,
) -> str:
    """A self-contained HTML page: counts, failures, and the first images before and after."""
    index = {name: k for k, name in enumerate(source.ids)}
    figures = []
    for row in rows[:PAGE_IMAGES]:
        if row["id"] not in index:
            continue
        name = html.escape(row["id"])
        try:
            before = source.read(index[row["id"]], white).pixels
            after = decode(
                (out / row["output"]).read_bytes(),
                row["output"],
                white=1.0 if source.tensors else white,
            ).pixels
        except (InputError, OSError):
            continue
        figures.append(
            f"<figure><img alt='before' src='{_thumbnail(before)}'>"
            f"<img alt='after' src='{_thumbnail(after)}'><figcaption>{name}</figcaption></figure>"
        )
    seconds = sum(row["seconds"] for row in rows)
    failed = "".join(
        f"<tr><td>{html.escape(f['id'])}</td><td>{html.escape(f['stage'])}</td>"
        f"<td>{html.escape(f['reason'])}</td></tr>"
        for f in failures[:200]
    )
    table = (
        f"<h2>{len(failures)} failed</h2><table><tr><th>image</th><th>stage</th><th>reason</th>"
        f"</tr>{failed}</table>"
        if failures
        else ""
    )
    rate = f"{1000 * seconds / len(rows):.1f} ms of network time each" if rows else ""
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>snr_ray: {html.escape(title)}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 68rem }}
main {{ display: flex; flex-wrap: wrap; gap: 1rem }}
figure {{ margin: 0 }} figcaption {{ font-size: 12px; max-width: 232px; overflow-wrap: anywhere }}
img {{ width: 112px; image-rendering: pixelated; margin-right: 4px; background: #888 }}
td, th {{ text-align: left; padding: .2rem .8rem .2rem 0; vertical-align: top }}
</style>
<h1>{html.escape(title)}</h1>
<p>{len(rows):,} images from {html.escape(source.name)}, {rate}. Left before, right after;
the first {len(figures)} by name. Full list: manifest.parquet.</p>
<main>{"".join(figures)}</main>{table}</html>
"""


def _thumbnail(pixels: Array) -> str:
    """[C, H, W] as a PNG data address, at most 224 pixels wide or high."""
    stored = (np.moveaxis(np.clip(pixels, 0, 1), 0, 2) * 255).round().astype(np.uint8)
    image = Image.fromarray(stored.squeeze(2) if stored.shape[2] == 1 else stored)
    image.thumbnail((224, 224))
    out = io.BytesIO()
    image.save(out, format="png")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
