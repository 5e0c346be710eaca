"""What a step costs: its parts add up, and what is counted is counted."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from snr_ray import configfile as configs
from snr_ray.config import Config
from snr_ray.learning.batches import PairFeed, Pairs, Share
from snr_ray.learning.learner import Learner
from snr_ray.learning.mixed import MixedFeed, Pictures
from snr_ray.stages.measuring.benchstep import PARTS, Launches, _measure

WAITS = {"nonzero", "_local_scalar_dense", "masked_select", "item"}
"""Operations whose shape depends on numbers, or that a host waits for."""


@pytest.fixture(scope="module")
def pairs(tiny: Config) -> Pairs:
    shape = (16, 1, 16, 16)
    images = [
        torch.rand(shape, generator=torch.Generator().manual_seed(k)).numpy() for k in (0, 1, 2)
    ]
    return Pairs([f"{k:02d}" for k in range(16)], images[:1], [[images[1]], [images[2]]])


class SameShape(TorchDispatchMode):
    """Fails on whatever depends on numbers: `WAITS`, and masks as indices."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = op.overloadpacket.__name__
        assert name not in WAITS, name
        if name.strip("_").startswith("index"):
            for index in tree_leaves(args[1:]):
                assert not (isinstance(index, torch.Tensor) and index.dtype == torch.bool), name
        return op(*args, **(kwargs or {}))


def test_operations_on_lists_and_views_are_counted_once_and_not_at_all() -> None:
    x = [torch.ones(3, 4) for _ in range(5)]
    with Launches() as launches:
        torch._foreach_add_(x, 1.0)
        x[0].T.reshape(-1)[:2].view(2, 1)
        x[0] @ x[1].T
    assert dict(launches.of) == {"_foreach_add_": 1, "clone": 1, "mm": 1}


def test_the_parts_of_a_step_add_up(tiny: Config, pairs: Pairs) -> None:
    row = _measure(tiny, pairs, "cpu")
    shares = [row[f"{name}_share"] for name in PARTS]
    assert min(shares) > 0
    assert 0.7 < sum(shares) < 1.0
    assert row["images_per_s"] == pytest.approx(1000 * tiny.train.batch_size / row["ms_per_step"])
    assert 0 < row["matrix_rate_share"] < 1


@pytest.mark.parametrize(("preset", "most"), [("paired", 145), ("unet", 145), ("itnet", 145)])
def test_moving_the_weights_waits_for_nothing_and_is_few_operations(
    tiny: Config, pairs: Pairs, preset: str, most: int
) -> None:
    learner = Learner(configs.load(["smoke", preset]))
    batch = PairFeed(pairs, 8, seed=0, share=Share()).batch(0)
    learner.train_step(batch)
    learner.gradients(batch)
    with Launches() as launches:
        learner.update()
    assert not WAITS & set(launches.of)
    assert launches.total <= most


@pytest.mark.parametrize(
    ("preset", "most"), [("paired", 1200), ("network", 800), ("unet", 400), ("itnet", 900)]
)
def test_a_step_on_a_gpu_does_the_same_whatever_the_numbers(
    pairs: Pairs, preset: str, most: int
) -> None:
    learner, like_cpu = (Learner(configs.load(["smoke", preset])) for _ in range(2))
    feed = PairFeed(pairs, 8, seed=0, share=Share())
    for step in range(3):
        like_cpu.train_step(feed.batch(step))
        with SameShape() if step else contextlib.nullcontext(), Launches() as launches:
            learner.train_step(feed.batch(step))
    assert launches.total <= most
    weights = zip(learner.objective.parameters(), like_cpu.objective.parameters(), strict=True)
    for a, b in weights:
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("told", [1.0, 0.5])
def test_a_step_of_a_range_does_so_too(told: float) -> None:
    changes = ["noise.views_per_pixel=[0.2,0.9]", "train.sizes=[8,16]", f"train.told={told}"]
    config = configs.load(["smoke"], [*changes, "train.batch_size=8"])
    images = torch.rand((40, 1, 16, 16), generator=torch.Generator().manual_seed(0)).numpy()
    pictures = Pictures({16: ([f"{k:02d}" for k in range(40)], list(images))})
    feed = MixedFeed(pictures, config, Share())
    learner, like_cpu = (Learner(config) for _ in range(2))
    for step in range(3):
        like_cpu.train_step(feed.batch(step))
        with SameShape() if step else contextlib.nullcontext():
            learner.train_step(feed.batch(step))
    weights = zip(learner.objective.parameters(), like_cpu.objective.parameters(), strict=True)
    for a, b in weights:
        assert a.isfinite().all()
        if told == 1:  # others take the nearest count of the batch
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_masks_and_looks_are_found() -> None:
    x = torch.ones(3)
    for look in (lambda: x[x > 0], lambda: x.nonzero(), lambda: float(x[0])):
        with pytest.raises(AssertionError), SameShape():
            look()
