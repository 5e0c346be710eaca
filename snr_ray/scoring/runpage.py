"""A training run to look at: pictures of what the model does, and one page with all curves."""

import base64
import html
import io
import math
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from snr_ray.learning.batches import Pairs
from snr_ray.network.hvae import HVAE
from snr_ray.network.swap import NoiseCodes, swap
from snr_ray.network.unet import UNet, regress

Array = npt.NDArray[np.float32]

TILES = 6
"""Images of a picture."""
LEAST_SIDE = 96
"""Small images are enlarged to about so many pixels, each to a square."""
GAP = 4

PANELS = (
    ("loss, per pixel", ("loss", "recon")),
    ("KL divergence, nats per image", ("kl_content", "kl_noise")),
    ("KL between content of clean and noisy, nats", ("content_kl",)),
    ("KL of each level's content code", ("kl_content_",)),
    ("KL of each level's noise code", ("kl_noise_",)),
    ("noise codes: loss and distances", ("triplet", "distance_")),
    ("reading the noise code", ("noise_id", "views_error")),
    ("noise removed, validation PSNR, dB", ("swap_psnr", "told_psnr", "unet_psnr")),
    ("rebuilt and injected, validation PSNR, dB", ("recon_", "inject_psnr")),
    ("gradient norm before clipping", ("grad_norm",)),
    ("skipped steps", ("skipped",)),
    ("images/s", ("images_per_s",)),
)
"""Title of each panel, and the names, or beginnings of names, of its curves."""
LOGARITHMIC = ("grad_norm",)


def tiles(
    model: HVAE | UNet, codes: NoiseCodes | None, val: Pairs, n_views: tuple[int, ...]
) -> tuple[Array, list[str]]:
    """What a model makes of a few validation images: [H, W, 3] in [0, 1], and what each column is.

    Args:
        model: in eval mode.
        codes: noise codes of donors; None of a U-Net.
        val: validation images; one row each.
        n_views: view count of each noise id; the last, which is the hardest, is shown.
    """
    rows = val.sample(TILES)
    noise_id = int(np.argmin(n_views)) + 1
    clean, noisy = val.take(rows, 0), val.take(rows, noise_id)
    ids, views = np.full(len(rows), noise_id), n_views[noise_id - 1]
    columns = {"clean": clean, f"noisy, {views} views": noisy}
    if isinstance(model, HVAE):
        assert codes is not None
        columns["noise removed"] = swap(model, noisy, codes.mean(0), noise_ids=ids)
        columns["noisy, rebuilt"] = swap(model, noisy, None, noise_ids=ids)
        columns["clean, rebuilt"] = swap(model, clean, None)
        columns["noise injected"] = swap(model, clean, codes.mean(noise_id))
    else:
        columns["noise removed"] = regress(model, noisy, ids)
    scale = max(1, round(LEAST_SIDE / clean.shape[-1]))
    side = scale * clean.shape[-1] + GAP
    sheet = np.ones((len(rows) * side - GAP, len(columns) * side - GAP, 3), np.float32)
    for column, images in enumerate(columns.values()):
        for row, image in enumerate(images):
            pixels = np.moveaxis(np.clip(image, 0, 1), 0, 2).repeat(scale, 0).repeat(scale, 1)
            top, left = row * side, column * side
            sheet[top : top + len(pixels), left : left + len(pixels)] = pixels
    return sheet, list(columns)


def png(sheet: Array, columns: str, step: int) -> bytes:
    """An image [H, W, 3] in [0, 1] as a file that says what its columns are."""
    data, told = io.BytesIO(), PngInfo()
    told.add_text("Description", f"step {step}, from left to right: {columns}")
    image = Image.fromarray((sheet * 255).round().astype(np.uint8))
    image.save(data, "png", pnginfo=told)
    return data.getvalue()


def run_page(rows: list[dict[str, Any]], settings: str, sheet: bytes | None, ending: str) -> str:
    """A page in one file: curves, pictures, settings.

    Args:
        rows: lines of a metrics.jsonl; numbers that were not finite are missing.
        settings: config.yaml.
        sheet: what `png` made of `tiles`, if there is one yet.
        ending: how the run stands, a sentence.
    """
    last: dict[str, Any] = {}
    for row in rows:
        last |= row
    numbers = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{_number(last[name])}</td></tr>"
        for name in sorted(last)
    )
    picture = ""
    if sheet is not None:
        with Image.open(io.BytesIO(sheet)) as image:
            caption = str(image.info.get("Description", ""))
        data = base64.b64encode(sheet).decode()
        picture = (
            f"<h2>Validation images</h2><p>{html.escape(caption)}</p>"
            f'<img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
        )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>snr train</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 76em; margin: 2em auto; padding: 0 1em;
  color: #1b1f24; background: #fff }}
svg, img {{ max-width: 100%; height: auto }}
td {{ padding: 0 1.5em 0 0; font-variant-numeric: tabular-nums }}
td + td {{ text-align: right }}
pre {{ background: #f4f5f7; padding: 1em; overflow: auto; font-size: 13px }}
.two {{ display: flex; flex-wrap: wrap; gap: 3em }}
</style></head><body>
<h1>Training run</h1>
<p>{html.escape(ending)}</p>
{_curves(rows)}
{picture}
<div class="two"><div><h2>Last values</h2><table>{numbers}</table></div>
<div><h2>Settings</h2><pre>{html.escape(settings)}</pre></div></div>
</body></html>
"""


def _number(value: Any) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 or value == round(value) else f"{value:.4g}"


def _curves(rows: list[dict[str, Any]]) -> str:
    """All panels that have curves, as one SVG."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for row in rows for name in row if name != "step"))
    panels = [(title, _chosen(names, keys)) for title, keys in PANELS]
    panels = [(title, chosen) for title, chosen in panels if chosen]
    if not panels:
        return "<p>No step has been logged yet.</p>"
    columns = 3
    n_rows = math.ceil(len(panels) / columns)
    drawing = io.StringIO()
    with rc_context({"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": "snr_ray"}):
        figure = Figure(figsize=(12, 2.7 * n_rows), layout="constrained")
        axes = list(figure.subplots(n_rows, columns, squeeze=False).flat)
        for axis, (title, chosen) in zip(axes, panels, strict=False):
            for name in chosen:
                points = [(row["step"], row[name]) for row in rows if name in row]
                axis.plot(*zip(*points, strict=True), label=name, lw=1.2,
                          marker="." if len(points) < 20 else None)  # fmt: skip
            axis.set_title(title, loc="left", fontsize=9)
            axis.xaxis.get_major_locator().set_params(integer=True)  # there is no step 19.25
            axis.grid(alpha=0.25)
            if chosen[0] in LOGARITHMIC:
                axis.set_yscale("log")
            if chosen == ["skipped"]:
                axis.set_ylim(0, max(1.0, *(row.get("skipped", 0) for row in rows)) * 1.05)
            if len(chosen) > 1:
                axis.legend(fontsize=7, frameon=False)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        for axis in axes[max(0, len(panels) - columns) : len(panels)]:
            axis.set_xlabel("step")
        FigureCanvasSVG(figure).print_svg(drawing, metadata={"Date": None})
    text = drawing.getvalue()
    return text[text.index("<svg") :]


def _chosen(names: list[str], keys: tuple[str, ...]) -> list[str]:
    """Names that are one of the keys, or begin with one that ends in `_` or is a PSNR."""
    return [
        name
        for name in names
        for key in keys
        if name == key or (key.endswith(("_", "psnr")) and name.startswith(key))
    ]
