"""Stacks of images -> the same with exchanged noise codes; with files on both sides, a whole task.

Runs without Ray: what a test or a notebook runs is what the batch job runs.
"""

import functools
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from snr_ray.config import ImagesConfig
from snr_ray.errors import InputError
from snr_ray.hashing import hash64
from snr_ray.learning.checkpoint import TrainedModel
from snr_ray.network.blocks import Normal
from snr_ray.network.swap import NoiseCodes, detect, exchange, explained, on_device, swap
from snr_ray.network.tiles import TILE, in_tiles
from snr_ray.network.trust import doubtful
from snr_ray.network.views import views_of_range
from snr_ray.stages.denoising.imagefiles import (
    Answer,
    ImageFile,
    Row,
    Stack,
    Target,
    open_files,
    write_files,
)

Array = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


class FileSwapper:
    """Takes the noise code of every image from a pool of donors."""

    def __init__(
        self,
        trained: TrainedModel,
        pool: Sequence[Array],
        *,
        samples: int = 0,
        seed: int = 0,
        inject: int | None = None,
        n_views: int | None = None,
    ) -> None:
        """
        Args:
            trained: the model, on the device to use.
            pool: donors' noise codes per level, [n_donors, C_noise, h, w]; each image takes one by
                the hash of its id.
            samples: 0 decodes posterior means; N > 0 averages N posterior samples and gives their
                standard deviation.
            seed: of the choice of donors and of the samples.
            inject: the images are clean, and the pool is of noisy donors: noise of so many views.
            n_views: view count of the images, for a model that can be told; None leaves it to the
                noise codes, and of a model of a range finds that of each image.
        """
        self.inject, self.n_views = inject, n_views
        self.geometry = None if n_views is None else trained.geometry(n_views)
        self.wanted = inject if trained.views is not None else None
        self.trained, self.samples, self.seed = trained, samples, seed
        device = trained.model.top.device
        self.pool = [torch.from_numpy(np.array(level)).to(device) for level in pool]

    def run(
        self,
        files: Iterable[ImageFile],
        images: ImagesConfig,
        target: Target,
        per_value: int = 0,
    ) -> list[Row]:
        """Swap and write files. Returns a row for each: those of MANIFEST_SCHEMA, or a failure
        with id, stage and error. Raises NoRoom if nothing more can be written."""
        rows: list[Row] = []
        for opened, stacks, failed in open_files(files, images, per_value):
            answers = [self.answer(stack) for stack in stacks]
            rows += failed + write_files(opened, stacks, answers, target)
        return rows

    def answer(self, stack: Stack) -> Answer:
        """What becomes of a stack; where it fails as a whole, image by image, and by halves where a
        GPU has no memory for it."""
        since = time.perf_counter()
        donors = [hash64(f"{self.seed}/{name}") % len(self.pool[0]) for name in stack.ids]
        try:
            with self.trained.arithmetic():
                answer = self._answer(stack, donors)
            step = 0
        except (InputError, RuntimeError, MemoryError) as error:
            full = isinstance(error, torch.OutOfMemoryError)
            step = (len(stack.ids) + 1) // 2 if full else 1
            said = " ".join(str(error).split())[:200]
            reason = f"The network could not take it ({said})."
            if isinstance(error, InputError):
                reason = str(error)
            answer = Answer(stack.pixels, donors, [reason])
        if step and len(stack.ids) > 1:  # now that nothing refers to the tensors of what failed
            return _joined([self.answer(part) for part in _parts(stack, step)])
        answer.seconds = (time.perf_counter() - since) / len(stack.ids)
        return answer

    def _answer(self, stack: Stack, donors: list[int]) -> Answer:
        model, images = self.trained.model, stack.pixels
        ids, found = self._noise_ids(images), self._found(stack)
        answer = Answer(images, donors, [""] * len(images))
        noise = self._lent(donors)
        if model.noise_maker is None and not self.samples and max(images.shape[2:]) > TILE:
            made = functools.partial(swap, model)
            answer.images = np.stack(
                [
                    in_tiles(image, functools.partial(made, noise=[z[k : k + 1] for z in noise]))
                    for k, image in enumerate(images)
                ]
            )
            return answer
        exchanged = exchange(
            model,
            images,
            noise,
            noise_ids=ids,
            geometry=self.geometry,
            told=found,
            wanted=self.wanted,
            explain=not self.inject,
        )
        answer.n_views = exchanged.n_views
        if self.samples:
            answer.images, answer.deviations = self._sample(stack, donors, ids, found)
            if exchanged.explained is not None:
                answer.explained = explained(model, images, answer.images, self.geometry, found)
        else:
            answer.images, answer.explained = exchanged.images, exchanged.explained
        if self.inject:
            answer.n_views = None
        elif self.n_views is not None:
            answer.n_views = np.full(len(images), self.n_views)
        elif ids is not None:
            answer.n_views = np.array([0, *self.trained.config.noise.n_views])[ids]
        if answer.explained is not None and answer.n_views is not None:
            least = self.trained.least_explained
            answer.doubtful = doubtful(
                answer.explained, answer.n_views, max(images.shape[2:]), least
            )
        return answer

    def _lent(self, donors: list[int]) -> list[Tensor]:
        """Noise codes of donors."""
        index = on_device(np.array(donors, np.int64), self.pool[0].device)
        return [level[index] for level in self.pool]

    def _noise_ids(self, images: Array) -> Ids | None:
        """Noise ids of noisy images, given or detected; None where the model does not ask."""
        if self.inject or not self.trained.config.model.physics:
            return None
        if self.n_views is not None:
            return np.full(len(images), self.trained.noise_id(self.n_views))
        return detect(self.trained.model, self.trained.codes, images)

    def _found(self, stack: Stack) -> Ids | None:
        """View counts of noisy images that nobody has told, found by a model of a range."""
        if self.inject or self.n_views is not None:
            return None
        trained, clean = self.trained, self.trained.codes.mean(0)
        return views_of_range(trained.model, clean, stack.pixels, trained.geometry, stack.likely)

    def _sample(
        self, stack: Stack, donors: list[int], ids: Ids | None, found: Ids | None
    ) -> tuple[Array, Array]:
        """Mean and standard deviation over posterior samples: each [B, C, H, W]."""
        means, deviations = [], []
        for k, (image, donor, name) in enumerate(zip(stack.pixels, donors, stack.ids, strict=True)):
            noise = self._lent([donor])
            own = None if ids is None else ids[k : k + 1]
            # A generator per image: its samples do not depend on its neighbours in the batch.
            normal = _seeded(hash64(f"{self.seed}/samples/{name}"), self.pool[0].device)
            drawn = np.concatenate(
                [
                    swap(
                        self.trained.model,
                        image[None],
                        noise,
                        noise_ids=own,
                        geometry=self.geometry,
                        told=None if found is None else found[k : k + 1],
                        wanted=self.wanted,
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


def lent_codes(trained: TrainedModel, donor: str, inject: int | None) -> list[Array]:
    """Noise codes that a model folder lends, per level: [n_donors, C_noise, h, w], or their mean
    alone."""
    known = trained.donors(inject or 0)
    if donor == "mean":
        return [level.mean(0, keepdim=True).numpy() for level in known]
    return [level.numpy() for level in known]


def on(trained: TrainedModel, device: str) -> TrainedModel:
    """The same model on a device."""
    place = torch.device(device)
    model = trained.model.to(place).to(memory_format=torch.channels_last)
    codes = NoiseCodes([level.to(place) for level in trained.codes.donors])
    return replace(trained, model=model, codes=codes)


def _parts(stack: Stack, step: int) -> list[Stack]:
    """A stack as stacks of at most so many images."""
    return [stack.part(slice(k, k + step)) for k in range(0, len(stack.ids), step)]


def _joined(parts: list[Answer]) -> Answer:
    """Answers to parts of a stack as one; those with an error lack what the others have."""

    def column(name: str, missing: float) -> npt.NDArray | None:
        values = [getattr(part, name) for part in parts]
        if all(value is None for value in values):
            return None
        known = next(value for value in values if value is not None)
        return np.concatenate(
            [
                np.full((len(part.donors), *known.shape[1:]), missing, known.dtype)
                if value is None
                else value
                for part, value in zip(parts, values, strict=True)
            ]
        )

    return Answer(
        np.concatenate([part.images for part in parts]),
        [donor for part in parts for donor in part.donors],
        [error for part in parts for error in part.errors],
        column("deviations", 0),
        column("explained", 0),
        column("n_views", 0),
        column("doubtful", 0),
    )


def _seeded(seed: int, device: torch.device) -> Normal:
    generator = torch.Generator(device)
    generator.manual_seed(seed % 2**63)
    return lambda shape: torch.randn(shape, generator=generator, device=device)
