"""The noise operator on tensors: equality with the one on arrays."""

import numpy as np
import pytest
import torch

from snr_ray.errors import InputError
from snr_ray.noise.operator import NoiseSpec, noise_operator
from snr_ray.noise.tensors import TorchNoise

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("height", "width", "spec"),
    [
        (28, 28, NoiseSpec(10)),
        (33, 20, NoiseSpec(7, "hann")),
        (96, 96, NoiseSpec(1)),
        (128, 128, NoiseSpec(30, angle_range=120.0)),
    ],
)
def test_tensors_equal_arrays(device: str, height: int, width: int, spec: NoiseSpec) -> None:
    x = np.random.default_rng(height).random((3, 2, height, width), dtype=np.float32)
    noise = noise_operator(spec, height, width)
    noisy = TorchNoise(noise).to(device)(torch.from_numpy(x).to(device))
    assert noisy.device.type == device
    assert np.abs(noisy.cpu().numpy() - noise(x)).max() <= 1e-4


def test_photon_noise_is_refused() -> None:
    with pytest.raises(InputError, match="counts no photons, but got 100"):
        TorchNoise(noise_operator(NoiseSpec(4, photons=100), 16, 16))


def test_other_shape_is_refused() -> None:
    with pytest.raises(InputError, match="16x16 images, but got 16x17"):
        TorchNoise(noise_operator(NoiseSpec(4), 16, 16))(torch.zeros(1, 16, 17))


def test_gradients_are_those_of_the_linear_map() -> None:
    noise = TorchNoise(noise_operator(NoiseSpec(9), 13, 16))
    x, way, step = torch.rand(3, 2, 13, 16, generator=torch.manual_seed(0))
    x.requires_grad_()
    (gradient,) = torch.autograd.grad((noise(x) * way).sum(), x)
    with torch.no_grad():  # affine, so a difference is exact
        difference = ((noise(x + step) - noise(x)) * way).sum()
    assert float((gradient * step).sum()) == pytest.approx(float(difference), rel=1e-3)
