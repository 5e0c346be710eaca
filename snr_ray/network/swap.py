"""The swap: decode the content of one image with the noise code of another.

A clean donor's noise code removes noise, a noisy donor's injects it.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from snr_ray.images.formats.pixels import with_channels
from snr_ray.network.blocks import Normal, unexplained
from snr_ray.network.correction import corrected
from snr_ray.network.hvae import HVAE
from snr_ray.network.noisemaker import Alike
from snr_ray.network.viewcount import ViewCountMaker
from snr_ray.noise.operator import NoiseSpec, noise_operator

Array = npt.NDArray[np.float32]

N_DONORS = 64
"""Noise codes of single images kept per noise id, for random donors without their images."""

TINY = 1e-12
"""Variance of a channel that holds nothing; where all are so, they say the same."""
DETECT_RIDGE = 0.01
"""Ridge on the covariance of noise codes, as a share of their mean variance."""


@dataclass(frozen=True)
class NoiseCodes:
    """Noise codes of donor images, per level and noise id (0 is clean).

    `donors[level]` is [n_ids + 1, n_donors, C_noise, h, w]; vectors have h = w = 1.
    """

    donors: list[Tensor]

    @property
    def n_donors(self) -> int:
        """Donors kept per noise id."""
        return int(self.donors[0].shape[1])

    def mean(self, noise_id: int) -> list[Tensor]:
        """Mean noise code of one id per level: [1, C_noise, h, w]."""
        return [level[noise_id].mean(0, keepdim=True) for level in self.donors]

    def detect(self, codes: list[Tensor]) -> npt.NDArray[np.int64]:
        """Noise id of images by their noise codes [B, C_noise, h, w] per level: [B].

        Linear discriminant analysis on the donors: Gaussian classes of equal covariance and weight.
        Source: Hastie, Tibshirani and Friedman, The Elements of Statistical Learning (2009), 4.3.
        """
        known = np.concatenate([level.flatten(2).cpu().numpy() for level in self.donors], axis=2)
        given = np.concatenate([level.flatten(1).cpu().numpy() for level in codes], axis=1)
        means = known.mean(1)  # [n_ids + 1, dims]
        spread = (known - means[:, None]).reshape(-1, known.shape[2]).astype(np.float64)
        covariance = np.atleast_2d(np.cov(spread, rowvar=False))
        ridge = DETECT_RIDGE * np.trace(covariance) / len(covariance) + 1e-12
        weights = np.linalg.solve(covariance + ridge * np.eye(len(covariance)), means.T)
        scores = given @ weights - 0.5 * (means * weights.T).sum(1)
        return scores.argmax(1)

    def between(self, octaves: npt.NDArray[np.float64], octave: float) -> list[Tensor]:
        """Donors' noise codes of a view count, [n_donors, C_noise, h, w] per level: those of the
        nearest counts above and below, weighed by their distance.

        Args:
            octaves: of the noise ids, the clean one left out: logarithms of their view counts.
            octave: of the view count; beyond all others it is the last of them.
        """
        order = np.argsort(octaves)
        place = float(np.interp(octave, octaves[order], np.arange(len(order))))
        below, above = (1 + int(order[int(end)]) for end in (np.floor(place), np.ceil(place)))
        return [level[below].lerp(level[above], place % 1) for level in self.donors]

    def pick(self, noise_id: int, donor: npt.NDArray[np.int64]) -> list[Tensor]:
        """Noise codes of chosen donors per level: [len(donor), C_noise, h, w]."""
        index = torch.from_numpy(donor)
        return [level[noise_id][index.to(level.device)] for level in self.donors]


@torch.inference_mode()
def noise_code(model: HVAE, images: Array) -> list[Tensor]:
    """Mean noise code of donor images [B, C, H, W] per level: [1, C_noise, h, w]."""
    return [mu.mean(0, keepdim=True) for mu in _noise_codes(model, images)]


@torch.inference_mode()
def collect(model: HVAE, by_noise_id: list[Array]) -> NoiseCodes:
    """Noise codes of donor images; entry k of the list holds [n_donors, C, H, W] of noise id k."""
    per_id = [_noise_codes(model, images) for images in by_noise_id]
    return NoiseCodes([torch.stack(level) for level in zip(*per_id, strict=True)])


@torch.inference_mode()
def detect(model: HVAE, codes: NoiseCodes, images: Array) -> npt.NDArray[np.int64]:
    """Noise ids of images [B, C, H, W] by their noise codes, 0 for clean ones: [B]."""
    if not len(images):
        return np.zeros(0, np.int64)
    return codes.detect(_noise_codes(model, images))


@dataclass(frozen=True)
class Exchanged:
    """Images with other noise codes, and what the same pass over them learned."""

    images: Array
    """[B, C, H, W] float32, not clipped."""
    explained: npt.NDArray[np.float64] | None
    """As of `explained`, [B]; None of a model that does not unroll and where it was not asked."""
    n_views: npt.NDArray[np.int64] | None
    """View count that the noise codes say most of, 0 for a clean image, [B]; where channels have
    codes of their own, those of the more varied ones say more. None of a model whose decoder does
    not know the noise."""


@torch.inference_mode()
def read_views(model: HVAE, images: Array) -> npt.NDArray[np.int64]:
    """View counts [B] that noise codes of images [B, C, H, W] say, 0 of clean ones, for a decoder
    that knows the noise."""
    maker = model.noise_maker
    assert maker is not None
    if not len(images):
        return np.zeros(0, np.int64)
    shares = maker.shares(_noise_codes(model, images))
    counts: npt.NDArray[np.int64] = maker.counts(shares, max(images.shape[2:])).cpu().numpy()
    return counts


def swap(
    model: HVAE,
    images: Array,
    noise: list[Tensor] | None,
    *,
    normal: Normal | None = None,
    noise_ids: npt.NDArray[np.int64] | None = None,
    geometry: NoiseSpec | None = None,
    told: npt.NDArray[np.int64] | None = None,
    wanted: int | None = None,
    prior_levels: int = 0,
) -> Array:
    """The images alone of `exchange`, which see: [B, C, H, W] float32, not clipped."""
    return exchange(
        model,
        images,
        noise,
        normal=normal,
        noise_ids=noise_ids,
        geometry=geometry,
        told=told,
        wanted=wanted,
        prior_levels=prior_levels,
    ).images


@torch.inference_mode()
def exchange(
    model: HVAE,
    images: Array,
    noise: list[Tensor] | None,
    *,
    normal: Normal | None = None,
    noise_ids: npt.NDArray[np.int64] | None = None,
    geometry: NoiseSpec | None = None,
    told: npt.NDArray[np.int64] | None = None,
    wanted: int | None = None,
    prior_levels: int = 0,
    explain: bool = False,
) -> Exchanged:
    """Images [B, C, H, W] with other noise codes, or their own where `noise` is None.

    Content is inferred as it was in training: against the new noise codes where the swap was
    trained, else against those of the image itself (`HVAE.one_pass`).

    Cleaned images are corrected as model.correction says, but for samples.

    A grey model takes RGB channel by channel; an RGB model takes grey repeated and answers with
    the mean of its channels.

    Args:
        model: in eval mode, on any device.
        images: float32, not clipped: the network sees the range that the noise has; B may be 0.
        noise: codes per level, [1 or B, C_noise, h, w].
        normal: source of sampling noise; None decodes posterior means.
        noise_ids: [B] known or detected ids of the images, for a model with model.physics.
        geometry: how all of the images were made, for a model that `unrolls`; None: as their noise
            codes say.
        told: [B] view counts of the images, where they differ, for a model of a range of them: 0
            of clean ones, below 0 where it is for their noise codes to say.
        wanted: view count of the noise to make, for a model of a range of them, whose codes tell
            none to the last view and none far beyond the range; None: as the new noise codes say.
        prior_levels: so many of the finest levels take their content from the prior.
        explain: also say how well the result explains the images, of a model that `unrolls`.

    Raises:
        InputError: if images of this size cannot hold the views that are wanted.
    """
    maker = model.noise_maker
    if not len(images):  # which pixel shuffle does not take
        none = np.zeros(0, np.int64)
        unasked = None if not (explain and model.unrolls) else none.astype(np.float64)
        return Exchanged(images, unasked, none if maker is not None else None)
    batch, have = images.shape[:2]
    apart = have if model.channels == 1 else 1  # rows of the network for each image
    if apart > 1:
        x = _tensor(model, images.reshape(batch * have, 1, *images.shape[2:]))
    else:
        x = _tensor(model, with_channels(images, model.channels))
    side = max(images.shape[2:])
    corrects, plain = False, normal is None and wanted is None
    if model.correction and maker is not None and noise is not None and plain:
        # Of clean donors. A host that looks waits for a GPU: now, when that has little to do.
        corrects = not maker.counts(maker.shares(noise), side).any()
    if noise is not None:  # a single code serves all; otherwise each image lends to its channels
        noise = [code.repeat_interleave(apart, 0) if len(code) > 1 else code for code in noise]
    ids = None if noise_ids is None else on_device(noise_ids.repeat(apart), x.device)
    counts = None if told is None else on_device(told.repeat(apart), x.device)
    views = None
    if wanted is not None:
        assert isinstance(maker, ViewCountMaker)
        noise_operator(maker.views.spec(wanted), *images.shape[2:])  # says so if there is none
        views = torch.full((len(x),), wanted, device=x.device)
    infer = functools.partial(
        model,
        x,
        normal=normal,
        noise_ids=ids,
        geometry=geometry,
        told=counts,
        prior_levels=prior_levels,
    )
    if noise is None or model.one_pass:
        inference = infer(noise=noise, wanted=views)
        decoded = inference.image
    else:
        inference = infer()
        decoded = model.decode(dataclasses.replace(inference.codes, noise=noise), views)
    if have < model.channels:
        x, decoded = x[:, :have], decoded.mean(1, keepdim=True)
    shares = None if maker is None else maker.shares([q.mu for q in inference.noise])
    n_views = error = None
    if maker is not None and shares is not None:
        if counts is not None:
            assert isinstance(maker, ViewCountMaker)
            shares = maker.told(shares, counts, side)
        n_views = maker.counts(_of_images(shares, x, batch), side)
        make = maker.of(shares, side) if geometry is None else Alike(geometry)
        if corrects:
            decoded = corrected(x, decoded, make, model.correction)
        if explain and model.unrolls:
            error = _mean_square(unexplained(x, make(decoded)), batch)
    image, errors, known_views = _on_host(decoded, error, n_views)
    if apart > 1:
        image = image.reshape(images.shape)
    return Exchanged(image, None if errors is None else _decibels(errors), known_views)


@torch.inference_mode()
def explained(
    model: HVAE,
    images: Array,
    clean: Array,
    geometry: NoiseSpec | None = None,
    told: npt.NDArray[np.int64] | None = None,
) -> npt.NDArray[np.float64]:
    """How well noisy images are explained by what they were cleaned to: PSNR in dB, [B].

    The noise of a geometry, or that of the images' own noise codes, is made of the clean images and
    compared with the noisy ones. Under the right view count it comes out several dB closer than
    under its neighbours.

    `exchange` says the same of what it made; this is for other results, such as a mean of samples.

    Args:
        model: one that `unrolls`.
        images: noisy ones [B, C, H, W].
        clean: what became of them, of the same shape.
        geometry: as `swap` was told, and so `told`.
    """
    batch = len(images)
    if not batch:
        return np.zeros(0)
    if model.channels == 1:  # channel by channel, each of which has a noise code, as in `exchange`
        told = None if told is None else told.repeat(images.shape[1])
        images, clean = (some.reshape(-1, 1, *images.shape[2:]) for some in (images, clean))
    seen, guess = _tensor(model, images), _tensor(model, clean)
    if geometry is not None:
        again = Alike(geometry)(guess)
    else:
        maker = model.noise_maker
        assert maker is not None
        shares = maker.shares(_noise_codes(model, images))
        if told is not None:
            assert isinstance(maker, ViewCountMaker)
            shares = maker.told(
                shares, torch.from_numpy(told).to(shares.device), max(seen.shape[2:])
            )
        again = maker.of(shares, max(seen.shape[2:]))(guess)
    return _decibels(_mean_square(unexplained(seen, again), batch).cpu().numpy())


def _of_images(shares: Tensor, x: Tensor, batch: int) -> Tensor:
    """What was read of channels [B C, ...] as that of images [B, ...]: those that vary most say
    most, and black ones nothing."""
    apart = len(x) // batch
    if apart == 1:
        return shares
    power = x.flatten(1).var(1) + TINY
    weights = power.reshape(batch, apart, 1)
    return (weights * shares.reshape(batch, apart, -1)).sum(1) / weights.sum(1)


def _mean_square(left: Tensor, batch: int) -> Tensor:
    """Of what a simulation leaves of images: [B] float64."""
    return left.reshape(batch, -1).square().mean(1).double()


def _decibels(error: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """PSNR of mean squares [B]; 100 dB at most, which is exact."""
    return -10 * np.log10(np.maximum(error, 1e-10))


def _noise_codes(model: HVAE, images: Array) -> list[Tensor]:
    features = model.bottom_up(_tensor(model, with_channels(images, model.channels)))
    return [q.mu for q in model.noise_posteriors(features)]


def _tensor(model: HVAE, images: Array) -> Tensor:
    """Images on the model's device, in the memory layout its convolutions are fastest in."""
    # Torch warns of arrays that must not be written to.
    own = np.require(images, np.float32, ["C", "W"])
    tensor = on_device(own, model.top.device)
    return tensor.contiguous(memory_format=torch.channels_last)


def on_device(array: npt.NDArray, device: torch.device) -> Tensor:
    """An array as a tensor. A copy to a GPU goes on beside what is asked of it next."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _on_host(*tensors: Tensor | None) -> list[Any]:
    """Tensors of one device as arrays, None as None; a GPU is waited for once."""
    copies = [None if tensor is None else _leaving(tensor) for tensor in tensors]
    for tensor in tensors:
        if tensor is not None and tensor.is_cuda:
            torch.cuda.current_stream(tensor.device).synchronize()
            break
    return [None if copy is None else copy.numpy() for copy in copies]


def _leaving(tensor: Tensor) -> Tensor:
    """A copy on the host, of a GPU's whole when its stream is through."""
    if not tensor.is_cuda:
        return tensor.cpu()
    there = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return there.copy_(tensor, non_blocking=True)
