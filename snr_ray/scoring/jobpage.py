"""The page of a denoising job: counts, images per second, failures by reason, before and after."""

import base64
import functools
import html
import io
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
from snr_ray.images.formats.codec import open_file
from snr_ray.images.formats.zarrfolder import contents

Array = npt.NDArray[np.float32]

PAGE_FAILURES = 100_000
"""Failed images that a page looks at."""


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
