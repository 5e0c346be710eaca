"""Learning without Ray: it learns, workers agree with one, a resumed run equals an unbroken one."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from snr_ray import configfile as configs
from snr_ray.config import Config
from snr_ray.errors import InputError
from snr_ray.images.sources import open_source
from snr_ray.learning.batches import PairFeed, Pairs, Share
from snr_ray.learning.checkpoint import (
    TrainedUNet,
    load_any,
    load_model,
    save_model,
    ship,
)
from snr_ray.learning.fit import Learner, fit
from snr_ray.learning.health import Diverged
from snr_ray.learning.restart import load_checkpoint, save_checkpoint
from snr_ray.learning.validation import Metrics, donor_codes, validate
from snr_ray.network.blocks import PIXEL_OFFSET
from snr_ray.network.swap import swap
from snr_ray.noise.operator import noise_operator, noise_specs


@pytest.fixture(scope="module")
def pairs(tiny: Config) -> Pairs:
    source = open_source("glyphs")
    rows = source.select("train", 250)
    clean = np.stack([source.load(row, tiny.images) for row in rows])
    noisy = [[noise_operator(spec, 16, 16)(clean)] for spec in noise_specs(tiny.noise)]
    return Pairs([source.ids[row] for row in rows], [clean], noisy)


def _gradients(learner: Learner) -> list[torch.Tensor]:
    return [p.grad.clone() for p in learner.objective.parameters() if p.grad is not None]


def _step(config: Config, pairs: Pairs, share: Share) -> list[torch.Tensor]:
    learner = Learner(config, share=share)
    feed = PairFeed(pairs, config.train.batch_size, seed=config.seed, share=share)
    learner.train_step(feed.batch(0))
    return _gradients(learner)


@pytest.mark.parametrize("preset", ["paired", "seed", "unet", "itnet"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_gradients_of_workers_average_to_those_of_one(
    pairs: Pairs, preset: str, world_size: int
) -> None:
    config = configs.load(["smoke", preset], ["train.grad_clip=1e9", "loss.free_bits=0.5"])
    one = _step(config, pairs, Share())
    many = [_step(config, pairs, Share(rank, world_size)) for rank in range(world_size)]
    for k, gradient in enumerate(one):
        mean = torch.stack([worker[k] for worker in many]).mean(0)
        torch.testing.assert_close(mean, gradient, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("preset", ["paired", "unet", "itnet"])
def test_parts_of_a_batch_give_the_gradient_of_as_many_workers_to_the_last_bit(
    pairs: Pairs, preset: str
) -> None:
    config = configs.load(["smoke", preset], ["train.grad_clip=1e9", "train.parts=2"])
    one = _step(config, pairs, Share())
    two = [_step(config, pairs, Share(rank, 2)) for rank in range(2)]
    for k, gradient in enumerate(one):
        assert torch.equal(two[0][k] / 2 + two[1][k] / 2, gradient)


def test_two_workers_have_the_weights_of_one_after_forty_steps(pairs: Pairs) -> None:
    config = configs.load(["smoke"], ["train.steps=40", "train.parts=2"])
    one, two = Learner(config), [Learner(config, share=Share(rank, 2)) for rank in range(2)]
    size = config.train.batch_size
    feeds = [PairFeed(pairs, size, seed=0, share=learner.share) for learner in (one, *two)]
    for step in range(config.train.steps):
        one.train_step(feeds[0].batch(step))
        for learner, feed in zip(two, feeds[1:], strict=True):
            learner.gradients(feed.batch(step))
        both = zip(*(learner.objective.parameters() for learner in two), strict=True)
        for a, b in both:  # as data-parallel workers share them
            if a.grad is not None and b.grad is not None:
                a.grad = a.grad / 2 + b.grad / 2
                b.grad = a.grad.clone()
        for learner in two:
            learner.update()
            learner.step += 1
    for learner in two:
        weights = zip(learner.average.parameters(), one.average.parameters(), strict=True)
        assert max(float((a - b).abs().max()) for a, b in weights) < 1e-5


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


@pytest.mark.parametrize(
    ("kind", "steps", "peak"),
    [("hvae", 500, 1.0), ("hvae", 1000, 1.0), ("hvae", 4000, 0.5), ("hvae", 100_000, 0.1),
     ("unet", 4000, 1.0)],
)  # fmt: skip
def test_rate_rises_to_a_peak_that_falls_with_the_length_of_the_run_but_for_a_unet(
    tiny: Config, pairs: Pairs, kind: str, steps: int, peak: float
) -> None:
    batch = PairFeed(pairs, tiny.train.batch_size, seed=0, share=Share()).batch(0)
    changes = {"model.kind": kind, "train.steps": steps, "train.warmup_steps": 50}
    config = configs.replace(tiny, changes)
    learner, rates = Learner(config), []
    for step in (0, 49, 50, (50 + steps) // 2, steps):
        learner.step = step
        learner.train_step(batch)
        rates.append(learner.optimizers[0].param_groups[0]["lr"] / config.train.lr)
    assert rates == pytest.approx([peak / 50, peak, peak, 0.51 * peak, 0.02 * peak], rel=1e-3)


def test_resumed_run_equals_an_unbroken_one(tiny: Config, pairs: Pairs, tmp_path: Path) -> None:
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


def test_start_gives_the_images_of_the_model_it_is(
    tiny: Config, pairs: Pairs, model_folder: Path
) -> None:
    trained, noisy = load_model(model_folder), pairs.take(np.arange(4), 2)
    expected = swap(trained.model, noisy, trained.codes.mean(0))
    learner = Learner(configs.replace(tiny, {"seed": 5}))
    learner.start_from(trained.model)
    for model in (learner.average, learner.objective.model):
        np.testing.assert_allclose(swap(model, noisy, trained.codes.mean(0)), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("decoder", "unrolled"), [("operator", 0), ("operator", 2), ("network", 0)]
)
def test_start_with_physics_begins_with_the_estimate_or_the_model_as_it_was(
    tiny: Config, pairs: Pairs, decoder: str, unrolled: int
) -> None:
    config = configs.replace(tiny, {"model.decoder": decoder, "model.unrolled": unrolled})
    other, noisy = Learner(config).average, torch.from_numpy(pairs.take(np.arange(4), 2))
    learner = Learner(configs.replace(config, {"model.physics": True, "seed": 5}))
    learner.fit_physics(pairs)
    learner.start_from(other)
    model, ids = learner.average, torch.full((4,), 2)
    guesses: list[torch.Tensor] = []
    if unrolled:
        model.levels[0].steps[0].register_forward_hook(lambda *io: guesses.append(io[-1][1]))
    with torch.inference_mode():
        codes = model(noisy, noise_ids=ids).codes
        if decoder == "network":  # the kernels that read the estimate are still zero
            torch.testing.assert_close(model.decode(codes), other(noisy).image)
        else:
            pixels = model.levels[0].pixels(codes.content[0], codes.size) + PIXEL_OFFSET
            first = guesses[0] if unrolled else pixels
            torch.testing.assert_close(first, model.stem.inverse(noisy, ids))


def test_what_reads_the_estimate_learns_from_the_start(
    tiny: Config, pairs: Pairs, model_folder: Path
) -> None:
    learner = Learner(configs.replace(tiny, {"model.physics": True}))
    learner.fit_physics(pairs)
    learner.start_from(load_model(model_folder).model)
    learner.train_step(PairFeed(pairs, 16, seed=0, share=Share()).batch(0))
    assert (learner.objective.model.stem.conv.weight[:, 1] != 0).any()


def test_step_with_bad_numbers_is_skipped(tiny: Config, pairs: Pairs) -> None:
    learner = Learner(tiny)
    batch = PairFeed(pairs, tiny.train.batch_size, seed=0, share=Share()).batch(0)
    batch.noisy[0] = float("nan")
    before = [p.clone() for p in learner.objective.parameters()]
    learner.train_step(batch)
    assert learner.skipped == 1
    for a, b in zip(before, learner.objective.parameters(), strict=True):
        assert torch.equal(a, b)


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


def test_model_folder_round_trip(tiny: Config, pairs: Pairs, tmp_path: Path) -> None:
    learner = Learner(tiny)
    codes = donor_codes(learner.average, pairs)
    save_model(tmp_path / "model", tiny, learner.average, codes, {"swap_psnr": 1.0}, "tests")
    back = load_model(tmp_path / "model")
    assert back.config == tiny
    for a, b in zip(learner.average.parameters(), back.model.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(codes.donors, back.codes.donors, strict=True):
        assert torch.equal(a, b)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "16x16 grey" in card
    assert not list((tmp_path / "model").glob("*.p*"))  # nothing to unpickle


def test_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds model\.safetensors, but .* does not; `snr train`"):
        load_model(tmp_path)


def test_unet_is_no_model_with_codes(unet_folder: Path, model_folder: Path) -> None:
    with pytest.raises(InputError, match=r"holds a supervised U-Net, the baseline; `snr evaluate"):
        load_model(unet_folder)
    assert isinstance(load_any(unet_folder), TrainedUNet)
    assert not isinstance(load_any(model_folder), TrainedUNet)


def test_unet_learns_letters(tiny: Config, pairs: Pairs) -> None:
    config = configs.replace(tiny, {"model.kind": "unet", "train.steps": 300, "train.ema": 0.9})
    learner = Learner(config)
    codes, before = learner.validate(pairs, pairs)
    _run(config, pairs, learner)
    _, after = learner.validate(pairs, pairs)
    assert codes is None
    assert set(after) == {"unet_psnr", "unet_psnr_12", "unet_psnr_6"}
    assert after["unet_psnr"] > before["unet_psnr"] + 2


def test_shipped_copy_gives_the_same_images(model_folder: Path, tmp_path: Path) -> None:
    report = tmp_path / "report"
    report.mkdir()
    (report / "metrics.md").write_text("# scores\n")
    (report / "metrics.json").write_text("{}")
    ship(model_folder, report, tmp_path / "models" / "mine")
    whole, half = load_model(model_folder), load_model(tmp_path / "models" / "mine")
    x = np.random.default_rng(0).random((3, 1, 16, 16), dtype=np.float32)
    answers = [swap(t.model, x, t.codes.mean(0)) for t in (whole, half)]
    np.testing.assert_allclose(*answers, atol=5e-3)
    sizes = [
        (f / "model.safetensors").stat().st_size
        for f in (model_folder, tmp_path / "models" / "mine")
    ]
    assert sizes[1] < 0.6 * sizes[0]
    assert "## scores" in (tmp_path / "models" / "mine" / "README.md").read_text()


def test_run_folder_hints_at_its_model(model_folder: Path) -> None:
    with pytest.raises(InputError, match=r"did you mean .*model"):
        load_model(model_folder.parent)


def test_weights_of_another_shape_are_refused(model_folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(model_folder, tmp_path / "model")
    text = (other / "config.yaml").read_text().replace("stem_channels: 4", "stem_channels: 6")
    (other / "config.yaml").write_text(text)
    with pytest.raises(InputError, match=r"has \[8, 4, .*yaml wants \[8, 6, .*mixes two models"):
        load_model(other)


def test_weights_that_are_not_finite_are_refused(model_folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(model_folder, tmp_path / "model")
    tensors = load_file(other / "model.safetensors")
    tensors["model.top"][:] = float("nan")
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(InputError, match=r"must be finite, but .* in model\.top"):
        load_model(other)


def test_donor_codes_of_another_shape_are_refused(model_folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(model_folder, tmp_path / "model")
    tensors = load_file(other / "model.safetensors")
    tensors["donors.0"] = tensors["donors.0"][:, :, :1].contiguous()
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(InputError, match="noise codes of 3 noise ids at 2 levels"):
        load_model(other)


def test_damaged_weights_are_refused(model_folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(model_folder, tmp_path / "model")
    data = (other / "model.safetensors").read_bytes()
    (other / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read"):
        load_model(other)


def test_models_saved_before_a_key_existed_still_load(
    tiny: Config, pairs: Pairs, tmp_path: Path
) -> None:
    config = configs.replace(tiny, {"model.decoder": "network", "model.upsampling": "nearest"})
    learner, folder = Learner(config), tmp_path / "model"
    codes, metrics = learner.validate(pairs, pairs)
    save_model(folder, config, learner.average, codes, metrics, "tests")
    path = folder / "config.yaml"
    text = path.read_text().replace("  decoder: network\n", "")
    path.write_text(text.replace("  upsampling: nearest\n", ""))
    assert "decoder" not in path.read_text()
    assert load_model(folder).config == config


def test_a_run_that_diverged_is_no_success(tiny: Config, pairs: Pairs) -> None:
    config = configs.replace(tiny, {"train.lr": 1.0, "train.steps": 200, "train.warmup_steps": 10})
    feed = PairFeed(pairs, config.train.batch_size, seed=0, share=Share())
    learner, logged, saved = Learner(config), [], []
    with pytest.raises(Diverged, match=r"train\.lr \(it was 1\)"):
        fit(learner, feed.batches(0), log=logged.append, checkpoint=saved.append)
    assert learner.step < 150
    assert True not in saved


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
