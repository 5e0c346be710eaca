"""The noise operator on tensors: equality with the one on arrays."""

import numpy as np
import pytest
import torch

from snr_ray.noise.operator import NoiseSpec, noise_operator
from snr_ray.noise.tensors import (
    Counts,
    adjoint_of_each,
    adjoint_of_spec,
    noise_of_each,
    noise_of_spec,
)

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
    noisy = noise_of_spec(torch.from_numpy(x).to(device), spec)
    assert noisy.device.type == device
    assert np.abs(noisy.cpu().numpy() - noise_operator(spec, height, width)(x)).max() <= 1e-4


def test_gradients_are_those_of_the_linear_map() -> None:
    spec = NoiseSpec(9)
    x, way, step = torch.rand(3, 2, 13, 16, generator=torch.manual_seed(0))
    x.requires_grad_()
    (gradient,) = torch.autograd.grad((noise_of_spec(x, spec) * way).sum(), x)
    with torch.no_grad():  # affine, so a difference is exact
        difference = ((noise_of_spec(x + step, spec) - noise_of_spec(x, spec)) * way).sum()
    assert float((gradient * step).sum()) == pytest.approx(float(difference), rel=1e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_adjoints_have_gradients_too(device: str) -> None:
    spec, counts = NoiseSpec(9), Counts(torch.tensor([9, 0, 5], device=device), 5, 9)
    x, way = torch.randn(2, 3, 1, 13, 16, generator=torch.manual_seed(0)).to(device)
    x.requires_grad_()
    for adjoint, noise in (
        (adjoint_of_spec(x, spec), noise_of_spec(way, spec)),
        (adjoint_of_each(x, counts, "hann", 90.0), noise_of_each(way, counts, "hann", 90.0)),
    ):
        (gradient,) = torch.autograd.grad((adjoint * way).sum(), x)
        torch.testing.assert_close(gradient, noise)
    # And so a gradient has a gradient.
    (first,) = torch.autograd.grad(noise_of_spec(x, spec).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((first * way).sum(), x)
    again = adjoint_of_spec(noise_of_spec(way, spec), spec)
    torch.testing.assert_close(second, 2 * again, atol=1e-4, rtol=1e-4)
