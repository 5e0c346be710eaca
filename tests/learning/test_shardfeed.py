"""Batches from shards: every row once per epoch, each in its own order; functions of the step."""

import numpy as np
import pytest
import torch

from snr_ray import configfile as configs
from snr_ray.config import Config
from snr_ray.images.datafolder import DataFolder, tensors
from snr_ray.learning import shardfeed
from snr_ray.learning.batches import Batch, Share
from snr_ray.learning.shardfeed import ShardFeed
from snr_ray.stages.simulation.simulate import simulate

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_2_cpus")]


@pytest.fixture(scope="module")
def config(tiny: Config) -> Config:
    return configs.replace(tiny, {"images.limit": 900, "train.batch_size": 16})


@pytest.fixture(scope="module")
def folder(
    config: Config, ray_2_cpus: None, tmp_path_factory: pytest.TempPathFactory
) -> DataFolder:
    patch = pytest.MonkeyPatch()
    patch.setattr("snr_ray.stages.simulation.simulate.GROUP_BYTES", 120_000)  # 39 rows
    patch.setattr(shardfeed, "WINDOW_BYTES", 500_000)
    data = simulate(config, images="glyphs", out=tmp_path_factory.mktemp("data") / "d").out
    yield DataFolder.open(data)
    patch.undo()


def clean_rows(feed: ShardFeed, steps: range) -> np.ndarray:
    return np.concatenate([feed.batch(step).clean.flatten(1).numpy() for step in steps])


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a.clean, b.clean) and torch.equal(a.noisy, b.noisy)


def stored(folder: DataFolder) -> dict[bytes, np.ndarray]:
    """Noisy versions [n_ids, C, H, W] by the bytes of the clean image, read as any tool would."""
    import pyarrow.parquet as pq

    table = pq.read_table(f"{folder.place}/train")
    clean, *noisy = (tensors(table[name]) for name in ("clean", "noisy_12", "noisy_6"))
    return {x.tobytes(): y for x, y in zip(clean, np.stack(noisy, axis=1), strict=True)}


def test_an_epoch_has_every_row_once_with_its_noisy_versions(
    config: Config, folder: DataFolder
) -> None:
    feed, rows = ShardFeed(folder, config, Share()), stored(folder)
    assert len(feed.groups) > 2 * feed.groups_per_window > 2
    assert feed.steps_per_epoch == feed.n_rows // 16
    seen = set()
    for step in range(feed.steps_per_epoch):
        batch = feed.batch(step)
        for clean, noisy in zip(batch.clean.numpy(), batch.noisy.numpy(), strict=True):
            np.testing.assert_array_equal(noisy, rows[clean.tobytes()])
            seen.add(clean.tobytes())
    assert len(seen) == feed.steps_per_epoch * 16 > feed.n_rows - 16
    assert len(feed._windows) <= 3  # old windows are let go


def test_epochs_differ_and_mix_row_groups(config: Config, folder: DataFolder) -> None:
    feed = ShardFeed(folder, config, Share())
    n = feed.steps_per_epoch
    first, second = clean_rows(feed, range(n)), clean_rows(feed, range(n, 2 * n))
    assert not np.array_equal(first, second)
    stored_order = np.concatenate([np.frombuffer(key, np.float32)[None] for key in stored(folder)])
    place = {row.tobytes(): k for k, row in enumerate(stored_order)}
    places = np.array([place[row.tobytes()] for row in first])
    assert np.mean(np.abs(np.diff(places)) == 1) < 0.1


def test_a_batch_depends_on_seed_and_step_alone(config: Config, folder: DataFolder) -> None:
    feed = ShardFeed(folder, config, Share())
    middle = feed.steps_per_epoch + 7
    walked = [feed.batch(step) for step in range(middle + 1)][-1]
    assert same(ShardFeed(folder, config, Share()).batch(middle), walked)
    other = configs.replace(config, {"seed": 1})
    assert not same(ShardFeed(folder, other, Share()).batch(middle), walked)


def test_shares_of_all_workers_are_the_batch_of_one(config: Config, folder: DataFolder) -> None:
    whole = ShardFeed(folder, config, Share())
    parts = [ShardFeed(folder, config, Share(rank, 4)) for rank in range(4)]
    for step in range(whole.steps_per_epoch - 2, whole.steps_per_epoch + 2):
        shares = [part.batch(step) for part in parts]
        joined = Batch(
            torch.cat([share.clean for share in shares]),
            torch.cat([share.noisy for share in shares]),
        )
        assert same(joined, whole.batch(step))
