"""A run without Ray: it learns, goes on as if unbroken, stops when told, and gives up in time."""

import math
from pathlib import Path

import pytest
import torch

from snr_ray import configfile as configs
from snr_ray.config import Config
from snr_ray.learning import health
from snr_ray.learning.batches import PairFeed, Pairs, Share
from snr_ray.learning.fit import fit
from snr_ray.learning.health import Diverged
from snr_ray.learning.learner import Learner
from snr_ray.learning.restart import load_checkpoint, save_checkpoint
from snr_ray.learning.validation import Metrics, donor_codes, validate


def _run(config: Config, pairs: Pairs, learner: Learner) -> list[Metrics]:
    feed = PairFeed(pairs, config.train.batch_size, seed=config.seed, share=Share())
    logged: list[Metrics] = []
    fit(learner, feed.batches(learner.step), log=logged.append, checkpoint=lambda last: False)
    return logged


def test_training_learns_letters(tiny: Config, pairs: Pairs) -> None:
    config = configs.replace(tiny, {"train.steps": 200, "train.ema": 0.9})
    learner = Learner(config)
    before = validate(learner.average, donor_codes(learner.average, pairs), pairs, (12, 6))
    logged = _run(config, pairs, learner)
    after = validate(learner.average, donor_codes(learner.average, pairs), pairs, (12, 6))
    assert logged[-1]["loss"] < logged[0]["loss"] / 3
    assert after["swap_psnr"] > before["swap_psnr"] + 3
    assert set(after) == {"swap_psnr", "swap_psnr_12", "swap_psnr_6", "recon_clean_psnr",
                          "recon_noisy_psnr", "inject_psnr"}  # fmt: skip
    assert {"kl_content_0", "kl_noise_1", "distance_same_id", "grad_norm"} <= set(logged[-1])
    assert logged[-1]["triplet"] < logged[0]["triplet"] - 0.1
    assert logged[-1]["distance_clean_noisy"] > logged[0]["distance_clean_noisy"] + 0.1


@pytest.mark.parametrize("around", [[], [6, 8]])
def test_resumed_run_equals_an_unbroken_one(
    tiny: Config, pairs: Pairs, tmp_path: Path, around: list[int]
) -> None:
    tiny = configs.replace(tiny, {"model.step_channels": around})
    unbroken = Learner(tiny)
    _run(tiny, pairs, unbroken)
    first = Learner(tiny)
    feed = PairFeed(pairs, tiny.train.batch_size, seed=tiny.seed, share=Share())
    for step in range(7):
        first.train_step(feed.batch(step))
    save_checkpoint(tmp_path, first)
    resumed = Learner(configs.replace(tiny, {"train.num_workers": 1}))
    load_checkpoint(tmp_path / "step-000000007", resumed)
    _run(tiny, pairs, resumed)
    for a, b in zip(unbroken.average.parameters(), resumed.average.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_same_seed_same_weights_and_another_seed_others(tiny: Config, pairs: Pairs) -> None:
    runs = []
    for seed in (0, 0, 1):
        learner = Learner(configs.replace(tiny, {"seed": seed}))
        _run(tiny, pairs, learner)
        runs.append(torch.cat([p.flatten() for p in learner.average.parameters()]))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_checkpoint_callback_can_stop_early(tiny: Config, pairs: Pairs) -> None:
    learner = Learner(tiny)
    feed = PairFeed(pairs, tiny.train.batch_size, seed=0, share=Share())
    calls: list[bool] = []

    def stop(last: bool) -> bool:
        calls.append(last)
        return True

    fit(learner, feed.batches(0), log=lambda m: None, checkpoint=stop)
    assert (learner.step, calls) == (tiny.train.checkpoint_every_steps, [False])


def test_a_learner_at_the_end_has_its_result_written(tiny: Config) -> None:
    learner, calls = Learner(tiny), list[bool]()
    learner.step = tiny.train.steps
    fit(learner, iter(()), log=lambda m: None, checkpoint=calls.append)
    assert calls == [True]


def test_unet_learns_letters(tiny: Config, pairs: Pairs) -> None:
    config = configs.replace(tiny, {"model.kind": "unet", "train.steps": 300, "train.ema": 0.9})
    learner = Learner(config)
    codes, before = learner.validate(pairs, pairs)
    _run(config, pairs, learner)
    _, after = learner.validate(pairs, pairs)
    assert codes is None
    assert set(after) == {"unet_psnr", "unet_psnr_12", "unet_psnr_6"}
    assert after["unet_psnr"] > before["unet_psnr"] + 2


def test_a_run_that_diverged_is_no_success(tiny: Config, pairs: Pairs) -> None:
    config = configs.replace(tiny, {"train.lr": 1.0, "train.steps": 200, "train.warmup_steps": 10})
    feed = PairFeed(pairs, config.train.batch_size, seed=0, share=Share())
    learner, logged, saved = Learner(config), [], []
    with pytest.raises(Diverged, match=r"train\.lr \(it was 1\)"):
        fit(learner, feed.batches(0), log=logged.append, checkpoint=saved.append)
    assert learner.step < 150
    assert True not in saved


def test_a_run_that_goes_on_has_as_much_time_to_come_back(
    tiny: Config, pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "LOSS_RATIO", -1e6)  # all losses are far above the first
    config = configs.replace(tiny, {"train.steps": 400, "train.checkpoint_every_steps": 400})
    learner = Learner(config)
    learner.step = 395  # as loaded from a state
    learner.first_loss = torch.tensor(1.0)
    with pytest.raises(Diverged, match="since step 395"):
        _run(config, pairs, learner)


@pytest.mark.parametrize("resumed", [False, True])
def test_a_run_whose_first_step_is_bad_is_still_given_up(
    tiny: Config, pairs: Pairs, resumed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "LOSS_RATIO", -1e6)  # all losses are far above the first
    config = configs.replace(tiny, {"train.steps": 3, "train.checkpoint_every_steps": 3})
    feed = PairFeed(pairs, config.train.batch_size, seed=0, share=Share())
    bad, *good = (feed.batch(step) for step in range(3))
    bad.noisy[0] = float("nan")
    learner = Learner(config)
    if resumed:
        learner.train_step(bad)
        state = learner.state()
        learner = Learner(config)
        learner.load_state(state)
    with pytest.raises(Diverged, match=r"at step 3 the loss is \d.*far above the \d"):
        fit(learner, iter(good if resumed else [bad, *good]), log=lambda m: None,
            checkpoint=lambda last: False)  # fmt: skip


def test_one_bad_batch_is_skipped_and_told(tiny: Config, pairs: Pairs) -> None:
    config = configs.replace(tiny, {"train.steps": 6})
    feed = PairFeed(pairs, config.train.batch_size, seed=0, share=Share())
    batches = [feed.batch(step) for step in range(6)]
    batches[3].noisy[0] = float("nan")
    learner, logged = Learner(config), []
    fit(learner, iter(batches), log=logged.append, checkpoint=lambda last: False)
    assert (logged[-1]["step"], logged[-1]["skipped"]) == (6, 1)
    assert math.isfinite(logged[-1]["loss"])
    assert logged[-1]["grad_norm"] > 0
    again = Learner(config)
    again.load_state(learner.state())
    assert again.skipped == 1
