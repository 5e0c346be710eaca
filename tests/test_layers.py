"""The layer rule of snr_ray/__init__.py, read off the imports of every module."""

import ast
from pathlib import Path

import snr_ray

PACKAGE = Path(snr_ray.__file__).parent
LAYERS = [
    {"config", "configfile", "hashing", "outputs"},
    {"rows", "radon", "images", "samples", "collection", "files", "sources",
     "datafolder", "metrics", "baselines", "lmmse"},
    {"torchradon", "noisemaker", "physics", "blocks", "hvae", "unet", "batches", "shardfeed",
     "losses", "muon", "fit", "checkpoint", "swap", "fileswap", "scores", "probes"},
    {"cluster", "simulate", "dataset", "train", "sweep", "denoise", "evaluate", "report", "bench",
     "benchjob", "demo", "cli"},
]  # fmt: skip
FOREIGN = {  # first layer that may import a package
    "numpy": 1, "scipy": 1, "numba": 1, "llvmlite": 1, "skimage": 1, "pyarrow": 1, "PIL": 1,
    "matplotlib": 1, "tifffile": 1, "pydicom": 1,
    "torch": 2, "safetensors": 2, "ray": 3, "optuna": 3, "tensorboard": 3,
}  # fmt: skip
EXCEPTIONS = {("sources", "torchvision")}  # downloads, imported where they are used


def _imports(module: str) -> set[str]:
    """Full names of everything a module imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _layer(module: str) -> int:
    return next(k for k, layer in enumerate(LAYERS) if module in layer)


def test_every_module_has_a_layer() -> None:
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert modules == set.union(*LAYERS)


def test_imports_point_downwards_only() -> None:
    for module in set.union(*LAYERS):
        for name in _imports(module):
            parts = name.split(".")
            if parts[0] == "snr_ray" and parts[1] in set.union(*LAYERS):
                assert _layer(parts[1]) <= _layer(module), f"{module} imports {name}"
            elif parts[0] in FOREIGN:
                assert FOREIGN[parts[0]] <= _layer(module), f"{module} imports {name}"
            elif parts[0] == "torchvision":
                assert (module, parts[0]) in EXCEPTIONS, f"{module} imports {name}"


def test_optuna_is_known_to_the_sweep_alone() -> None:
    users = {m for m in set.union(*LAYERS) if any(n.startswith("optuna") for n in _imports(m))}
    assert users == {"sweep"}


def test_modules_import_each_other_without_cycles() -> None:
    graph = {
        m: {n.split(".")[1] for n in _imports(m) if n.startswith("snr_ray.")} & set.union(*LAYERS)
        for m in set.union(*LAYERS)
    }
    done: set[str] = set()
    while len(done) < len(graph):
        free = {m for m in graph if m not in done and graph[m] - {m} <= done}
        assert free, f"cycle among {sorted(set(graph) - done)}"
        done |= free
