"""What `SRC` means: a name, path, glob or URI -> a collection of images."""

import functools
import os
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from snr_ray.address import local_path
from snr_ray.errors import InputError
from snr_ray.images import samples
from snr_ray.images.collection import SPLITS, Raw, Source
from snr_ray.images.files import open_path
from snr_ray.images.formats.codec import SUFFIXES

NAMES = ("glyphs", "photos", "notmnist", "cifar10", "places365")
CACHE = Path("~/.cache/snr_ray")


def open_source(text: str) -> Source:
    """The source that the user's `SRC` names. Raises InputError with the way out."""
    if not text.strip():
        raise InputError(f"SRC must be a path, a URI or one of {', '.join(NAMES)}, but is empty.")
    name, _, path = text.partition(":")
    if name in NAMES and not path.startswith("//"):
        opener: dict[str, Callable[[str], Source]] = {
            "glyphs": _glyphs,
            "photos": _photos,
            "notmnist": _notmnist,
            "cifar10": _cifar10,
            "places365": _places365,
        }
        return opener[name](path)
    return open_path(text, text, NAMES)


def _glyphs(path: str) -> Source:
    _no_path("glyphs", path)
    ids = samples.glyph_ids()
    make = functools.partial(_make, samples.draw_glyph, ids)
    return Source("glyphs", ids, make, samples.group, labels=_first_folder(ids))


def _photos(path: str) -> Source:
    _no_path("photos", path)
    ids = samples.photo_ids()
    return Source("photos", ids, functools.partial(_make, samples.crop_photo, ids), samples.group)


def _make(make: Callable[[str], Raw], ids: Sequence[str], index: int) -> Raw:
    return make(ids[index])


def _first_folder(ids: Sequence[str]) -> list[str]:
    return [name.partition("/")[0] for name in ids]


def _no_path(name: str, path: str) -> None:
    if path:
        raise InputError(f"{name} is made here and takes no path, but got {name}:{path}.")


def _notmnist(path: str) -> Source:
    """notMNIST: the tar.gz, its unpacked folder, or a download of notMNIST_small."""
    if not path:
        archive = CACHE.expanduser() / "notMNIST_small.tar.gz"
        address = "http://yaroslavvb.com/upload/notMNIST/notMNIST_small.tar.gz"
        if not archive.is_file():
            _download("notmnist", archive.name, lambda: _fetch_url(address, archive))
        path = str(archive)
    if not path.endswith((".tar.gz", ".tgz", ".tar")):
        return open_path(path, f"notmnist:{path}", NAMES)
    path = str(local_path(path))
    if not os.path.isfile(path):
        raise InputError(f"notmnist:PATH must be the archive or its folder, but {path} is missing.")
    ids, offsets, chunks = [], [0], []
    try:
        with tarfile.open(path) as archive_file:
            for member in archive_file:
                if member.isfile() and member.name.lower().endswith(SUFFIXES):
                    stream = archive_file.extractfile(member)
                    chunks.append(stream.read() if stream else b"")
                    ids.append("/".join(member.name.split("/")[1:]))
                    offsets.append(offsets[-1] + len(chunks[-1]))
    except (tarfile.TarError, EOFError, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{path} is not a readable tar archive ({reason}).") from None
    # One array, so that the workers of a machine share it through the object store.
    buffer = np.frombuffer(b"".join(chunks), np.uint8)
    fetch = functools.partial(_read_slice, buffer, offsets)
    return Source(f"notmnist:{path}", ids, fetch, labels=_first_folder(ids))


def _read_slice(buffer: npt.NDArray[np.uint8], offsets: Sequence[int], index: int) -> bytes:
    return buffer[offsets[index] : offsets[index + 1]].tobytes()


def _cifar10(path: str) -> Source:
    """CIFAR-10: Parquet files as data hubs publish them, a folder of images, or torchvision's."""
    root = local_path(path or CACHE)
    python = [root / "cifar-10-batches-py", root / "cifar-10-python.tar.gz"]
    if path and not any(map(os.path.exists, python)):
        return open_path(path, f"cifar10:{path}", NAMES)
    from torchvision.datasets import CIFAR10  # only here: torch is slow to import

    def fetch() -> list[Any]:
        return [CIFAR10(str(root), train=train, download=True) for train in (True, False)]

    sets = _download("cifar10", "cifar-10-python.tar.gz", fetch)
    pixels = np.concatenate([part.data for part in sets])
    ids = [
        f"{split}/{i:05d}.png"
        for split, part in zip(SPLITS[::2], sets, strict=True)
        for i in range(len(part))
    ]
    return Source("cifar10", ids, pixels.__getitem__)


def _places365(path: str) -> Source:
    """Places365: a folder of images, or torchvision's download of the small validation set."""
    if path:
        return open_path(path, f"places365:{path}", NAMES)
    root = CACHE.expanduser() / "places365"
    folder = root / "val_256"
    if not folder.is_dir():
        from torchvision.datasets import Places365

        def fetch() -> None:
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=root) as partial:  # there whole or not at all
                Places365(partial, split="val", small=True, download=True)
                os.replace(Path(partial) / folder.name, folder)

        _download("places365", "val_256.tar (unpacked)", fetch)
    return open_path(str(folder), "places365", NAMES)


def _fetch_url(address: str, target: Path) -> None:
    from torchvision.datasets.utils import download_url

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:  # there whole or not at all
        download_url(address, folder, target.name)
        os.replace(Path(folder) / target.name, target)


def _download(name: str, file: str, fetch: Callable[[], Any]) -> Any:
    try:
        return fetch()
    except Exception as error:  # urllib, ssl, tarfile and torchvision each raise their own
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise InputError(
            f"{name} could not be downloaded ({reason}); "
            f"bring {file} yourself and pass it as {name}:PATH."
        ) from None
