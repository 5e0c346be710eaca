"""The data folder: what makes one unusable is said in a sentence, and simulate mends it."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from snr_ray import configfile as configs
from snr_ray.config import Config, ImagesConfig
from snr_ray.errors import InputError
from snr_ray.images.collection import SPLITS
from snr_ray.images.datafolder import (
    FORMAT,
    WRITING,
    DataFolder,
    failures_bytes,
    image_columns,
    read_failures,
    tensor_array,
    tensors,
)
from snr_ray.images.sources import open_source
from snr_ray.noise.spec import noise_specs, spec_hash
from snr_ray.stages.simulation.simulate import simulate

SHARD = "train/0.parquet"


def write(path: Path, config: Config, **writing: Any) -> None:
    side = config.images.side
    pixels = np.random.default_rng(0).random((4, config.images.channels, side, side), np.float32)
    columns = {name: tensor_array(pixels) for name in image_columns(config)}
    table = pa.table({"id": [f"{path.parent.name}/{k}.png" for k in range(4)], **columns})
    pq.write_table(table, path, **WRITING | writing)


@pytest.fixture
def data(tiny: Config, tmp_path: Path) -> Path:
    """A folder as simulate leaves it, without the work."""
    for split in SPLITS:
        (tmp_path / split).mkdir()
        write(tmp_path / split / "0.parquet", tiny)
    (tmp_path / "failures.parquet").write_bytes(failures_bytes([]))
    change(tmp_path, {
        "format": FORMAT,
        "noise_hash": spec_hash(noise_specs(tiny.noise), tiny.images.size),
        "splits": dict.fromkeys(SPLITS, 4),
        "config": {k: configs.to_dict(tiny)[k] for k in ("images", "noise")},
    })  # fmt: skip
    return tmp_path


def change(data: Path, content: Any) -> None:
    (data / "manifest.json").write_text(json.dumps(content))


def manifest(data: Path) -> dict[str, Any]:
    return json.loads((data / "manifest.json").read_text())


def flip(file: Path) -> None:
    """Change one number of the clean pixels."""
    content = bytearray(file.read_bytes())
    content[len(content) // 5] ^= 0x10
    file.write_bytes(content)


def read(data: Path) -> np.ndarray:
    with DataFolder.open(data).shard(SHARD) as file:
        return tensors(file.read()["clean"])


def test_folder_decides_images_and_noise(tiny: Config, data: Path) -> None:
    settled = DataFolder.open(data).settle(Config())
    assert settled.images == tiny.images
    assert settled.noise == tiny.noise


def test_folder_of_another_version_is_refused(data: Path) -> None:
    change(data, manifest(data) | {"format": 1, "version": "0.0.9"})
    with pytest.raises(InputError, match=r"written by snr_ray 0\.0\.9 in format 1; run"):
        DataFolder.open(data)


def test_folder_whose_noise_is_not_what_it_says_is_refused(data: Path) -> None:
    change(data, manifest(data) | {"noise_hash": "0" * 16})
    with pytest.raises(InputError, match="its shards are of hash 0000"):
        DataFolder.open(data)


def test_damaged_manifest_is_refused(data: Path) -> None:
    (data / "manifest.json").write_text('{"format": 2')
    with pytest.raises(InputError, match=r"manifest\.json is damaged"):
        DataFolder.open(data)


def test_a_shard_with_changed_bytes_is_refused(data: Path) -> None:
    assert read(data).shape[0] == 4
    flip(data / SHARD)
    with pytest.raises(InputError, match=r"train/0\.parquet is damaged .* `snr simulate` again"):
        read(data)


def test_a_source_of_shards_tells_changed_bytes(data: Path) -> None:
    flip(data / SHARD)
    source = open_source(str(data / SHARD))
    with pytest.raises(InputError, match="integrity"):
        source.load(0, ImagesConfig(size=16))


def test_shards_without_checksums_are_still_read(tiny: Config, data: Path) -> None:
    before = read(data)
    write(data / SHARD, tiny, write_page_checksum=False)
    np.testing.assert_array_equal(read(data), before)


def test_damaged_failures_are_refused(data: Path) -> None:
    folder = DataFolder.open(data)
    assert read_failures(folder.place) == []
    (data / "failures.parquet").write_bytes(b"PAR1" * 9)
    with pytest.raises(InputError, match=r"failures\.parquet is damaged"):
        read_failures(folder.place)


@pytest.mark.parametrize("content", [[], "text", 3, None])
def test_a_manifest_that_is_no_mapping_is_damaged(data: Path, content: Any) -> None:
    change(data, content)
    with pytest.raises(InputError, match=r"manifest\.json is damaged \(it is no mapping\)"):
        DataFolder.open(data)


@pytest.mark.parametrize("entry", ["noise_hash", "splits", "config"])
@pytest.mark.parametrize("value", [None, [], 5, {}])
def test_a_manifest_that_lacks_an_entry_is_damaged(data: Path, entry: str, value: Any) -> None:
    change(data, manifest(data) | {entry: value})
    with pytest.raises(InputError, match=rf"manifest\.json is damaged \(its {entry}.* is missing"):
        DataFolder.open(data)


@pytest.fixture(scope="module")
def simulated(tiny: Config, ray_2_cpus: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate(tiny, images="glyphs", out=tmp_path_factory.mktemp("data") / "d").out


@pytest.mark.ray
@pytest.mark.parametrize("damage", ["cut short", "gone"])
def test_broken_shard_is_refused_and_written_anew(
    tiny: Config, simulated: Path, tmp_path: Path, damage: str
) -> None:
    data = Path(shutil.copytree(simulated, tmp_path / "data"))
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
