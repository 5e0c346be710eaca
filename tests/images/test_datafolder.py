"""The data folder: what makes one unusable is said in a sentence, and simulate mends it."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from snr_ray.config import Config
from snr_ray.errors import InputError
from snr_ray.images.datafolder import DataFolder
from snr_ray.stages.simulation.simulate import simulate

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_2_cpus")]


@pytest.fixture(scope="module")
def simulated(tiny: Config, ray_2_cpus: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate(tiny, images="glyphs", out=tmp_path_factory.mktemp("data") / "d").out


@pytest.fixture
def data(simulated: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(simulated, tmp_path / "data"))


def change(data: Path, **values: object) -> None:
    manifest = json.loads((data / "manifest.json").read_text())
    (data / "manifest.json").write_text(json.dumps(manifest | values))


def test_folder_decides_images_and_noise(tiny: Config, data: Path) -> None:
    settled = DataFolder.open(data).settle(Config())
    assert settled.images == tiny.images
    assert settled.noise == tiny.noise


def test_folder_of_another_version_is_refused(data: Path) -> None:
    change(data, format=1, version="0.0.9")
    with pytest.raises(InputError, match=r"written by snr_ray 0\.0\.9 in format 1; run"):
        DataFolder.open(data)


def test_folder_whose_noise_is_not_what_it_says_is_refused(data: Path) -> None:
    change(data, noise_hash="0" * 16)
    with pytest.raises(InputError, match="its shards are of hash 0000"):
        DataFolder.open(data)


def test_damaged_manifest_is_refused(data: Path) -> None:
    (data / "manifest.json").write_text('{"format": 2')
    with pytest.raises(InputError, match=r"manifest\.json is damaged"):
        DataFolder.open(data)


@pytest.mark.parametrize("damage", ["cut short", "gone"])
def test_broken_shard_is_refused_and_written_anew(tiny: Config, data: Path, damage: str) -> None:
    shard = next((data / "train").glob("*.parquet"))
    before = pq.read_table(shard)
    if damage == "gone":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(InputError, match="the same `snr simulate` again writes what is missing"):
        DataFolder.open(data)
    simulate(tiny, images="glyphs", out=data)
    assert DataFolder.open(data).shards("train") == [f"train/{shard.name}"]
    assert pq.read_table(shard).equals(before)
