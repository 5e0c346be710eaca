"""Configs from defaults <- YAML presets or files <- `--set key.path=value`, and back to YAML.

Unknown keys are errors.
"""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from snr_ray.address import local_path
from snr_ray.config import Config
from snr_ray.errors import InputError, check

_INT, _FLOAT, _MERGE = (f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "merge"))
BEFORE_THE_KEY: dict[str, dict[str, Any]] = {
    "images": {"group": "none"},
    "model": {"upsampling": "nearest", "decoder": "network", "unrolled": 0},
    "loss": {"grain": 0.0, "stored": 0.0},
}
"""What every model was before the configuration had these keys."""


def preset_names() -> list[str]:
    """Names that `--config` takes besides a file."""
    return sorted(p.name[:-5] for p in _presets().iterdir() if p.name.endswith(".yaml"))


def shipped_models() -> list[str]:
    """Names of the model folders that come with snr_ray, for `--model`."""
    folder = resources.files("snr_ray") / "shipped"
    return sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []


def load(sources: Iterable[str | Path] = (), overrides: Iterable[str] = ()) -> Config:
    """Merge presets and files, in order, and then `key.path=value` overrides, into a Config.

    Raises:
        InputError: for an unknown preset, file, key or value.
    """
    tree: dict[str, Any] = {}
    for source in sources:
        _merge(tree, _read(source))
    for override in overrides:
        key, equals, text = override.partition("=")
        check(
            bool(equals) and bool(key),
            f"--set takes key.path=value, but got {override!r}; for example --set train.steps=500.",
        )
        leaf: Any = _yaml(text, override) if text else text
        for part in reversed(key.split(".")):
            leaf = {part: leaf}
        _merge(tree, leaf)
    return from_dict(tree)


def check_used(stage: str, uses: Iterable[str], overrides: Iterable[str]) -> None:
    """Raise InputError for a `key.path=value` that a stage would not look at."""
    known = tuple(uses)
    for override in overrides:
        key = override.partition("=")[0]
        check(
            any(f"{key}.".startswith(f"{name}.") for name in known),
            f"--set of snr {stage} takes {', '.join(known) or 'nothing'}, but got {key}, which has "
            "no part in it; leave it out.",
        )


def from_dict(tree: Mapping[str, Any]) -> Config:
    """Build a Config from nested plain values, as YAML holds them."""
    return _build(Config, tree, "")


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain values of a Config, ready for YAML and JSON."""
    return _plain(dataclasses.asdict(config))


def save(config: Config, path: Path) -> None:
    """Write a Config as YAML that `load` reads back equal."""
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False))


def load_saved(path: Path) -> Config:
    """The Config that `save` wrote, maybe before some of its keys existed.

    Raises:
        InputError: as `load`.
    """
    tree: dict[str, Any] = {section: dict(keys) for section, keys in BEFORE_THE_KEY.items()}
    _merge(tree, _read(path))
    return from_dict(tree)


def replace(config: Config, changes: Mapping[str, Any]) -> Config:
    """Copy of a Config with dotted keys set, as `--set` would."""
    tree = to_dict(config)
    for key, value in changes.items():
        leaf: Any = value
        for part in reversed(key.split(".")):
            leaf = {part: leaf}
        _merge(tree, leaf)
    return from_dict(tree)


def _presets() -> Any:
    return resources.files("snr_ray") / "presets"


def _read(source: str | Path) -> dict[str, Any]:
    path = local_path(source)
    if _is_file(path):
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            raise InputError(f"{source} must be a YAML text file, but is binary.") from None
        except OSError as error:
            raise InputError(f"{source} must be a file that can be read, but: {error}.") from None
    elif str(source) in preset_names():
        text = (_presets() / f"{source}.yaml").read_text()
    else:
        raise InputError(
            f"--config takes a YAML file or one of {', '.join(preset_names())}, "
            f"but got {str(source)!r}, which is neither."
        )
    tree = _yaml(text, source) or {}
    check(
        isinstance(tree, dict),
        f"{source} must hold a mapping of sections, but is a {type(tree).__name__}.",
    )
    return tree


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long for one
        return False


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: no key twice, and 010 and 1:30 are texts, not 8 and 90."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value if key.tag != _MERGE]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise yaml.constructor.ConstructorError(
                problem=f"it says {twice[0]} twice in one section", problem_mark=node.start_mark
            )
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in rules if tag not in (_INT, _FLOAT)]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_INT, re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$"
               r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"),
    list("-+.0123456789"),
)  # fmt: skip


def _yaml(text: str, origin: str | Path) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise InputError(f"{origin} is not valid YAML: {' '.join(str(error).split())}.") from None


def _merge(tree: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = dict(value) if isinstance(value, Mapping) else value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _build(cls: Any, tree: Mapping[str, Any], prefix: str) -> Any:
    if not isinstance(tree, Mapping):
        raise InputError(f"{prefix[:-1]} must be a section with keys, but got {tree!r}.")
    hints = typing.get_type_hints(cls)
    unknown = [key for key in tree if key not in hints]
    check(
        not unknown,
        f"Unknown configuration key {prefix}{unknown[0] if unknown else ''}; "
        f"valid here: {', '.join(prefix + name for name in hints)}.",
    )
    values = {
        key: _build(hints[key], value, f"{prefix}{key}.")
        if dataclasses.is_dataclass(hints[key])
        else _coerce(value, hints[key], f"{prefix}{key}")
        for key, value in tree.items()
    }
    return cls(**values)


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def _coerce(value: Any, kind: Any, key: str) -> Any:
    """A YAML value as the annotated type; PyYAML reads `3e-4` as a string, so floats are cast."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        nothing = value is None or (value == "none" and args[0] is not str)
        return None if nothing else _coerce(value, args[0], key)
    if origin is Literal:
        check(
            any(value == one and type(value) is type(one) for one in args),
            f"{key} must be one of {', '.join(map(str, args))}, but got {value!r}.",
        )
        return value
    if origin is tuple:
        items = [value] if isinstance(value, (int, float)) else value
        fixed = args[-1] is not Ellipsis
        check(
            isinstance(items, (list, tuple)) and not (fixed and len(items) != len(args)),
            f"{key} must be a list{f' of {len(args)} numbers' if fixed else ''}, "
            f"such as [{', '.join(['4'] * (len(args) if fixed else 3))}], but got {value!r}.",
        )
        return tuple(_coerce(item, args[0], key) for item in items)
    if kind is float and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise InputError(f"{key} must be {_KINDS[kind]}, but got {value!r}.")
