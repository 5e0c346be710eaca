"""Configuration: merging, overriding, saving, and the sentences for mistakes."""

from pathlib import Path

import pytest

from snr_ray import configfile as configs
from snr_ray.config import Config
from snr_ray.errors import InputError
from snr_ray.usage import USES


@pytest.mark.parametrize("name", configs.preset_names())
def test_every_shipped_preset_loads(name: str) -> None:
    assert isinstance(configs.load([name]), Config)


def test_preset_paired_is_the_default() -> None:
    assert configs.load(["paired"]) == Config()


def test_preset_seed_is_elbo_and_drawn_triplet_only() -> None:
    loss = configs.load(["seed"]).loss
    assert (loss.swap_probability, loss.content_kl, loss.triplet_form) == (0.0, 0.0, "drawn")


def test_saved_config_loads_equal(tmp_path: Path) -> None:
    config = configs.load(["cifar10", "seed"], ["train.lr=3e-4", "noise.n_views=[30,15]",
                                                "train.batch_size=32"])  # fmt: skip
    configs.save(config, tmp_path / "c.yaml")
    assert configs.load([tmp_path / "c.yaml"]) == config


def test_later_sources_win_and_set_wins_over_all(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("train: {steps: 7, lr: 0.1}\n")
    config = configs.load(["glyphs", tmp_path / "a.yaml"], ["train.lr=1e-3"])
    assert (config.train.steps, config.train.lr, config.images.size) == (7, 1e-3, 28)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.stepz=3", r"Unknown configuration key train\.stepz; valid here: .*train\.steps"),
        ("nonsense.a=3", r"Unknown configuration key nonsense"),
        ("train.steps=two", r"train\.steps must be a whole number, but got 'two'"),
        ("train.steps=true", r"train\.steps must be a whole number, but got True"),
        ("train.steps=0", r"train\.steps must be at least 1, but got 0"),
        ("train.lr=.inf", r"train\.lr must be a number, but got inf"),
        ("train.lr=2", r"above 0 and at most 1, but got 2\.0"),
        ("images.size=9999999", r"from 8 to 4096 pixels"),
        ("images.size=[1", r"images\.size=\[1 is not valid YAML"),
        ("seed=!!python/object:os.system", r"is not valid YAML"),
        ("train.lr=fast", r"train\.lr must be a number, but got 'fast'"),
        ("train=3", r"train must be a section with keys, but got 3"),
        ("train.steps", r"--set takes key\.path=value, but got 'train\.steps'"),
        ("noise.n_views=[0]", r"noise\.n_views must be at least 1, but got 0"),
        ("noise.n_views=[-3,4]", r"noise\.n_views must be at least 1, but got -3"),
        ("noise.n_views=[]", r"needs at least one view count"),
        ("noise.n_views=[4,4]", r"must not repeat"),
        ("noise.n_views=many", r"noise\.n_views must be a list"),
        ("noise.filter=lowpass", r"noise\.filter must be one of ramp, .*but got 'lowpass'"),
        ("images.size=0", r"images\.size must be from 8 to 4096 pixels, but got 0"),
        ("images.size=28.5", r"images\.size must be a whole number, but got 28\.5"),
        ("images.channels=2", r"images\.channels must be one of 1, 3, but got 2"),
        ("model.stem_kernel=4", r"model\.stem_kernel must be odd, but got 4"),
        ("model.kind=vae", r"model\.kind must be"),
        ("model.step_channels=[8,0]", r"model\.step_channels must be at least 1, but got 0"),
        ("train.batch_size=35", r"multiple of 2 x workers = 2, .*nearest is 36"),
        ("model.noise_channels=[4,4]", r"one entry per level of model\.channels \(3\), but got 2"),
        ("sweep.triplet=[2,1]", r"low <= high"),
        ("noise.n_views=[113]", r"n_views must be at most 4 x images\.size = 112, but got 113"),
        ("noise.angle_range=200", "from 1 to 180 degrees, but got 200"),
        ("noise.photons=-1", r"noise\.photons must not be negative, but got -1"),
        ("noise.photons=10000000000000000000000", r"noise\.photons must be at most 1e\+18"),
        ("seed=4294967296", r"seed must be at most 4294967295, but got 4294967296"),
        ("seed=0b_", "seed must be a whole number, but got '0b_'"),
        ("images.group=2024-13-45", r"images\.group=2024-13-45 is not valid YAML"),
        ("train.lr=1" + 400 * "0", r"train\.lr must be a number"),
        ("images.window=[5,5]", r"images\.window must be \[low, high\]"),
        ("images.crop=64", r"images\.crop must be from 8 to images\.size = 28, but got 64"),
        ("loss.sigma_own=0.5", r"loss\.sigma_own must be at least 1, but got 0\.5"),
        ("sweep.triplet=[2]", r"list of 2 numbers"),
    ],
)
def test_mistake_gets_a_sentence(override: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        configs.load([], [override])


def test_physics_of_large_images_is_refused() -> None:
    with pytest.raises(InputError, match=r"at most 64 pixels, but images\.size is 96"):
        configs.load(["physics"], ["images.size=96"])


def test_physics_of_crops_is_refused() -> None:
    with pytest.raises(InputError, match=r"physics needs whole images, but images\.crop is set"):
        configs.load(["physics"], ["images.crop=16"])


def test_more_levels_than_the_image_halves_is_refused() -> None:
    with pytest.raises(InputError, match="use fewer levels or larger images"):
        configs.load([], ["images.size=8", "model.channels=[8,8,8,8]",
                          "model.content_channels=[2,2,2,2]",
                          "model.noise_channels=[2,2,2,2]"])  # fmt: skip


def test_unknown_config_file_lists_presets() -> None:
    with pytest.raises(InputError, match=r"one of any, .*but got 'nope'"):
        configs.load(["nope"])


def test_broken_yaml_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("train: [1,")
    with pytest.raises(InputError, match=r"bad\.yaml is not valid YAML"):
        configs.load([tmp_path / "bad.yaml"])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("images: {size: 32}\nimages: {channels: 3}\n", "says images twice in one section"),
        ("images: {size: 32, size: 64}\n", "says size twice in one section"),
        ("images: {size: 010}\n", r"images\.size must be a whole number, but got '010'"),
        ("train: {steps: 1:30}\n", r"train\.steps must be a whole number, but got '1:30'"),
    ],
)
def test_yaml_that_reads_otherwise_than_it_looks_is_refused(
    text: str, sentence: str, tmp_path: Path
) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=sentence):
        configs.load([path])


