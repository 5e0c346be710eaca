"""What keeps images together in one split: slices of a patient are never trained and tested on.

    source, images.group --> the same source, grouped by patient, folder or a column's values

The split of an image is a hash of its group, so it does not change when patients are added.
"""

import functools
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from posixpath import dirname

import pyarrow as pa
import pyarrow.compute as pc

from snr_ray.errors import InputError, check
from snr_ray.images.collection import Source, Texts
from snr_ray.images.formats import dicom
from snr_ray.images.formats.codec import HEAD_BYTES, KINDS, recognise, split

PATIENT_ID = "PatientID"
FOLDER = "folder"
NONE = "none"
PATIENT_COLUMNS = ("patient", "patient_id", "patientid")
"""Columns that group the rows of tables by themselves, whatever their case."""
READERS = 16
"""Threads that read headers: most of the time is a disk's or a network's."""
HINT_FOLDERS = 3
"""Images that lie in at least so many folders may be those of patients."""

Tell = Callable[[int], None]


@dataclass(frozen=True)
class Grouped:
    """A source with its groups."""

    source: Source
    group: str | None
    """images.group as it was settled; None where nothing keeps images together."""
    said: tuple[str, ...]
    """What the user should know of it, a sentence each."""


@dataclass(frozen=True)
class _Table:
    """The group of each id, as two Arrow arrays: it travels with the source."""

    ids: Texts
    groups: Texts

    @functools.cached_property
    def _known(self) -> dict[str, str]:
        return dict(zip(self.ids, self.groups, strict=True))

    def __call__(self, name: str) -> str:
        return self._known[name]

    def __getstate__(self) -> dict[str, Texts]:
        return {"ids": self.ids, "groups": self.groups}


def group_images(source: Source, group: str | None, tell: Tell = lambda done: None) -> Grouped:
    """A source grouped as images.group says, or where that is None as its images say.

    Args:
        source: as it was opened.
        group: a value of images.group.
        tell: called with the number of headers read, now and then.

    Raises:
        InputError: if the source cannot be grouped so, or all of it is one group.
    """
    if group == NONE:
        return Grouped(source, NONE, ())
    if group is None:
        named = (name for name in source.columns if name.lower() in PATIENT_COLUMNS)
        column = next(named, None)
        if column:
            return _by_column(source, column)
        slices = _slices(source, tell)
        return _by_patient(source, slices) if slices else Grouped(source, None, _hint(source))
    if group in source.columns:
        return _by_column(source, group)
    if group == PATIENT_ID:
        slices = _slices(source, tell)
        check(
            bool(slices),
            f"images.group={PATIENT_ID} needs DICOM files, but {source.name} holds none; "
            f"give {FOLDER}, {FOLDER}:N or {NONE}.",
        )
        return _by_patient(source, slices)
    if re.fullmatch(rf"{FOLDER}(:[1-9]\d*)?", group):
        return _by_folder(source, group)
    raise InputError(f"images.group must be {_ways(source)} for {source.name}, but got {group!r}.")


def _ways(source: Source) -> str:
    columns = [name for name in source.columns if name not in ("image", "clean")]
    if columns:
        return f"a column ({', '.join(columns)}), {FOLDER} or {NONE}"
    return f"{PATIENT_ID}, {FOLDER}, {FOLDER}:N or {NONE}"


def _by_column(source: Source, column: str) -> Grouped:
    assert source.column is not None
    values = source.column(column)
    lacking = values.null_count
    said = [] if lacking in (0, len(values)) else [
        f"{lacking:,} of its images have no {column}, and are split one by one"]  # fmt: skip
    return _grouped(source, column, values, f"the column {column}", said)


def _by_folder(source: Source, group: str) -> Grouped:
    depth = int(group.partition(":")[2] or 0)
    folders = [dirname(name) for name in source.ids]
    if depth:
        folders = ["/".join(folder.split("/")[:depth]) for folder in folders]
    return _grouped(source, group, pa.array(folders, pa.string()), "the folders of its images", [])


