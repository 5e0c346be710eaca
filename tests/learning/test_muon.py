"""The optimizer of the kernels: all directions of a gradient move alike, whatever their size."""

import pytest
import torch
from torch import nn

from snr_ray.learning.muon import RMS, Muon, orthogonal


@pytest.mark.parametrize("shape", [(3, 16, 144), (2, 96, 32), (1, 1, 9)])
def test_singular_values_move_near_one(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrices))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_directions_stay_and_only_their_lengths_change() -> None:
    left, _ = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(1)))
    lengths = torch.linspace(0.1, 1.0, 12)
    result = orthogonal((left * lengths)[None])[0]
    expected = orthogonal(torch.diag(lengths)[None])[0]
    torch.testing.assert_close(result, left @ expected, atol=1e-4, rtol=1e-3)


def test_the_size_of_the_gradient_does_not_matter() -> None:
    steps = []
    for scale in (1e-4, 1e3):
        kernel = nn.Parameter(torch.zeros(8, 4, 3, 3))
        kernel.grad = scale * torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(2))
        Muon([kernel], lr=0.01).step()
        steps.append(kernel.detach().clone())
    torch.testing.assert_close(*steps)
    # As long a step as Adam's, so both share one learning rate.
    assert steps[0].square().mean().sqrt() == pytest.approx(0.01 * RMS, rel=0.2)


def test_a_kernel_without_gradient_stays() -> None:
    kernel = nn.Parameter(torch.ones(2, 2, 3, 3))
    Muon([kernel], lr=0.1).step()
    assert torch.equal(kernel, torch.ones(2, 2, 3, 3))


def test_it_solves_least_squares_of_a_convolution() -> None:
    generator = torch.Generator().manual_seed(3)
    x, truth = torch.randn(16, 3, 8, 8, generator=generator), nn.Conv2d(3, 5, 3, bias=False)
    found = nn.Conv2d(3, 5, 3, bias=False)
    optimizer = Muon([found.weight], lr=0.05)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 200)
        optimizer.zero_grad()
        (found(x) - truth(x).detach()).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(found.weight, truth.weight, atol=0.01, rtol=0)
