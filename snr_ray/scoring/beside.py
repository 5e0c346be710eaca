"""Models beside the one that is evaluated: which may share its table, and the means of the rows."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from snr_ray.config import Config, NoiseConfig
from snr_ray.errors import InputError
from snr_ray.learning.checkpoint import load_any
from snr_ray.learning.modelfolder import model_path, model_place
from snr_ray.scoring.cases import TASKS
from snr_ray.scoring.methods import METHODS
from snr_ray.scoring.scores import Row


@dataclass(frozen=True)
class Beside:
    """Another model in the same table; `label` is the name of its run folder."""

    label: str
    folder: str
    """What tasks open."""
    config: Config


def open_beside(config: Config, folders: Iterable[str]) -> list[Beside]:
    """The models of --beside, checked against the images and noise of the model in question."""
    others: list[Beside] = []
    for folder in folders:
        path = model_path(folder)
        its = load_any(path).config
        for section, key in (("images", "size"), ("images", "channels"), ("images", "crop"),
                             *(("noise", field.name) for field in dataclasses.fields(NoiseConfig))
                             ):  # fmt: skip
            mine, theirs = (getattr(getattr(c, section), key) for c in (config, its))
            if mine != theirs:
                raise InputError(
                    f"Models of one table need the same images and noise, but {folder} has "
                    f"{section}.{key}={theirs} where the model has {mine}."
                )
        label = path.parent.name if path.name == "model" else path.name
        if label in {other.label for other in others}:
            raise InputError(
                f"Run folders of --beside name their rows, but two are called {label!r}; "
                "rename one."
            )
        others.append(Beside(label, model_place(folder), its))
    return others


def means(scores: pa.Table, config: Config, others: list[Beside]) -> list[dict[str, Any]]:
    """A dictionary for each row and view count, in the order of TASKS and METHODS.

    Models that differ only by their seed are one, that of `config` among them: the mean of their
    means, and the standard deviation of these.
    """
    first: dict[Config, str] = {}
    label, seen = {}, set()
    for name, its in [("", config), *((other.label, other.config) for other in others)]:
        # Equal seeds are no spread: such models were trained on something else, or are copies.
        recipe = dataclasses.replace(its, seed=0)
        label[name] = name if its in seen else first.setdefault(recipe, name)
        seen.add(its)
    columns = [("psnr", "mean"), ("ssim", "mean"), ("seconds", "mean"), ("right", "mean")]
    means = scores.group_by(list(Row._fields)).aggregate(columns).to_pylist()
    pooled: dict[Row, list[dict[str, Any]]] = {}
    for cell in sorted(means, key=lambda cell: str(cell["model"])):
        row = Row(*(cell[name] for name in Row._fields))._replace(model=label[cell["model"]])
        pooled.setdefault(row, []).append(cell)

    def place(row: Row) -> tuple[Any, ...]:
        tasks, methods = list(TASKS), list(METHODS)
        return tasks.index(row.task), methods.index(row.method), row.model, row.n_views

    return [
        {
            "method": row.name,
            "text": row.text,
            "task": row.task,
            "n_views": row.n_views,
            "psnr": round(float(np.mean([cell["psnr_mean"] for cell in cells])), 4),
            "ssim": round(float(np.mean([cell["ssim_mean"] for cell in cells])), 5),
            "seconds": round(float(np.mean([cell["seconds_mean"] for cell in cells])), 6),
        }
        | ({} if cells[0]["right_mean"] is None else {"found": round(cells[0]["right_mean"], 4)})
        | (
            {
                "seeds": len(cells),
                "psnr_std": round(float(np.std([cell["psnr_mean"] for cell in cells], ddof=1)), 4),
            }
            if len(cells) > 1
            else {}
        )
        for row, cells in sorted(pooled.items(), key=lambda item: place(item[0]))
    ]
