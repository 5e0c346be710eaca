"""The data folder that `snr simulate` writes and training reads: its files, columns and checks.

{train,val,test}/*.parquet   columns id, clean, noisy_<n_views>: canonical Arrow fixed-shape
                             tensors [C, H, W] float32, readable without Ray and snr_ray
failures.parquet             images that could not be read: id, stage, reason
manifest.json                noise specs and their hash, counts, version; written last
"""

import contextlib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from snr_ray import configfile as configs
from snr_ray.address import open_folder
from snr_ray.config import Config, ImagesConfig
from snr_ray.errors import InputError
from snr_ray.folder import Folder
from snr_ray.images.collection import SPLITS
from snr_ray.noise.spec import noise_specs, spec_hash

Array = npt.NDArray[np.float32]
Failure = dict[str, str]

FORMAT = 2
"""Version of the layout, raised when older code could not read it rightly."""
WRITING: dict[str, Any] = {
    "compression": "lz4",
    "use_dictionary": False,
    "write_statistics": False,
    "write_page_checksum": True,
}
"""How tables are written. Floats seldom repeat: dictionaries and statistics of them took most of
the time; lz4 writes and reads several times as fast as zstd, for files a tenth larger. Checksums
tell bytes that a disk or a copy changed, which are numbers like any others."""
FAILURES_SCHEMA = pa.schema([("id", pa.string()), ("stage", pa.string()), ("reason", pa.string())])


@dataclass(frozen=True)
class DataFolder:
    """A finished data folder."""

    place: Folder
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: Folder | Path | str) -> "DataFolder":
        """Read the manifest and look whether every shard is there to its end.

        Args:
            path: of the folder, which may be in a bucket.

        Raises:
            InputError: if it is no finished data folder, or one of another version, or damaged.
        """
        place = open_folder(path)
        file = f"{place}/manifest.json"
        if not place.exists("manifest.json"):
            raise InputError(
                f"--data must be a folder that `snr simulate` has finished, but {place} has no "
                "manifest.json; simulate first, or give the images with --images."
            )
        try:
            manifest = json.loads(place.read("manifest.json"))
        except ValueError as error:
            raise _damaged(file, str(error)) from None
        if not isinstance(manifest, dict):
            raise _damaged(file, "it is no mapping")
        if manifest.get("format") != FORMAT:
            raise InputError(
                f"--data must be a folder of format {FORMAT}, but {place} was written by snr_ray "
                f"{manifest.get('version')} in format {manifest.get('format', 1)}; run "
                "`snr simulate` into a new folder."
            )
        if lacking := _lacking(manifest):
            raise _damaged(file, f"its {lacking} is missing or of another kind")
        folder = cls(place, manifest)
        config = folder.settle(Config())
        spec = spec_hash(noise_specs(config.noise), config.images.size)
        if spec != manifest["noise_hash"]:
            raise InputError(
                f"{file} names noise settings of hash {spec}, but its shards are of hash "
                f"{manifest['noise_hash']}; run `snr simulate` into a new folder."
            )
        for split in SPLITS:
            shards = folder.shards(split)
            broken = next((shard for shard in shards if not whole(place, shard)), None)
            n_rows = 0 if broken else folder.count_rows(split)
            if broken or n_rows != manifest["splits"][split]:
                what = (
                    f"{place}/{broken} is cut short"
                    if broken
                    else f"{place}/{split} holds {n_rows}"
                )
                raise InputError(
                    f"The {split} split must hold its {manifest['splits'][split]} images, but "
                    f"{what}; the same `snr simulate` again writes what is missing."
                )
        return folder

    def settle(self, config: Config) -> Config:
        """The config with the folder's images and noise sections."""
        stored = self.manifest["config"]
        images = {"group": "none"} | stored["images"]  # as before there were groups
        return configs.from_dict(configs.to_dict(config) | stored | {"images": images})

    def shards(self, split: str) -> list[str]:
        """Names of the files of a split in the folder, in order."""
        return [name for name in self.place.list(split) if name.endswith(".parquet")]

    def shard(self, name: str) -> contextlib.AbstractContextManager[pq.ParquetFile]:
        """A file of a split, open for reading. What is read of it raises InputError if its bytes
        are not those that were written."""
        return open_parquet(self.place, name)

    def count_rows(self, split: str) -> int:
        """Images of a split, those left out that could not be read."""
        return sum(read_metadata(self.place, name).num_rows for name in self.shards(split))


