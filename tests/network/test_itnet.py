"""The baseline of a U-Net and an exact step: what the steps do, and what it is told."""

import itertools

import numpy as np
import pytest
import torch
from random_models import images
from torch import Tensor

from snr_ray import configfile as configs
from snr_ray.config import Config
from snr_ray.errors import InputError
from snr_ray.learning.build import build_model
from snr_ray.network.itnet import ItNet
from snr_ray.network.noisemaker import Alike
from snr_ray.network.unet import regress
from snr_ray.noise.operator import NoiseSpec, noise_specs


@pytest.fixture
def itnet(tiny: Config) -> ItNet:
    model = build_model(configs.replace(tiny, {"model.kind": "itnet"})).eval()
    assert isinstance(model, ItNet)
    return model


@pytest.fixture(scope="module")
def noisy(tiny: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Clean images, the same under noise ids 1, 2, 1, 2, and the ids."""
    clean = torch.from_numpy(images(4))
    both = [Alike(spec)(clean) for spec in noise_specs(tiny.noise)]
    return clean, torch.stack([both[k % 2][k] for k in range(4)]), torch.tensor([1, 2, 1, 2])


@torch.no_grad()
def test_each_step_explains_more_where_the_network_changes_nothing(
    tiny: Config, itnet: ItNet, noisy: tuple[Tensor, Tensor, Tensor]
) -> None:
    _, x, ids = noisy
    itnet.head.weight.zero_()
    itnet.head.bias.zero_()  # type: ignore[union-attr]
    left = []
    for steps in range(5):
        itnet.rates = torch.nn.Parameter(torch.ones(steps))
        answer = itnet(x, ids)
        spec = noise_specs(tiny.noise)[0]
        left.append((x[::2] - Alike(spec)(answer[::2])).square().sum((1, 2, 3)))
        if not steps:
            torch.testing.assert_close(answer, x)
    assert all((after < before).all() for before, after in itertools.pairwise(left))
    assert (left[4] < 0.3 * left[0]).all()


@torch.no_grad()
def test_an_answer_gets_the_noise_of_its_image(
    itnet: ItNet, noisy: tuple[Tensor, Tensor, Tensor]
) -> None:
    clean, x, ids = noisy
    again = itnet._noise(ids, None, 16)(clean)
    torch.testing.assert_close(again, x, atol=1e-5, rtol=0)
    nothing = itnet._noise(torch.zeros_like(ids), None, 16)(clean)
    torch.testing.assert_close(nothing, clean)


def test_it_is_told_by_id_or_by_geometry_also_of_counts_that_it_never_saw(
    tiny: Config, itnet: ItNet, noisy: tuple[Tensor, Tensor, Tensor]
) -> None:
    _, x, ids = noisy
    spec = noise_specs(tiny.noise)[0]
    by_id = regress(itnet, x.numpy(), np.full(4, 1))
    np.testing.assert_allclose(regress(itnet, x.numpy(), ids.numpy(), geometry=spec), by_id)
    mixed = regress(itnet, x.numpy(), ids.numpy())
    np.testing.assert_allclose(mixed[::2], by_id[::2], atol=1e-5)
    other = regress(itnet, x.numpy(), ids.numpy(), geometry=NoiseSpec(9))
    assert np.abs(other - by_id).max() > 1e-3


def test_settings_that_do_not_fit_are_refused(tiny: Config) -> None:
    for changes in ({"model.unrolled": 0}, {"model.physics": True}):
        with pytest.raises(InputError, match=r"model\.kind=itnet needs model\.unrolled"):
            configs.replace(tiny, {"model.kind": "itnet", **changes})
