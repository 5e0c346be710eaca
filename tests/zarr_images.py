"""OME-Zarr images of either version, written by hand, for tests of several rooms."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr

KINDS = {"t": "time", "c": "channel", "z": "space", "y": "space", "x": "space"}
UNITS = {"t": "second", "z": "micrometer", "y": "millimeter", "x": "millimeter"}
OMERO = {"channels": [{"color": "FFFFFF", "window": {"start": 0, "end": 9}}]}


def write(
    folder: Path,
    values: np.ndarray,
    axes: str = "zyx",
    *,
    version: int = 2,
    chunks: Sequence[int] | None = None,
    levels: int = 2,
    path: str = "0",
    **array: Any,
) -> Path:
    """An image with a pyramid, whose smaller levels hold what nobody should take for it."""
    folder.mkdir(parents=True)
    paths = [path, *(f"level{k}" for k in range(1, levels))]
    for k, where in enumerate(paths):
        made = zarr.create_array(
            str(folder / where),
            shape=values.shape if k == 0 else [1] * values.ndim,
            chunks=tuple(chunks or values.shape) if k == 0 else (1,) * values.ndim,
            dtype=values.dtype,
            zarr_format=version,
            **(array if k == 0 else {}),
        )
        made[...] = values if k == 0 else 77
    describe(folder, multiscales(axes, paths), version)
    return folder


def multiscales(axes: str, paths: Sequence[str]) -> dict[str, Any]:
    """What an image says of itself."""
    named = [{"name": a, "type": KINDS.get(a, "space")} | ({"unit": UNITS[a]} if a in UNITS else {})
             for a in axes]  # fmt: skip
    datasets = [
        {"path": path, "coordinateTransformations": [
            {"type": "scale", "scale": [0.5 * 2**k] * len(axes)}]}
        for k, path in enumerate(paths)
    ]  # fmt: skip
    return {"multiscales": [{"version": "0.4", "name": "scan", "type": "gaussian", "axes": named,
                             "datasets": datasets}], "omero": OMERO}  # fmt: skip


def describe(folder: Path, own: Any, version: int = 2) -> None:
    """Write the metadata of a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if version == 2:
        (folder / ".zgroup").write_text('{"zarr_format": 2}')
        (folder / ".zattrs").write_text(json.dumps(own))
    else:
        whole = {"zarr_format": 3, "node_type": "group", "attributes": {"ome": own, "mine": 1}}
        (folder / "zarr.json").write_text(json.dumps(whole))


def described(folder: Path) -> dict[str, Any]:
    """What a folder says of itself."""
    if (folder / "zarr.json").exists():
        return json.loads((folder / "zarr.json").read_text())["attributes"]["ome"]
    return json.loads((folder / ".zattrs").read_text())


def pixels(folder: Path, path: str = "0") -> np.ndarray:
    """Values of a level, as zarr reads them."""
    return np.asarray(zarr.open_array(str(folder / path), mode="r")[...])


def small(folder: Path, version: int = 2, fill: int = 5) -> Path:
    """An image of two slices of 6x7 pixels, all of one value, in chunks of half a slice."""
    return write(folder, np.full((2, 6, 7), fill, np.uint8), version=version, chunks=(1, 3, 7))
