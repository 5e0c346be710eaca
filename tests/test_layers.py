"""The tree is the architecture: rooms are folders, and imports point downwards only.

All is read from the folders: a new module needs no line here, a new room a place in `ROOMS`.
"""

import ast
import sys
from pathlib import Path

import pytest

import snr_ray

PACKAGE = Path(snr_ray.__file__).parent
STAGES = ("job", "simulation", "denoising", "training", "evaluation", "sweeping", "measuring")
ROOMS = (
    *("", "noise", "images/formats", "images", "network", "learning", "scoring"),
    *(f"stages/{room}" for room in STAGES),
    "stages",
)
"""From the ground floor up; a room imports from itself and from those before it."""
DOORS = ("cli", "notebook")
"""Front doors beside the ground floor that open onto every room."""
HOMES = {
    "ray": {"stages"},
    "optuna": {"stages/sweeping"},
    "tensorboard": {"stages/training"},
    "torch": {"network", "learning", "scoring", "stages"},
    "safetensors": {"learning", "scoring", "stages"},
}
"""Rooms that may know a package, and so the rooms in them; others are free above the ground."""
GROUND = {"yaml", "numpy", "pyarrow"}
EXCEPTIONS = {
    ("metrics.py", "skimage"),  # SSIM
    ("bucketcreate.py", "botocore"),  # these three: writes that pyarrow has not
    ("bucketcreate.py", "google"),
    ("bucketcreate.py", "requests"),
    ("noise/tensors.py", "torch"),  # the operator on tensors
    ("noise/kernels.py", "torch"),  # and on a GPU
    ("images/sources.py", "torchvision"),  # downloads, imported where they are used
}


def _modules(package: Path) -> list[Path]:
    return sorted(path for path in package.rglob("*.py") if path != package / "__init__.py")


def _room(path: Path, package: Path) -> str:
    return str(path.parent.relative_to(package)).removeprefix(".")


def _imports(path: Path) -> set[str]:
    """Full names of everything a module imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _faults(package: Path) -> list[str]:
    """What the rules forbid, a line each."""
    found = []
    for path in _modules(package):
        room, place = _room(path, package), str(path.relative_to(package))
        if room == "" and path.stem in DOORS:
            continue
        for name in sorted(_imports(path)):
            top, *rest = name.split(".")
            if top == "snr_ray":
                rooms = ["/".join(rest[:n]) for n in range(1, len(rest) + 1)]
                other = max((name for name in rooms if (package / name).is_dir()), default="")
                door = other == "" and rest[0] in DOORS
                if door or ROOMS.index(other) > ROOMS.index(room):
                    found.append(f"{place} imports {name}, which lies above it")
            elif top not in sys.stdlib_module_names and (place, top) not in EXCEPTIONS:
                within = {room, room.partition("/")[0]}
                allowed = top in GROUND if room == "" else bool(within & HOMES.get(top, within))
                if top == "torchvision" or not allowed:
                    found.append(f"{place} imports {name}, which {room or 'the ground'} must not")
    return found


def test_rooms_are_the_folders_with_code() -> None:
    folders = {_room(path, PACKAGE) for path in _modules(PACKAGE)}
    assert folders == set(ROOMS)


def test_imports_point_downwards_only() -> None:
    assert _faults(PACKAGE) == []


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("hashing.py", "import numba"),
        ("hashing.py", "from snr_ray.noise.rays import tiles"),
        ("outputs.py", "from snr_ray.cli import main"),
        ("noise/rays.py", "from snr_ray.images.formats.codec import decode"),
        ("images/formats/tiff.py", "from snr_ray.images.collection import Source"),
        ("noise/lmmse.py", "import torch"),
        ("images/files.py", "from snr_ray.network import swap"),
        ("images/files.py", "import torch"),
        ("network/swap.py", "from snr_ray.learning.fit import Learner"),
        ("learning/fit.py", "from snr_ray.scoring.scores import BASELINES"),
        ("learning/fit.py", "import ray"),
        ("scoring/scores.py", "from snr_ray.stages.job.connection import connected"),
        ("scoring/scores.py", "import optuna"),
        ("stages/training/train.py", "import optuna"),
        ("stages/training/train.py", "from snr_ray.stages.sweeping.sweep import sweep"),
        ("stages/job/connection.py", "from snr_ray.stages.reconstruct import reconstruct"),
    ],
)
def test_a_forbidden_import_is_found(place: str, line: str, tmp_path: Path) -> None:
    for path in [PACKAGE / "__init__.py", *_modules(PACKAGE)]:
        copy = tmp_path / path.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    module = tmp_path / place
    module.write_text(f"{module.read_text()}\n{line}\n")
    assert len(_faults(tmp_path)) == 1
    assert _faults(tmp_path)[0].startswith(place)


def test_modules_import_each_other_without_cycles() -> None:
    names = {
        ".".join(("snr_ray", *path.relative_to(PACKAGE).with_suffix("").parts)): path
        for path in _modules(PACKAGE)
    }
    imports = {name: _imports(path) for name, path in names.items()}
    graph = {
        name: {m for m in names if any(f"{n}.".startswith(f"{m}.") for n in imports[name])}
        for name in names
    }
    done: set[str] = set()
    while len(done) < len(graph):
        free = {m for m in graph if m not in done and graph[m] - {m} <= done}
        assert free, f"cycle among {sorted(set(graph) - done)}"
        done |= free


def test_every_room_leads_a_newcomer() -> None:
    for room in ROOMS[1:]:
        tree = ast.parse((PACKAGE / room / "__init__.py").read_text())
        assert len(tree.body) == 1, f"{room} exports something"
        lines = (ast.get_docstring(tree) or "").splitlines()
        assert 3 <= len(lines) <= 6, f"{room} says what it holds in {len(lines)} lines"
        assert "Read `" in " ".join(lines)


def test_tests_have_the_same_rooms() -> None:
    here = Path(__file__).parent
    for path in here.rglob("test_*.py"):
        assert _room(path, here) in ROOMS
        module = path.stem.removeprefix("test_")
        if _room(path, here):
            assert (PACKAGE / _room(path, here) / f"{module}.py").is_file(), path.name
