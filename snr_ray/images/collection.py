"""A collection of images: ids, splits and order, and the bytes or pixels of each image.

The driver lists ids; tasks anywhere read images by index. A source is small enough to travel to
every worker (files stay where they are; ids of a million images are a few dozen megabytes, which
the workers of a machine share), and ids are stable: they decide splits, order and noise.
"""

import functools
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from snr_ray.config import ImagesConfig
from snr_ray.errors import InputError
from snr_ray.folder import Folder
from snr_ray.hashing import fingerprint, hash64
from snr_ray.images.formats.codec import SUFFIXES, only, open_file, output_name
from snr_ray.images.formats.errors import unreadable
from snr_ray.images.formats.pixels import Decoded, prepare, scale
from snr_ray.images.listing import LeftOut

Array = npt.NDArray[np.float32]
Raw = bytes | npt.NDArray[np.generic]

SPLITS = ("train", "val", "test")
ALL = "all"
"""Every image, where no model was trained on any."""
CHECKED = 100
"""Images that are tried before a collection is given up; of one that can be used, the first."""


class Texts(Sequence[str]):
    """Many strings in one Arrow array: a quarter of the memory of a list, shared when sent."""

    def __init__(self, texts: Iterable[str] | pa.StringArray) -> None:
        self.array = texts if isinstance(texts, pa.Array) else pa.array(texts, pa.string())

    def __len__(self) -> int:
        return len(self.array)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "Texts": ...
    def __getitem__(self, index: int | slice) -> "str | Texts":
        found = self.array[index]
        return Texts(found) if isinstance(index, slice) else found.as_py()

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), 4096):
            yield from self.array[start : start + 4096].to_pylist()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __hash__(self) -> int:
        return id(self)


