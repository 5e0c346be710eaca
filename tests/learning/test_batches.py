"""Training batches: partners, shares, order, and independence of how pairs arrived."""

import numpy as np
import pytest
import torch

from snr_ray.errors import InputError
from snr_ray.learning.batches import PairFeed, Pairs, Share, StepNormal


def make_pairs(n: int = 50, cuts: tuple[int, ...] = (), order: np.ndarray | None = None) -> Pairs:
    """n pairs of 1x4x4 images; pixel values tell the image and the noise id."""
    order = np.arange(n) if order is None else order
    clean = np.repeat(order.astype(np.float32), 16).reshape(n, 1, 4, 4)
    blocks = np.split(clean, cuts)
    noisy = [[block + 1000 * k for block in blocks] for k in (1, 2, 3)]
    return Pairs([f"{i:03d}" for i in order], blocks, noisy)


def test_take_finds_every_version_through_blocks() -> None:
    pairs = make_pairs(cuts=(7, 7, 30))
    rows = np.array([49, 0, 7, 30, 6])
    assert pairs.take(rows, 0)[:, 0, 0, 0].tolist() == rows.tolist()
    assert pairs.take(rows, 2)[:, 0, 0, 0].tolist() == (rows + 2000).tolist()


def test_rows_do_not_depend_on_the_order_of_arrival() -> None:
    shuffled = make_pairs(cuts=(11, 40), order=np.random.default_rng(0).permutation(50))
    rows = np.arange(50)
    np.testing.assert_array_equal(shuffled.take(rows, 1), make_pairs().take(rows, 1))


def test_a_sample_stands_for_all_classes_whatever_the_order_of_arrival() -> None:
    ids = [f"{label}/{k:02d}" for label in "abcd" for k in range(50)]
    arrived = [ids[k] for k in np.random.default_rng(0).permutation(200)]
    image = np.zeros((200, 1, 4, 4), np.float32)
    pairs, others = (Pairs(names, [image], [[image]]) for names in (ids, arrived))
    chosen = pairs.names(pairs.sample(40))
    assert chosen == others.names(others.sample(40)) == sorted(chosen)
    assert len(set(chosen)) == 40
    assert min(sum(name[0] == label for name in chosen) for label in "abcd") > 4
    assert set(pairs.names(pairs.sample(10))) < set(chosen)
    assert pairs.sample(300).tolist() == pairs.sample(200).tolist() == list(range(200))


def test_noisy_versions_are_the_clean_image_under_every_id() -> None:
    batch = PairFeed(make_pairs(), 12, seed=0, share=Share()).batch(3)
    expected = batch.clean[:, None] + 1000 * torch.arange(1, 4)[:, None, None, None]
    torch.testing.assert_close(batch.noisy, expected)


@pytest.mark.parametrize("world_size", [2, 4])
def test_shares_of_all_workers_are_the_batch_of_one(world_size: int) -> None:
    whole = PairFeed(make_pairs(), 24, seed=5, share=Share())
    parts = [PairFeed(make_pairs(), 24, seed=5, share=Share(r, world_size))
             for r in range(world_size)]  # fmt: skip
    for step in (0, 1, 5):
        joined = torch.cat([part.batch(step).noisy for part in parts])
        torch.testing.assert_close(joined, whole.batch(step).noisy)


def test_epoch_shows_every_image_once_and_the_next_in_another_order() -> None:
    feed = PairFeed(make_pairs(48), 12, seed=0, share=Share())
    epochs = [
        torch.cat([feed.batch(4 * epoch + k).clean[:, 0, 0, 0] for k in range(4)]).tolist()
        for epoch in range(2)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(48))
    assert epochs[0] != epochs[1]


def test_batches_from_a_step_continue_the_same_run() -> None:
    feed, again = (PairFeed(make_pairs(), 12, seed=1, share=Share()) for _ in range(2))
    unbroken = feed.batches(0)
    for _ in range(6):
        next(unbroken)
    torch.testing.assert_close(next(again.batches(6)).noisy, next(unbroken).noisy)


def test_too_few_images_are_refused() -> None:
    with pytest.raises(InputError, match=r"train\.batch_size = 12\), but the train split holds 5"):
        PairFeed(make_pairs(5), 12, seed=0, share=Share())


def test_sampling_noise_of_shares_joins_to_that_of_one() -> None:
    device = torch.device("cpu")
    whole = StepNormal(3, 7, Share(), device)
    parts = [StepNormal(3, 7, Share(r, 2), device) for r in range(2)]
    for shape in ((8, 2, 3), (8, 5)):
        half = (shape[0] // 2, *shape[1:])
        torch.testing.assert_close(torch.cat([part(half) for part in parts]), whole(shape))
    torch.testing.assert_close(torch.cat([part.uniform(4) for part in parts]), whole.uniform(8))