def _lacking(manifest: dict[str, Any]) -> str:
    """The first entry that is not as every manifest has it; "" where all are."""
    config, splits = manifest.get("config"), manifest.get("splits")
    if not isinstance(config, dict):
        return "config"
    for section in ("images", "noise"):
        if not isinstance(config.get(section), dict):
            return f"config.{section}"
    if not isinstance(splits, dict) or not all(isinstance(splits.get(s), int) for s in SPLITS):
        return "splits"
    return "" if isinstance(manifest.get("noise_hash"), str) else "noise_hash"


def _damaged(file: str, why: str) -> InputError:
    return InputError(f"{file} is damaged ({why}); run the same `snr simulate` with --overwrite.")


@contextlib.contextmanager
def open_parquet(place: Folder, name: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file in an output place, open for reading; checksums are compared where it has
    them. Raises InputError for one that is damaged, also while it is read."""
    fs, root = place.filesystem()
    try:
        with pq.ParquetFile(
            f"{root}/{name}", filesystem=fs, page_checksum_verification=True
        ) as file:
            yield file
    except (OSError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno:  # of the file system, not of the file
            raise
        raise InputError(
            f"{place}/{name} is damaged ({' '.join(str(error).split())[:200]}); delete it and run "
            "the same `snr simulate` again, which writes what is missing."
        ) from None


def read_metadata(place: Folder, name: str) -> pq.FileMetaData:
    """What a Parquet file says at its end of all that it holds."""
    with open_parquet(place, name) as file:
        return file.metadata


def whole(place: Folder, shard: str) -> bool:
    """Whether a shard is there to its end, where Parquet keeps what it holds."""
    try:
        return read_metadata(place, shard).num_rows >= 0
    except (OSError, InputError):
        return False


def noisy_column(n_views: int) -> str:
    """Column of the noisy images of a view count."""
    return f"noisy_{n_views}"


def image_columns(config: Config) -> list[str]:
    """The clean column and that of each noise id, in order."""
    return ["clean", *(noisy_column(n_views) for n_views in config.noise.n_views)]


def tensors(column: pa.ChunkedArray) -> Array:
    """A fixed-shape tensor column as one array [n, C, H, W]; no copy where it is one chunk."""
    chunks = [chunk.to_numpy_ndarray() for chunk in column.chunks if len(chunk)]
    return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)


def tensor_array(images: Array) -> pa.ExtensionArray:
    """Images [n, C, H, W] as an Arrow array, without copying."""
    if len(images):
        return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(images))
    kind = pa.fixed_shape_tensor(pa.float32(), images.shape[1:])
    return pa.ExtensionArray.from_storage(kind, pa.array([], kind.storage_type))


def row_bytes(images: ImagesConfig, n_ids: int) -> int:
    """Memory of one row of tensors."""
    return (1 + n_ids) * images.channels * images.side**2 * 4


def parquet_bytes(table: pa.Table) -> bytes:
    """A table as the bytes of one Parquet file."""
    out = io.BytesIO()
    pq.write_table(table, out, **WRITING)
    return out.getvalue()


def read_failures(place: Folder) -> list[Failure]:
    """Rows of the failures.parquet of a folder; none where it has no such file."""
    if not place.exists("failures.parquet"):
        return []
    with open_parquet(place, "failures.parquet") as file:
        return file.read().to_pylist()


def failures_bytes(failures: Iterable[Failure]) -> bytes:
    """failures.parquet: one row per failed image with id, stage and reason."""
    rows = sorted(failures, key=lambda failure: failure["id"])
    return parquet_bytes(pa.Table.from_pylist(rows, FAILURES_SCHEMA))