def test_numbers_of_yaml_are_read_as_before() -> None:
    keys = ("train.lr=1e-3", "loss.beta=.5", "loss.grain=0.", "train.steps=1_000", "seed=+4")
    config = configs.load([], keys)
    assert (config.train.lr, config.loss.beta, config.loss.grain) == (1e-3, 0.5, 0.0)
    assert (config.train.steps, config.seed) == (1000, 4)


@pytest.mark.parametrize("nothing", ["null", "none"])
def test_an_optional_number_may_be_none(nothing: str) -> None:
    assert configs.load([], ["images.limit=7", f"images.limit={nothing}"]).images.limit is None


def test_a_name_too_long_for_a_file_is_neither_file_nor_preset() -> None:
    with pytest.raises(InputError, match="which is neither"):
        configs.load(["x" * 300])


@pytest.mark.parametrize(
    ("stage", "override"),
    [
        ("denoise", "images.limit=1"),
        ("denoise", "noise.photons=50"),
        ("evaluate", "noise.filter=hann"),
        ("evaluate", "images.size=40"),
        ("simulate", "train.steps=7"),
    ],
)
def test_a_setting_that_a_stage_does_not_look_at_is_refused(stage: str, override: str) -> None:
    with pytest.raises(InputError, match=f"{override.partition('=')[0]}, which has no part in it"):
        configs.check_used(stage, USES[stage], [override])


def test_settings_that_a_stage_looks_at_are_settings() -> None:
    tree = configs.to_dict(configs.load())
    within = {f"{section}.{key}" for section in ("images", "noise") for key in tree[section]}
    assert {name for names in USES.values() for name in names} <= {*tree, *within}


def test_binary_config_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"bad\.yaml must be a YAML text file, but is binary"):
        configs.load([tmp_path / "bad.yaml"])
