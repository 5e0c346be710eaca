"""The picture grid of an evaluation: a row for each image, whose view counts take turns."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from snr_ray.config import NoiseConfig
from snr_ray.learning.batches import Pairs
from snr_ray.learning.checkpoint import TrainedModel
from snr_ray.network.swap import detect, swap
from snr_ray.network.views import views_of_range

Array = npt.NDArray[np.float32]

GRID_ROWS = 9
"""Images of a picture, at most."""
COLUMNS = (
    "noisy",
    "reconstruction\nof noisy",
    "clean",
    "reconstruction\nof clean",
    "noise removed",
    "noise injected",
    "true noisy",
)


def draw_own(trained: TrainedModel, pairs: Pairs, path: Path) -> None:
    """The original figure: what a model makes of noisy and clean images of its own view counts."""
    views = trained.config.noise.n_views
    rows, labels = [], []
    for k, pick in enumerate(pairs.sample(GRID_ROWS)):
        noise_id = 1 + k % len(views)
        clean, noisy = pairs.take(np.array([pick]), 0), pairs.take(np.array([pick]), noise_id)
        model, codes, ids = trained.model, trained.codes, np.array([noise_id])
        pictures = [
            noisy,
            swap(model, noisy, None, noise_ids=ids),
            clean,
            swap(model, clean, None),
            swap(model, noisy, codes.mean(0), noise_ids=ids),
            swap(model, clean, codes.mean(noise_id)),
            noisy,
        ]
        rows.append([picture[0] for picture in pictures])
        labels.append(f"{views[noise_id - 1]} views")
    _draw(rows, labels, path, COLUMNS)


def draw_elsewhere(trained: TrainedModel, pairs: Pairs, noise: NoiseConfig, path: Path) -> None:
    """What a model makes of images of another size or other view counts."""
    columns, rows, labels = ["noisy", "noise removed", "clean"], [], []
    told = trained.model.unrolls
    if told:
        columns.insert(2, "noise removed,\ntold the views")
    for k, pick in enumerate(pairs.sample(GRID_ROWS)):
        noise_id = 1 + k % len(noise.n_views)
        clean, noisy = pairs.take(np.array([pick]), 0), pairs.take(np.array([pick]), noise_id)
        codes, views = trained.codes.mean(0), noise.n_views[noise_id - 1]
        ids = detect(trained.model, trained.codes, noisy)
        found = views_of_range(trained.model, codes, noisy, trained.geometry)  # as `denoise` does
        cleaned = swap(trained.model, noisy, codes, noise_ids=ids, told=found)
        pictures = [noisy, cleaned, clean]
        if told:
            geometry = trained.geometry(views)
            pictures.insert(2, swap(trained.model, noisy, codes, geometry=geometry))
        rows.append([picture[0] for picture in pictures])
        labels.append(f"{views} views")
    _draw(rows, labels, path, tuple(columns))


def _draw(rows: list[list[Array]], labels: list[str], path: Path, columns: tuple[str, ...]) -> None:
    """Draw images [C, H, W], a row for each picture; clipped to [0, 1] for display only."""
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
