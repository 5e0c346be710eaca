"""States on disk: damage is seen, the one before is used, and a kill leaves no half a state."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from snr_ray import configfile as configs
from snr_ray.config import Config
from snr_ray.errors import InputError
from snr_ray.learning.learner import Learner
from snr_ray.learning.restart import (
    DamagedState,
    load_checkpoint,
    newest_checkpoint,
    read_state,
    save_checkpoint,
)


@pytest.fixture(scope="module")
def three(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of a run that wrote three."""
    folder, learner = tmp_path_factory.mktemp("run") / "checkpoints", Learner(tiny)
    for step in (10, 20, 1000):
        learner.step = step
        save_checkpoint(folder, learner)
    return folder


def test_the_two_newest_are_kept(three: Path) -> None:
    assert sorted(path.name for path in three.iterdir()) == ["step-000000020", "step-000001000"]
    assert newest_checkpoint(three) == (three / "step-000001000", [])
    assert newest_checkpoint(three / "none") == (None, [])


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "no archive"])
def test_a_damaged_state_gives_way_to_the_one_before(
    three: Path, tmp_path: Path, damage: str
) -> None:
    folder = shutil.copytree(three, tmp_path / "checkpoints")
    path = folder / "step-000001000" / "state.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(
        {"cut": data[: len(data) // 2], "flipped": data, "empty": b"", "no archive": b"x" * 999}[
            damage
        ]
    )
    newest, damaged = newest_checkpoint(folder)
    assert newest == folder / "step-000000020"
    assert len(damaged) == 1
    assert damaged[0].startswith(str(path.parent))
    (folder / "step-000000020" / "state.pt").write_bytes(b"")
    assert newest_checkpoint(folder)[0] is None


def test_no_flipped_byte_goes_unseen(three: Path, tmp_path: Path) -> None:
    whole = three / "step-000000020"
    (tmp_path / "state.pt").write_bytes((whole / "state.pt").read_bytes())
    expected = read_state(whole)["objective"]
    data = (whole / "state.pt").read_bytes()
    seen = 0
    for place in np.random.default_rng(0).integers(0, len(data), 80):
        changed = bytearray(data)
        changed[place] ^= 1 << int(place) % 8
        (tmp_path / "state.pt").write_bytes(changed)
        try:
            found = read_state(tmp_path)["objective"]
        except DamagedState:
            seen += 1
        else:  # it hit the padding between tensors
            assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert seen > 40


def test_a_state_half_written_is_no_state(tiny: Config, three: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(three, tmp_path / "checkpoints")
    (folder / "step-000001000").rename(folder / ".step-000001010.partial")
    assert newest_checkpoint(folder)[0] == folder / "step-000000020"
    learner = Learner(tiny)
    learner.step = 30
    save_checkpoint(folder, learner)
    assert sorted(p.name for p in folder.iterdir()) == ["step-000000020", "step-000000030"]


def test_states_of_older_runs_are_gone_on_from(tiny: Config, three: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(three / "step-000000020", folder / "checkpoint_2026-01-01_10-00-00.000001")
    shutil.copytree(three / "step-000001000", folder / "checkpoint_2026-01-01_11-00-00.000001")
    newest, _ = newest_checkpoint(folder)
    assert newest is not None
    assert read_state(newest)["step"] == 1000
    learner = Learner(tiny)
    for step in (1010, 1020):
        learner.step = step
        save_checkpoint(folder, learner)
    assert sorted(p.name for p in folder.iterdir()) == ["step-000001010", "step-000001020"]


def test_a_state_of_another_network_is_a_sentence(tiny: Config, three: Path) -> None:
    wider = Learner(configs.replace(tiny, {"model.channels": [8, 16]}))
    with pytest.raises(InputError, match=r"its own network, but .*step-000000020 holds another"):
        load_checkpoint(three / "step-000000020", wider)


@pytest.mark.parametrize(
    "change", [{"objective": None}, {"average": "x"}, {"optimizers": "x"}, {"step": "x"},
               {"skipped": []}, {"first_loss": "x"}, None]
)  # fmt: skip
def test_an_intact_file_that_holds_no_state_is_a_sentence(
    tiny: Config, three: Path, tmp_path: Path, change: dict[str, object] | None
) -> None:
    state = shutil.copytree(three / "step-000001000", tmp_path / "step-000001000")
    held = change and read_state(state) | change
    torch.save(held, state / "state.pt")
    with pytest.raises(InputError, match="holds another"):
        load_checkpoint(state, Learner(tiny))
