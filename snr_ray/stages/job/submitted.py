"""What a submitted job may name: it runs in a copy of the working directory, on some other machine.

A relative path means a place in that copy, which goes with the cluster.
"""

from argparse import Namespace
from pathlib import Path

from snr_ray import configfile as configs
from snr_ray.address import local_path
from snr_ray.config import Config
from snr_ray.errors import InputError
from snr_ray.images.sources import NAMES

_SHARED = "/mnt/share"


def check_paths(args: Namespace, config: Config) -> None:
    """Raise InputError where a submitted job names a relative path, with the path to use."""
    named = {
        "--out": args.out,
        "--data": getattr(args, "data", None),
        "--images": _path_of_source(getattr(args, "images", None)),
        "--like": _path_of_source(getattr(args, "like", None)),
        "--rates": getattr(args, "rates", None),
        "--sinogram": getattr(args, "sinogram", None),
        "--flats": getattr(args, "flats", None),
        "--darks": getattr(args, "darks", None),
        "--model": _path_of_model(getattr(args, "model", None)),
        "train.start": _path_of_model(config.train.start),
    }
    donor = getattr(args, "donor", None)
    named["--donor"] = None if donor in ("mean", "random") else _path_of_source(donor)
    for number, model in enumerate(getattr(args, "beside", [])):
        named[f"--beside ({number + 1})"] = _path_of_model(model)
    absolute = [str(path) for path in named.values() if path and _is_absolute(path)]
    for name, path in named.items():
        if path and not _is_absolute(path):
            shared = next((place.rpartition("/")[0] for place in absolute), "") or _SHARED
            raise InputError(
                f"A submitted job runs in a copy of the working directory that goes with the "
                f"cluster, so {name} must be an absolute path on storage that all nodes share, or "
                f"a URI, but got {str(path)!r}; give it in full, such as "
                f"{shared}/{Path(path).name}."
            )


def _is_absolute(path: str | Path) -> bool:
    return "://" in str(path) or local_path(path).is_absolute()


def _path_of_source(text: str | int | None) -> str | None:
    """The path in a SRC; None where it is made or downloaded, or a number of images."""
    if isinstance(text, int):
        return None
    name, _, path = (text or "").partition(":")
    return (path if name in NAMES and not path.startswith("//") else text) or None


def _path_of_model(text: str | None) -> str | None:
    return None if text in configs.shipped_models() else text
