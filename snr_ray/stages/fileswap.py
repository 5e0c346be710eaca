"""Image files -> the same files with exchanged noise codes, and a row about each. Runs without Ray.

bytes -> pixels of any size and depth -> (by shape) network -> encoded like the input -> disk
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from snr_ray.config import ImagesConfig, InputError
from snr_ray.hashing import hash64
from snr_ray.images.formats import decode, encode
from snr_ray.images.pixels import Decoded
from snr_ray.learning.checkpoint import TrainedModel
from snr_ray.network.blocks import Normal
from snr_ray.network.swap import detect, exchange, explained, swap
from snr_ray.outputs import write_atomic

Array = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Row = dict[str, Any]

PASS_PIXELS = 2**20
"""Pixels per pass of the network; bounds memory whatever the image sizes."""
MANIFEST_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("output", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("channels", pa.int32()),
        ("depth", pa.string()),
        ("donor", pa.int32()),
        ("n_views", pa.int32()),
        ("explained", pa.float32()),
        ("std", pa.float32()),
        ("seconds", pa.float32()),
    ]
)


@dataclass(frozen=True)
class ImageFile:
    """One input."""

    id: str
    output: str
    """Path of the result, relative to the output folder."""
    name: str
    """File name of `data`; its suffix says the format."""
    data: bytes
    tensor: bool = False
    """Float pixels with white at 1, as in a data folder."""
    error: str = ""
    """Why there is no data."""


class FileSwapper:
    """Takes the noise code of every image from a pool of donors."""

    def __init__(
        self,
        trained: TrainedModel,
        pool: Sequence[Array],
        out: Path,
        *,
        samples: int = 0,
        seed: int = 0,
        images: ImagesConfig | None = None,
        inject: bool = False,
        n_views: int | None = None,
    ) -> None:
        """
        Args:
            trained: the model, on the device to use.
            pool: donors' noise codes per level, [n_donors, C_noise, h, w]; each image takes one by
                the hash of its id.
            out: output folder.
            samples: 0 decodes posterior means; N > 0 averages N posterior samples and writes
                their standard deviation.
            seed: of the choice of donors and of the samples.
            images: how images are read; white and window matter.
            inject: the images are clean, and the pool is of noisy donors.
            n_views: view count of the images, for a model that can be told; None detects it.
        """
        self.inject, self.n_views = inject, n_views
        self.geometry = None if n_views is None else trained.geometry(n_views)
        self.trained, self.out, self.samples = trained, out, samples
        self.seed, self.images = seed, images or ImagesConfig()
        device = trained.model.top.device
        self.pool = [torch.from_numpy(np.array(level)).to(device) for level in pool]

    def run(self, files: Sequence[ImageFile]) -> list[Row]:
        """Swap and write files. Returns a row for each: those of MANIFEST_SCHEMA, or a failure
        with id, stage and error; a failed image never takes another with it."""
        rows: list[Row] = []
        by_shape: dict[tuple[int, ...], list[tuple[ImageFile, Decoded]]] = {}
        for file in files:
            try:
                if file.error:
                    raise InputError(file.error)
                decoded = decode(
                    file.data,
                    file.name,
                    white=1.0 if file.tensor else self.images.white,
                    window=self.images.window,
                )
            except InputError as error:
                rows.append(_failed(file, "read", str(error)))
                continue
            by_shape.setdefault(decoded.pixels.shape, []).append((file, decoded))
        for shape, members in by_shape.items():
            step = max(1, PASS_PIXELS // int(np.prod(shape)))
            for start in range(0, len(members), step):
                rows += self._pass(members[start : start + step])
        return rows

    def _pass(self, members: list[tuple[ImageFile, Decoded]]) -> list[Row]:
        """Images of one shape; where the pass fails as a whole, image by image."""
        since = time.perf_counter()
        donors = [hash64(f"{self.seed}/{file.id}") % len(self.pool[0]) for file, _ in members]
        images = np.stack([decoded.pixels for _, decoded in members])
        try:
            ids = self._noise_ids(images)
            if self.samples:
                results, deviations = self._sample(images, donors, ids, members)
                decibels = self._explained(images, results)
            else:
                deviations = None
                exchanged = exchange(
                    self.trained.model,
                    images,
                    [level[donors] for level in self.pool],
                    noise_ids=ids,
                    geometry=self.geometry,
                    explain=not self.inject,
                )
                results, decibels = exchanged.images, exchanged.explained
        except InputError as error:
            return [_failed(file, "swap", str(error)) for file, _ in members]
        except (RuntimeError, MemoryError) as error:
            if len(members) > 1:
                return [row for member in members for row in self._pass([member])]
            reason = f"The network could not take it ({' '.join(str(error).split())[:200]})."
            return [_failed(members[0][0], "swap", reason)]
        seconds = (time.perf_counter() - since) / len(members)
        rows = []
        for k, (file, decoded) in enumerate(members):
            deviation = None if deviations is None else deviations[k]
            if not np.isfinite(results[k]).all():
                rows.append(_failed(file, "swap", "The network's answer is not finite."))
                continue
            try:
                self._write(file, decoded, results[k], deviation)
            except (OSError, ValueError) as error:
                reason = f"{file.output} cannot be written ({error})."
                rows.append(_failed(file, "write", reason))
                continue
            channels, height, width = decoded.pixels.shape
            rows.append(
                {
                    "id": file.id,
                    "output": file.output,
                    "height": height,
                    "width": width,
                    "channels": channels,
                    "depth": str(decoded.depth),
                    "donor": donors[k],
                    "n_views": self.n_views if ids is None else self._views(ids[k]),
                    "explained": None if decibels is None else float(decibels[k]),
                    "std": None if deviation is None else float(deviation.mean()),
                    "seconds": seconds,
                }
            )
        return rows

    def _noise_ids(self, images: Array) -> Ids | None:
        """Noise ids of noisy images, given or detected; None where the model does not ask."""
        if self.inject or not self.trained.config.model.physics:
            return None
        if self.n_views is not None:
            return np.full(len(images), self.trained.noise_id(self.n_views))
        return detect(self.trained.model, self.trained.codes, images)

    def _explained(self, images: Array, results: Array) -> npt.NDArray[np.float64] | None:
        """How well the cleaned images explain the noisy ones, dB, [B]; None where noise is
        injected, and of a model that has no use for the operator: that of a large image takes
        a while to build."""
        if self.inject or not self.trained.model.unrolls:
            return None
        return explained(self.trained.model, images, results, self.geometry)

    def _views(self, noise_id: int) -> int:
        """View count of a noise id; 0 of a clean image."""
        return (0, *self.trained.config.noise.n_views)[noise_id]

    def _sample(
        self,
        images: Array,
        donors: list[int],
        ids: Ids | None,
        members: list[tuple[ImageFile, Decoded]],
    ) -> tuple[Array, Array]:
        """Mean and standard deviation over posterior samples: each [B, C, H, W]."""
        means, deviations = [], []
        for k, (image, donor, (file, _)) in enumerate(zip(images, donors, members, strict=True)):
            noise = [level[donor : donor + 1] for level in self.pool]
            own = None if ids is None else ids[k : k + 1]
            # A generator per image: its samples do not depend on its neighbours in the batch.
            normal = _seeded(hash64(f"{self.seed}/samples/{file.id}"), self.pool[0].device)
            drawn = np.concatenate(
                [
                    swap(
                        self.trained.model,
                        image[None],
                        noise,
                        noise_ids=own,
                        geometry=self.geometry,
                        normal=normal,
                    )
                    for _ in range(self.samples)
                ]
            )
            if not self.inject:
                drawn = np.clip(drawn, 0, 1)  # as their mean will be
            means.append(drawn.mean(0))
            deviations.append(drawn.std(0))
        return np.stack(means), np.stack(deviations)

    def _write(
        self, file: ImageFile, decoded: Decoded, result: Array, deviation: Array | None
    ) -> None:
        # Noise leaves the range of clean images; float files can hold that.
        whole = self.inject and decoded.depth.kind == "f"
        data = encode(result, file.output, depth=decoded.depth, span=decoded.span, clip=not whole)
        write_atomic(self.out / file.output, data)
        if deviation is not None:
            name = file.output + ".std.npy"
            write_atomic(self.out / name, encode(deviation, name, depth=np.dtype(np.float32)))


def _seeded(seed: int, device: torch.device) -> Normal:
    generator = torch.Generator(device)
    generator.manual_seed(seed % 2**63)
    return lambda shape: torch.randn(shape, generator=generator, device=device)


def _failed(file: ImageFile, stage: str, reason: str) -> Row:
    return {"id": file.id, "output": file.output, "stage": stage, "error": reason}
