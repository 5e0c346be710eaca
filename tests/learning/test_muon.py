"""The optimizer of the kernels: all directions of a gradient move alike, whatever their size."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from snr_ray import configfile as configs
from snr_ray.learning.build import build_model
from snr_ray.learning.muon import MOMENTUM, RMS, WEIGHT_DECAY, Muon, orthogonal


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


def _kernels(seed: int = 0) -> list[nn.Parameter]:
    """Of a whole network: wide, tall and square ones of many sizes, in channels_last."""
    model = build_model(configs.load(["smoke"])).to(memory_format=torch.channels_last)
    return [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]


def _gradients(kernels: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for kernel in kernels:
        kernel.grad = torch.empty_like(kernel).normal_(std=0.1, generator=generator)


def test_all_kernels_at_once_move_as_each_does_alone() -> None:
    together = _kernels()
    alone = [kernel.detach().clone() for kernel in together]
    momenta = [torch.zeros_like(kernel) for kernel in alone]
    optimizer, lr = Muon(together, lr=0.02), 0.02
    for step in range(4):
        _gradients(together, step)
        optimizer.step()
        for kernel, momentum, moved in zip(alone, momenta, together, strict=True):
            momentum.lerp_(moved.grad, 1 - MOMENTUM)
            matrix = moved.grad.lerp(momentum, MOMENTUM).flatten(1)
            update = orthogonal(matrix[None])[0] * RMS * max(matrix.shape) ** 0.5
            kernel.mul_(1 - lr * WEIGHT_DECAY).sub_(lr * update.view_as(kernel))
    for kernel, moved in zip(alone, together, strict=True):
        torch.testing.assert_close(moved.detach(), kernel, atol=2e-6, rtol=0)


def test_a_step_is_few_operations_however_many_kernels_there_are() -> None:
    class Counted(TorchDispatchMode):
        launches = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.launches += not op.is_view
            return op(*args, **(kwargs or {}))

    kernels = _kernels()
    optimizer = Muon(kernels, lr=0.02)
    for step in range(2):
        _gradients(kernels, step)
        with Counted() as counted:
            optimizer.step()
    assert len(kernels) == 52
    assert counted.launches <= 60


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    kernels = _kernels()
    optimizer = Muon(kernels, lr=0.02)
    _gradients(kernels, 0)
    optimizer.step()
    before = copy.deepcopy((kernels, optimizer.state_dict()))
    kernels[3].grad.fill_(float("nan"))
    kernels[5].grad.fill_(float("inf"))
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    for old, kernel in zip(before[0], kernels, strict=True):
        assert torch.equal(old, kernel)
    for k, state in optimizer.state_dict()["state"].items():
        assert torch.equal(state["momentum"], before[1]["state"][k]["momentum"])


def test_continues_from_its_state() -> None:
    unbroken, broken = _kernels(), _kernels()
    optimizers = [Muon(unbroken, lr=0.02), Muon(broken, lr=0.02)]
    for step in range(4):
        for kernels, optimizer in zip((unbroken, broken), optimizers, strict=True):
            _gradients(kernels, step)
            optimizer.step()
        state = optimizers[1].state_dict()
        optimizers[1] = Muon(broken, lr=0.02)
        optimizers[1].load_state_dict(copy.deepcopy(state))
    for a, b in zip(unbroken, broken, strict=True):
        assert torch.equal(a, b)
