"""OME-Zarr images are folders: which folder is one, and its bytes as of one file, there and back.

    NAME.zarr/ --metadata, chunks of its largest level--> archive --write_image--> NAME.zarr/

Of the pyramid only the largest level is taken, and the metadata in the archive says so. NGFF 0.4
is in Zarr 2 (`.zattrs`), 0.5 in Zarr 3 (`zarr.json`). Chunks are not decoded here; `omezarr` does.
"""

import contextlib
import io
import json
import math
import re
import zipfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from snr_ray.errors import InputError
from snr_ray.folder import Folder
from snr_ray.images.formats.memory import check_values

SUFFIX = ".zarr"
ROOTS = ("zarr.json", ".zattrs")
"""What describes an image, of Zarr 3 and 2: lies in its folder."""
ARRAYS = ("zarr.json", ".zarray")
"""What describes an array, likewise."""
KIND = b"application/x-ome-zarr"
HEAD = rb"PK\x03\x04.{26}mimetype" + KIND
"""An archive begins with what it is, as documents of other kinds do that are Zip archives."""
READERS = 8
"""Threads that read chunks: most of the time is a disk's or a network's."""
_DAY = (1980, 1, 1, 0, 0, 0)
_KEPT = re.compile(r"zarr\.json|\.zarray|\.zattrs|(c([/.]|$))?(\d+([/.]\d+)*)?")
"""Names in the folder of an array: its metadata, and chunks such as 0.0, 0/0, c/0/0 and c.0.0."""


@dataclass(frozen=True)
class Image:
    """What the metadata of an image says."""

    axes: list[str]
    """Names in the order of the array's."""
    path: str
    """The array of its largest level, in the image's folder."""


def is_image(folder: Folder) -> bool:
    """Whether a folder's metadata speaks of an image; False where there is none to be read."""
    try:
        described = _described(folder)
    except (OSError, ValueError):
        return False
    return described is not None and "multiscales" in described[2]


def is_archive(data: bytes) -> bool:
    """Whether bytes are an image that is to be written as a folder."""
    return re.match(HEAD, data[:132], re.DOTALL) is not None


def contents(folder: Folder, name: str) -> bytes:
    """The bytes of a result, be it a file or a folder. Raises OSError and InputError."""
    try:
        return folder.read(name)
    except (IsADirectoryError, FileNotFoundError):
        return pack(folder.join(name), name)


def pack(folder: Folder, name: str) -> bytes:
    """An image as an archive.

    Args:
        folder: the image.
        name: used in errors.

    Raises:
        InputError: if it is no image that could be read, or larger than a node has memory for;
            that is known before its chunks are read.
        OSError: if a file cannot be read.
    """
    try:
        described = _described(folder)
    except ValueError as error:
        raise InputError(
            f"{name} has metadata that is not JSON ({error}); write the image again."
        ) from None
    if described is None and not folder.exists():
        raise FileNotFoundError(name)
    root, whole, own = described or ("", {}, {})
    _check_kind(own, name)
    own = _largest_alone(own, name)
    path = _path(own, name)
    level = [key for key in folder.list(path) if _KEPT.fullmatch(key[len(path) + 1 :])]
    array = next((key for file in ARRAYS if (key := f"{path}/{file}") in level), None)
    if array is None:
        raise InputError(
            f"An OME-Zarr image must hold the array that its metadata names, but {name} has none "
            f"in {path!r}; copy the image again, with all that is in its folder."
        )
    values = 0
    with contextlib.suppress(KeyError, TypeError, ValueError):  # damaged: decoding says how
        values = math.prod(int(n) for n in json.loads(folder.read(array))["shape"])
    check_values(values, name)
    above = ["/".join(path.split("/")[:k]) for k in range(1, path.count("/") + 1)]
    groups = [f"{group}/{file}" for group in above for file in (".zgroup", *ROOTS)]
    with ThreadPoolExecutor(READERS) as pool:
        files = dict(zip(level, pool.map(folder.read, level), strict=True))
    files |= {key: folder.read(key) for key in groups if folder.exists(key)}
    if root == "zarr.json":
        attributes = whole["attributes"] | {"ome": own}
        whole = {k: v for k, v in whole.items() if k != "consolidated_metadata"}
        files[root] = _json(whole | {"attributes": attributes})
    else:
        files[".zgroup"] = _json({"zarr_format": 2})
        files[root] = _json(own)
    return archive(files)


