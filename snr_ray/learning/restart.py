"""What a run that broke goes on from: its newest states on disk, checked before they are trusted.

    RUN/checkpoints/step-000000500/state.pt, config.yaml

A state appears whole or not at all and outlives a power cut. The file is a zip archive, which holds
a checksum of every tensor; torch does not look at them, `read_state` does.
"""

import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch

from snr_ray import configfile as configs
from snr_ray.errors import InputError
from snr_ray.learning.learner import Learner

STATE_FILE = "state.pt"
KEPT = 2
"""States on disk: the newest, and the one before in case the newest is damaged."""


class DamagedState(ValueError):
    """A state that was cut short or changed on disk; its text says how that shows."""


def save_checkpoint(folder: Path, learner: Learner) -> Path:
    """Write the state of a learner and its config to a new folder in `folder`; older ones go.

    Returns:
        The new folder.
    """
    final = folder / f"step-{learner.step:09d}"
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with (partial / STATE_FILE).open("wb") as file:
        torch.save(learner.state(), file)
        file.flush()
        os.fsync(file.fileno())
    configs.save(learner.config, partial / "config.yaml")
    _sync(partial)
    shutil.rmtree(final, ignore_errors=True)  # a damaged one, or it would not be written again
    os.replace(partial, final)
    _sync(folder)
    tidy(folder)
    return final


def tidy(folder: Path) -> None:
    """Remove all states but the newest, and what a kill left half written."""
    for old in sorted(_states(folder), key=_order)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    for partial in folder.glob(".step-*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The folder of the newest state that is intact, and what is wrong with newer ones."""
    damaged = []
    for state in sorted(_states(folder), key=_order, reverse=True):
        try:
            read_state(state)
        except DamagedState as error:
            damaged.append(f"{state} ({error})")
        else:
            return state, damaged
    return None, damaged


def read_state(folder: Path, device: torch.device | None = None) -> dict[str, Any]:
    """A state as it was written.

    Raises:
        DamagedState: if it is anything else.
    """
    path = folder / STATE_FILE
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken:
            raise DamagedState(f"the checksum of {broken} is wrong")
        state: dict[str, Any] = torch.load(path, map_location=device or "cpu", weights_only=True)
    except DamagedState:
        raise
    except Exception as error:  # torch and zipfile have many ways to say that a file is no file
        raise DamagedState(str(error).partition("\n")[0] or type(error).__name__) from None
    return state


def load_checkpoint(folder: Path, learner: Learner) -> None:
    """Continue a learner from a state that `save_checkpoint` wrote.

    Raises:
        InputError: if the state is that of another network.
        DamagedState: if it is no longer what was written.
    """
    state = read_state(folder, learner.device)
    try:
        learner.load_state(state)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"A run goes on from states of its own network, but {folder} holds another "
            f"({reason[:200]}); move it away, or give another --out."
        ) from None


def _states(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [path.parent for path in folder.glob(f"[!.]*/{STATE_FILE}")]


def _order(state: Path) -> tuple[int, str]:
    """Newest last. Runs of snr_ray 0.1.0 named states by their time, and went on from the last."""
    step = re.fullmatch(r"step-(\d+)", state.name)
    return (int(step.group(1)), "") if step else (-1, state.name)


def _sync(folder: Path) -> None:
    """Wait until the names in a folder would outlive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
