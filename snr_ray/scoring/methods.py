"""Every method of the tables in one place: its key, its label, and how it is computed.

A method is one entry of `METHODS`; what runs, scores and draws them reads all else from there.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from snr_ray.hashing import hash64
from snr_ray.images.formats.pixels import with_channels
from snr_ray.learning.checkpoint import TrainedModel, TrainedUNet
from snr_ray.network.hvae import HVAE
from snr_ray.network.itnet import ItNet
from snr_ray.network.swap import detect, swap
from snr_ray.network.unet import regress
from snr_ray.network.viewcount import ViewCountMaker
from snr_ray.scoring.baselines import Fitting, fit_lmmse, fit_sart, fit_tv, fit_tvrec
from snr_ray.scoring.cases import REMOVE, Case, Restore

Array = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

SART_EVERY = 8
"""SART takes hundreds of times as long as the rest; every so many images are enough."""


def _noisy_case(case: Case, _: Any) -> bool:
    return case.spec is not None


def _mirrored(case: Case, _: Any) -> bool:
    """Whether the mirror image at the diagonal is one of the same scan."""
    return case.spec is not None and case.n_views % 2 == 0 and case.spec.angle_range == 180


def _clean(case: Case, _: Any) -> Array:
    return case.clean


def _noisy(case: Case, _: Any) -> Array:
    return case.noisy


@dataclass(frozen=True)
class Method:
    """A row of the tables."""

    key: str
    text: str
    """What the table calls it."""
    tasks: tuple[str, ...]
    run: Callable[[Case, Any], Array]
    """Case and model -> images [B, C, H, W]."""
    model: type[TrainedModel] | type[TrainedUNet] | None = TrainedModel
    """Kind of model that it runs; None: it needs none."""
    beside: bool = False
    """Whether models beside the one that is evaluated get a row, too."""
    when: Callable[[Case, Any], bool] = _noisy_case
    """Whether it means anything for a case and a model."""
    against: Callable[[Case, Any], Array] = _clean
    """Case and model -> the truth."""
    clip: bool = True
    """Whether images are cut to [0, 1] before they are scored."""
    own: bool = False
    """It says more of what the model was trained on, and nothing elsewhere."""
    finds: bool = False
    """It takes the view counts that were found, which are scored with it."""
    given: bool = False
    """The answer is there before any work is done."""
    every: int = 1
    """Only images whose hash is a multiple of it are scored."""
    fit: Callable[[Fitting, int], Restore] | None = None
    """Of a baseline: validation and training images and a noise id -> what cleans a case."""
    costly: bool = False
    """A baseline of seconds an image, which is run only where it is asked for."""
    operator: bool = False
    """A baseline that knows the operator of whole images, which crops of larger ones have not."""


def _baseline(key: str, text: str, fit: Callable[[Fitting, int], Restore], **more: Any) -> Method:
    settings: dict[str, Any] = {
        "tasks": REMOVE,
        "run": lambda case, _: case.fitted[key](case),
        "model": None,
        "when": lambda case, _: key in case.fitted,
    }
    return Method(key, text, fit=fit, **(settings | more))


def _swap(case: Case, model: TrainedModel) -> Array:
    return swap(model.model, case.noisy, model.codes.mean(0), noise_ids=case.noise_ids)


def _swap_random(case: Case, model: TrainedModel) -> Array:
    donor = np.array([hash64(name) % model.codes.n_donors for name in case.names])
    codes = model.codes.pick(0, donor)
    return swap(model.model, case.noisy, codes, noise_ids=case.noise_ids)


def _swap_mirror(case: Case, model: TrainedModel) -> Array:
    """Mean of the swap over the image and its mirror image at the diagonal, mirrored back.

    That turns a projection into one of the same scan where an even n_views go half round. Mirrored
    left to right, the centre of rotation of an even number of pixels moves by one, and so the noise
    is another.
    """
    turned = dataclasses.replace(case, noisy=case.noisy.swapaxes(2, 3))
    return 0.5 * (_swap(case, model) + _swap(turned, model).swapaxes(2, 3))


def _swap_detected(case: Case, model: TrainedModel) -> Array:
    ids = detect(model.model, model.codes, case.noisy)
    return _swap(dataclasses.replace(case, noise_ids=ids), model)


def _swap_told(case: Case, model: TrainedModel) -> Array:
    codes, geometry = model.codes.mean(0), model.geometry(case.n_views)
    return swap(model.model, case.noisy, codes, noise_ids=case.noise_ids, geometry=geometry)


def _swap_found(case: Case, model: TrainedModel) -> Array:
    assert case.found is not None
    codes = model.codes.mean(0)
    if isinstance(model.model.noise_maker, ViewCountMaker):
        return swap(model.model, case.noisy, codes, told=case.found)
    out = np.empty_like(case.noisy)
    for n_views in np.unique(case.found):
        which = case.found == n_views
        geometry = model.geometry(int(n_views))
        out[which] = swap(model.model, case.noisy[which], codes, geometry=geometry)
    return out


def _hdn(case: Case, model: TrainedModel) -> Array:
    return swap(model.model, case.noisy, None, noise_ids=case.noise_ids, prior_levels=1)


def _recon(case: Case, model: TrainedModel) -> Array:
    return swap(model.model, case.noisy, None, noise_ids=case.noise_ids)


def _inject(case: Case, model: TrainedModel) -> Array:
    return swap(model.model, case.clean, model.codes.mean(int(case.noise_ids[0])))


def _authority(case: Case, model: TrainedModel) -> Array:
    return exchanged(model.model, case.noisy, case.noise_ids)


def _others(case: Case, model: TrainedModel) -> Array:
    return with_channels(case.noisy, model.model.channels)[::-1]


@torch.inference_mode()
def exchanged(model: HVAE, noisy: Array, ids: Labels) -> Array:
    """All codes of image n - 1 - i decoded in the place of image i: [B, C, H, W]."""
    x = torch.from_numpy(with_channels(noisy, model.channels))
    codes = model(x, noise_ids=torch.from_numpy(ids)).codes
    codes.content = [level.flip(0) for level in codes.content]
    codes.noise = [level.flip(0) for level in codes.noise]
    return model.decode(codes).numpy()


_ORDERED = (
    Method("noisy", "noisy input", REMOVE, _noisy, model=None, given=True),
    _baseline("tv", "total variation, weight chosen on validation images", fit_tv),
    _baseline(
        "tvrec",
        "total variation reconstruction, knows the operator and its view count",
        fit_tvrec,
        operator=True,
        costly=True,
    ),
    _baseline(
        "sart",
        "SART from the sinogram (every eighth image or so)",
        fit_sart,
        tasks=("remove",),
        every=SART_EVERY,
        operator=True,
    ),
    _baseline(
        "lmmse", "linear MMSE, knows the operator and its view count", fit_lmmse, operator=True
    ),
    Method(
        "unet",
        "supervised U-Net",
        REMOVE,
        lambda case, model: regress(model.model, case.noisy, case.noise_ids),
        model=TrainedUNet,
        beside=True,
        when=lambda case, model: case.spec is not None and not isinstance(model.model, ItNet),
    ),
    Method(
        "itnet",
        "U-Net and exact step, four times (ItNet), knows the operator and its view count",
        REMOVE,
        lambda case, model: regress(model.model, case.noisy, case.noise_ids, geometry=case.spec),
        model=TrainedUNet,
        beside=True,
        when=lambda case, model: case.spec is not None and isinstance(model.model, ItNet),
    ),
    Method("swap", "**noise removed**, mean clean noise code", REMOVE, _swap, beside=True),
    Method(
        "swap_random", "**noise removed**, random clean donor", ("remove",), _swap_random, own=True
    ),
    Method(
        "swap_mirror",
        "noise removed, mean over the image and its mirror image at the diagonal",
        ("remove",),
        _swap_mirror,
        own=True,
        when=_mirrored,
    ),
    Method(
        "swap_detected",
        "noise removed, view count detected",
        ("remove",),
        _swap_detected,
        own=True,
        when=lambda case, model: model.config.model.physics,
    ),
    Method(
        "swap_told",
        "**noise removed**, told the view count",
        REMOVE,
        _swap_told,
        when=lambda case, model: (
            (case.elsewhere or case.task == "remove_unseen") and model.model.unrolls
        ),
    ),
    Method(
        "swap_found",
        "**noise removed**, view count found by itself",
        REMOVE,
        _swap_found,
        when=lambda case, model: case.found is not None,
        finds=True,
    ),
    Method("hdn", "finest content from the prior, no swap (HDN mode)", ("remove",), _hdn, own=True),
    Method(
        "recon_clean",
        "reconstruction of the clean image",
        ("make",),
        lambda case, model: swap(model.model, case.clean, None),
        when=lambda case, _: case.spec is None,
    ),
    Method(
        "recon",
        "reconstruction of the noisy image, against it",
        ("make",),
        _recon,
        against=_noisy,
        clip=False,
    ),
    Method(
        "authority",
        "all codes of another noisy image, against that image",
        ("make",),
        _authority,
        beside=True,
        against=_others,
        clip=False,
    ),
    Method(
        "inject",
        "**noise injected**, against the true noisy image",
        ("make",),
        _inject,
        beside=True,
        against=_noisy,
        clip=False,
    ),
    Method(
        "no_inject",
        "clean image as it is, against the true noisy image",
        ("make",),
        _clean,
        model=None,
        against=_noisy,
        clip=False,
        given=True,
    ),
)
METHODS = {method.key: method for method in _ORDERED}
"""By key, in the order of the tables."""
BASELINES = tuple(key for key, method in METHODS.items() if method.fit)
QUICK_BASELINES = tuple(key for key in BASELINES if not METHODS[key].costly)
"""Those that are run where none are named."""