def archive(files: Mapping[str, bytes]) -> bytes:
    """Files of an image as one; the same bytes for the same files."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as packed:
        for key, data in [("mimetype", KIND), *files.items()]:
            packed.writestr(zipfile.ZipInfo(key, _DAY), data)
    return out.getvalue()


def unpack(data: bytes) -> dict[str, bytes]:
    """The reverse: files by their names, the one that makes them an image last."""
    with zipfile.ZipFile(io.BytesIO(data)) as packed:
        return {key: packed.read(key) for key in packed.namelist() if key != "mimetype"}


def image(files: Mapping[str, bytes], name: str) -> Image:
    """What the metadata of an unpacked image says.

    Raises:
        InputError: if its axes are not named, or y and x are not among them.
    """
    own = json.loads(files[".zattrs"]) if ".zattrs" in files else _ome(files["zarr.json"])
    axes = own["multiscales"][0].get("axes")
    try:
        names = [str(axis["name"]) for axis in axes]
    except (TypeError, KeyError):
        raise InputError(
            f"An OME-Zarr image must name its axes, as NGFF 0.4 and 0.5 do, but {name} does not; "
            "write it again as one of these."
        ) from None
    if len(set(names)) != len(names) or not {"y", "x"} <= set(names):
        raise InputError(
            f"An OME-Zarr image must have an axis y and an axis x, but those of {name} are "
            f"{', '.join(names) or 'none'}; name them so."
        )
    return Image(names, _path(own, name))


def shape(data: bytes) -> tuple[int, ...]:
    """Shape of an image by its metadata alone. Raises what damaged bytes make of it."""
    with zipfile.ZipFile(io.BytesIO(data)) as packed:
        names = packed.namelist()
        root = {key: packed.read(key) for key in ROOTS if key in names}
        path = image(root, "").path
        array = next(key for file in ARRAYS if (key := f"{path}/{file}") in names)
        return tuple(json.loads(packed.read(array))["shape"])


def write_image(folder: Folder, name: str, data: bytes) -> None:
    """Write an archive as the folder that it is of, or any other bytes as a file.

    Raises:
        OSError: if it cannot be written.
        NotShared: as `Folder.write`.
    """
    if is_archive(data):
        folder.write_folder(name, unpack(data))
    else:
        folder.write(name, data)


def _described(folder: Folder) -> tuple[str, dict[str, Any], dict[str, Any]] | None:
    """The file that describes an image, all that stands in it, and what of it is of OME; None
    where there is no such file. Raises OSError and ValueError."""
    for root in ROOTS:
        try:
            data = folder.read(root)
        except (FileNotFoundError, NotADirectoryError):
            continue
        whole = json.loads(data)
        own = _ome(data) if root == "zarr.json" else whole
        if isinstance(own, dict) and (own or root == ROOTS[-1]):
            return root, whole, own
    return None


def _ome(data: bytes) -> Any:
    """What of a group's zarr.json is of OME; nothing where it is of others."""
    whole = json.loads(data)
    attributes = whole.get("attributes") if isinstance(whole, dict) else None
    return (attributes.get("ome") if isinstance(attributes, dict) else None) or {}


def _check_kind(own: dict[str, Any], name: str) -> None:
    """Raise InputError for what is not the image itself."""
    if "plate" in own or "well" in own:
        what, inner = ("plate", "*/*/*") if "plate" in own else ("well of a plate", "*")
        raise InputError(
            f"An OME-Zarr folder must be one image, but {name} is a {what}; give the images in it, "
            f"as {name}/{inner}."
        )
    if "bioformats2raw.layout" in own:
        raise InputError(
            f"An OME-Zarr folder must be one image, but {name} is a collection of them "
            f"(bioformats2raw.layout); give the images in it, as {name}/*."
        )
    if "image-label" in own or ("labels" in own and "multiscales" not in own):
        raise InputError(
            f"An OME-Zarr image must hold what was measured, but {name} holds labels; give the "
            "image that they are of."
        )
    if not own.get("multiscales"):
        raise InputError(
            f"An OME-Zarr image must say what it is by `multiscales`, in .zattrs (NGFF 0.4) or "
            f"under `ome` in zarr.json (0.5), but {name} has none; write it again with a library "
            "for OME-Zarr, or its slices as TIFF."
        )


def _largest_alone(own: dict[str, Any], name: str) -> dict[str, Any]:
    """The same metadata of an image whose pyramid has one level; `type` and `metadata` say how the
    others were made."""
    try:
        first = dict(own["multiscales"][0])
        first["datasets"] = first["datasets"][:1]
    except (TypeError, KeyError, LookupError, ValueError):
        first = {}
    if not first.get("datasets"):
        raise InputError(
            f"The `multiscales` of an OME-Zarr image must list its `datasets`, but those of {name} "
            "do not; write the image again."
        )
    kept = {key: value for key, value in first.items() if key not in ("type", "metadata")}
    return own | {"multiscales": [kept]}


def _path(own: dict[str, Any], name: str) -> str:
    """Where the largest level lies, in the image's folder. Raises InputError where that is not."""
    level = own["multiscales"][0]["datasets"][0]
    path = level.get("path") if isinstance(level, dict) else None
    parts = path.split("/") if isinstance(path, str) else [""]
    if not all(parts) or {".", ".."} & set(parts):
        raise InputError(
            f"The `datasets` of an OME-Zarr image must name folders in it, but {name} names "
            f"{path!r}; write the image again."
        )
    return "/".join(parts)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def stamp(times: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Size and time of an image, by those of all its files."""
    sizes, latest = 0, 0
    for size, time in times:
        sizes, latest = sizes + size, max(latest, time)
    return sizes, latest