@dataclass(frozen=True)
class Source:
    """A collection of images.

    `fetch(index)` gives the file bytes, or stored pixels [H, W] or [H, W, C], of `ids[index]`.
    `group(id)` names what must stay in one split (by default the image itself). `tensors` says
    that there are no files, and that float pixels have white at 1, as in a data folder.
    """

    name: str
    ids: Sequence[str]
    fetch: Callable[[int], Raw]
    group: Callable[[str], str] = field(default=str)
    tensors: bool = False
    labels: Sequence[str] = ()
    """Class of each image; empty where classes are not known."""
    folder: Folder | None = None
    """The folder that the images lie in, if they do; results must not land there."""
    alone: bool = False
    """Whether only files of `folder` itself are meant; results may then go to folders in it."""
    chunks: npt.NDArray[np.int64] | None = None
    """Index of the first image of each chunk that is read as a whole (a row group); none where
    every image is read alone."""
    identity: str = ""
    """What a job is known by: the place of the images whatever the user typed, without the secrets
    that a URI may hold; by default the name."""
    home: str = ""
    """The same of the folder that ids are relative to: a file, a glob and the folder they choose
    from share it, and with it and its id an image is known; by default the identity."""
    stamps: Callable[[int], str] | None = None
    """Size and time of what `fetch` reads; none where images cannot change."""
    columns: Sequence[str] = ()
    """Columns of the tables that images are rows of; none where they are files."""
    column: Callable[[str], pa.StringArray] | None = None
    """Values of one of `columns` as text, [n]; null where a row or its table has none."""
    left_out: LeftOut = field(default_factory=LeftOut)
    """What lies beside the images and is not read, counted by reason."""

    def __post_init__(self) -> None:
        if not self.identity:
            object.__setattr__(self, "identity", self.name)
        if not self.home:
            object.__setattr__(self, "home", self.identity)
        if not isinstance(self.ids, Texts):
            object.__setattr__(self, "ids", Texts(self.ids))
        assert isinstance(self.ids, Texts)
        if not len(self.ids):
            others = f"; it has {self.left_out}" if self.left_out.counts else ""
            raise InputError(
                f"A source must hold at least one image ({' '.join(SUFFIXES)}) or Parquet file, "
                f"but {self.name} holds none{others}."
            )
        names = self.ids.array
        if pc.all(pc.less(names[:-1], names[1:])).as_py():  # as folders are listed
            return
        names, counts = pc.value_counts(names).flatten()
        most = int(np.argmax(counts))
        if counts[most].as_py() > 1:
            raise InputError(
                f"Every image needs an id of its own, but {self.name} holds {counts[most]} images "
                f"named {names[most].as_py()!r}, which would get the same output name; rename them "
                "or drop the copies."
            )

    def read(self, index: int, config: ImagesConfig | None = None) -> Decoded:
        """Pixels of one image at its own size; of `config`, white and window matter.

        Raises:
            InputError: if it cannot be used, or is a stack.
        """
        return only(self.pictures(index, config or ImagesConfig()), self.ids[index])

    def pictures(self, index: int, config: ImagesConfig) -> list[Decoded]:
        """As `read`, but all pages, slices or frames of a stack."""
        name, raw = self.ids[index], self._raw(index)
        if isinstance(raw, bytes):
            return open_file(raw, name, white=config.white, window=config.window).frames
        return [scale(raw, name, white=config.white, window=config.window, tensors=self.tensors)]

    def load(self, index: int, config: ImagesConfig) -> Array:
        """One image as noise is made of it: [channels, size, size] float32. Raises InputError."""
        return prepare(self.read(index, config).pixels, config, self.ids[index])

    def check(self, rows: npt.NDArray[np.int64], config: ImagesConfig) -> None:
        """Look whether any of the first of these images can be read.

        Raises:
            InputError: if none of CHECKED can, with the reason of the first: then it is not
                the files, but a setting or the collection.
        """
        reason = ""
        for index in rows[:CHECKED]:
            try:
                self.read(int(index), config)
                return
            except InputError as error:
                reason = reason or str(error)
        if reason:
            looked = min(len(rows), CHECKED)
            raise InputError(f"Of {looked} images of {self.name} none can be read: {reason}")

    def output(self, name: str, head: bytes = b"") -> str:
        """Relative path of the result of the image with this id and these first bytes."""
        return output_name(name, tensors=self.tensors, file=self.chunks is None, head=head)

    def select(self, split: str, limit: int | None = None) -> npt.NDArray[np.int64]:
        """Indices of a split ("train", "val", "test", or "all" of them), in the order of id hashes.

        The split of an image is a hash of its group (80 / 10 / 10 %), so it never changes when
        images are added, and `limit` keeps the same images whatever the split asked for.
        """
        order = np.argsort(self._hashes, kind="stable")[:limit]
        return order if split == ALL else order[self._splits[order] == SPLITS.index(split)]

    def split(self, index: int) -> str:
        """Split of one image."""
        return SPLITS[self._splits[index]]

    def gathered(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The same indices, those of one chunk together; chunks in an order by hash.

        Tasks that take them in turn read each chunk about once, and still get a mixture.
        """
        if self.chunks is None:
            return rows
        chunk = np.searchsorted(self.chunks, rows, side="right") - 1
        keys = np.array([hash64(f"chunk/{k}") for k in range(len(self.chunks))], np.uint64)
        return rows[np.lexsort((self._hashes[rows], chunk, keys[chunk]))]

    def file(self, index: int) -> tuple[str, bytes]:
        """File name and bytes of one image (NPY where there is no file). Raises InputError."""
        raw = self._raw(index)
        if isinstance(raw, bytes):
            return self.ids[index], raw
        out = io.BytesIO()
        np.save(out, raw, allow_pickle=False)
        return self.ids[index] + ".npy", out.getvalue()

    def stamp(self, index: int) -> str:
        """Size and time of the file or table that one image is in; "" where it has none or is gone.

        Another stamp under the same id means that the image may have been replaced.
        """
        if self.stamps is None:
            return ""
        try:
            return self.stamps(index)
        except OSError:
            return ""

    def files(self) -> str:
        """What changes when any file or table of the collection does; a look at each of them."""
        if self.stamps is None:
            return ""
        return fingerprint(self.stamp(index) for index in range(len(self.ids)))

    @functools.cached_property
    def _hashes(self) -> npt.NDArray[np.uint64]:
        return np.fromiter(map(hash64, self.ids), np.uint64, len(self.ids))

    @functools.cached_property
    def _splits(self) -> npt.NDArray[np.int64]:
        """Place in SPLITS of the split of every image."""
        hashes = (hash64("split/" + self.group(name)) for name in self.ids)
        share = np.fromiter(hashes, np.uint64, len(self.ids)) / 2.0**64
        return np.searchsorted([0.8, 0.9], share, side="right")

    def __getstate__(self) -> dict[str, Any]:
        """Without what only the driver needs."""
        drawn = ("_hashes", "_splits")
        return {name: value for name, value in self.__dict__.items() if name not in drawn}

    def _raw(self, index: int) -> Raw:
        try:
            raw = self.fetch(index)
        except (OSError, pa.ArrowException) as error:
            raise unreadable(self.ids[index], error) from None
        if raw is None:
            raise InputError(f"A row must hold an image, but {self.ids[index]} is null.")
        return raw