def _by_patient(source: Source, slices: dict[int, dicom.Slice]) -> Grouped:
    """By PatientID; where it is empty, by study."""
    said = []
    names: list[str | None] = [None] * len(source.ids)
    for index, one in slices.items():
        names[index] = one.patient or one.study or None
    anonymous = sum(not one.patient for one in slices.values())
    if anonymous:
        said.append(
            f"{anonymous:,} of its DICOM files have no {PATIENT_ID}, and are kept together by study"
        )
    return _grouped(source, PATIENT_ID, pa.array(names, pa.string()), PATIENT_ID,
                    [*said, *_mixed_series(slices)])  # fmt: skip


def _grouped(
    source: Source, group: str, values: pa.StringArray, what: str, said: Sequence[str]
) -> Grouped:
    """Groups by the values of each image; an image without one is a group of its own."""
    found = pc.unique(values.drop_null())
    if len(found) == 1 and not values.null_count and len(source.ids) > 1:
        raise InputError(
            f"Training and testing need images of several groups, since each stays in one split, "
            f"but by {what} all {len(source.ids):,} images of {source.name} are of one "
            f"({found[0].as_py()!r}); add others, or split image by image: images.group={NONE}."
        )
    assert isinstance(source.ids, Texts)
    table = _Table(source.ids, Texts(pc.coalesce(values, source.ids.array)))
    line = f"split by {what}: {len(found):,} groups, none of which is in two splits"
    if len(found) == 1:
        line = f"split by {what}: 1 group, which is in one split"
    elif not len(found):
        line = f"split image by image, since {what} is empty for all of them"
    return Grouped(replace(source, group=table), group, (line, *said))


def _hint(source: Source) -> tuple[str, ...]:
    folders = {dirname(name) for name in source.ids}
    if source.folder is None or len(folders) < HINT_FOLDERS:
        return ()
    return (
        f"split image by image; if the {len(folders):,} folders of its images are patients, "
        f"images.group={FOLDER} keeps each in one split",
    )


def _slices(source: Source, tell: Tell) -> dict[int, dicom.Slice]:
    """What the DICOM files among the images say, by index; those that cannot be read are left."""
    asked = [k for k, name in enumerate(source.ids) if _may_be_dicom(source, name)]
    with ThreadPoolExecutor(READERS) as pool:
        heads = pool.map(functools.partial(_slice, source), asked)
        return {k: one for k, one in zip(asked, _counted(heads, tell), strict=True) if one}


def _counted(heads: Iterator[dicom.Slice | None], tell: Tell) -> Iterator[dicom.Slice | None]:
    for done, head in enumerate(heads, start=1):
        yield head
        tell(done)


def _may_be_dicom(source: Source, name: str) -> bool:
    kind = KINDS.get(split(name)[1].lower())
    return kind == "dicom" or (kind is None and not source.columns)


def _slice(source: Source, index: int) -> dicom.Slice | None:
    try:
        raw = source.fetch(index)
    except (OSError, pa.ArrowException, InputError):  # told where the image itself is read
        return None
    if not isinstance(raw, bytes):
        return None
    kind = recognise(raw[:HEAD_BYTES]) or KINDS.get(split(source.ids[index])[1].lower())
    return dicom.read_slice(raw) if kind == "dicom" else None


def _mixed_series(slices: dict[int, dicom.Slice]) -> list[str]:
    """Series whose slices differ in size or spacing, which images.size alone makes equal."""
    kinds: dict[str, set[str]] = defaultdict(set)
    for one in slices.values():
        kinds[one.series].add(one.grid)
    mixed = [series for series in sorted(kinds) if series and len(kinds[series]) > 1]
    if not mixed:
        return []
    grids = " and ".join(sorted(kinds[mixed[0]])[:3])
    return [
        f"slices of {len(mixed):,} series differ in size or spacing ({mixed[0]}: {grids}), and "
        "each is scaled to images.size by itself"
    ]
