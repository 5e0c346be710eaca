"""Image files <-> stacks of pixels of one shape, and a manifest row about each. Knows no torch.

    bytes --open_files--> opened files --stack--> [B, C, H, W] of one shape each
    opened files and what became of the stacks --write_files--> files, rows and failures

Between the two lies the network (`fileswap`), in the same process or on another machine's GPU.
"""

import contextlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from snr_ray.address import without_secrets
from snr_ray.config import ImagesConfig
from snr_ray.errors import NO_ROOM, InputError, Lost, no_room
from snr_ray.folder import Folder, NotShared
from snr_ray.images.collection import Source, Texts
from snr_ray.images.formats.codec import (
    HEAD_BYTES,
    KINDS,
    NOT_PNG,
    OpenFile,
    open_file,
    split,
    stored_frames,
)
from snr_ray.images.formats.pixels import Made, Values
from snr_ray.images.formats.zarrfolder import write_image
from snr_ray.stages.denoising.room import check_room

if TYPE_CHECKING:  # SciPy is slow to import
    from snr_ray.noise.likelyviews import Likely

Array = npt.NDArray[np.float32]
Row = dict[str, Any]
Doubtful = Literal["write", "copy", "fail"]

PASS_PIXELS = 2**20
"""Values per pass of the network; bounds memory whatever the image sizes."""
HELD_PIXELS = 2**22
"""Values of opened images that a task holds at most, but for one file that has more."""
MANIFEST_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("output", pa.string()),
        ("frames", pa.int32()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("channels", pa.int32()),
        ("depth", pa.string()),
        ("donor", pa.int32()),
        ("n_views", pa.int32()),
        ("explained", pa.float32()),
        ("std", pa.float32()),
        ("seconds", pa.float32()),
        ("status", pa.string()),
        ("stamp", pa.string()),
    ]
)
ROW_SCHEMA = MANIFEST_SCHEMA.append(pa.field("error", pa.string())).append(
    pa.field("stage", pa.string())
)
"""Rows of tasks: those of the manifest, and failures, which have an error."""
DONE, DOUBTFUL = "done", "doubtful"
"""What `status` of a row says: done, or the result does not explain its input."""
DEVIATIONS = ".std.npy"
"""Ends the name of the file beside a result that says how much its samples differ, per pixel."""
OWN_NAMES = ("job.json", "manifest.parquet", "failures.parquet", "report.html")
"""What the job itself writes beside the images."""
_MOVED = r"(?i)^/|//|(^|/)\.{1,2}/|^(" + "|".join(re.escape(name) for name in OWN_NAMES) + r")(/|$)"
"""Ids whose output name is not simply theirs."""


@dataclass(frozen=True)
class ImageFile:
    """One input."""

    id: str
    output: str
    """Path of the result, relative to the output folder."""
    name: str
    """File name of `data`; its suffix says the format."""
    data: bytes
    tensor: bool = False
    """Not of a file: float pixels with white at 1, as in a data folder, or integers."""
    error: str = ""
    """Why there is no data."""
    stamp: str = ""
    """Size and time of the input, by which a replaced one is known."""


@dataclass(frozen=True)
class Opened:
    """An input with its pixels taken out (they travel in stacks)."""

    file: ImageFile
    open: OpenFile
    """Its frames hold no pixels any more."""
    shapes: list[tuple[int, ...]]
    """[C, H, W] of each frame."""


@dataclass(frozen=True)
class Stack:
    """Pictures of one shape."""

    pixels: Array
    """[B, C, H, W]"""
    owners: list[tuple[int, int]]
    """Of each the place of its file in the list of opened files, and its place in the file."""
    ids: list[str]
    """That of the file; of the second and later pictures of a file, with their place."""
    likely: "list[Likely] | None" = None
    """What the spectra of the pictures say of their view counts, where that was looked at."""

    def part(self, some: slice) -> "Stack":
        """Some of the pictures."""
        seen = None if self.likely is None else self.likely[some]
        return Stack(self.pixels[some], self.owners[some], self.ids[some], seen)


@dataclass
class Answer:
    """What the network made of a stack; of an image with an error the rest means nothing."""

    images: Array
    """[B, C, H, W]"""
    donors: list[int]
    errors: list[str]
    deviations: Array | None = None
    """[B, C, H, W] standard deviation of samples."""
    explained: npt.NDArray[np.float64] | None = None
    """[B] dB."""
    n_views: npt.NDArray[np.int64] | None = None
    """[B] told or found; 0 of a clean image."""
    doubtful: npt.NDArray[np.bool_] | None = None
    seconds: float = 0.0
    """For each image."""


@dataclass(frozen=True)
class Target:
    """Where and how results are written."""

    out: Folder
    job: str = ""
    """What made the results; identifiers in DICOM files follow from it."""
    inject: bool = False
    """Noise leaves the range of clean images; float files can hold that."""
    doubtful: Doubtful = "copy"
    """What becomes of a result that does not explain its input: it is written all the same, the
    input's pixels are written in its place, or the image fails."""


@contextlib.contextmanager
def kept(out: Folder) -> Iterator[None]:
    """What is said where a job's own rows and pages cannot be read or written.

    Raises:
        NoRoom: if the output folder can take no more files.
        Lost: if it cannot be reached, or not any more.
    """
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise no_room(out, error) from None
        raise Lost(
            f"--out must stay where it can be read and written, but {out} cannot any more "
            f"({without_secrets(' '.join(str(error).split()))[:300]})"
        ) from None


def output_name(source: Source, name: str, head: bytes = b"") -> str:
    """Relative output path of an image id and the first bytes of its file; another than the source
    says where the job itself has a file there. Raises InputError for one outside the output
    folder."""
    parts = [part for part in source.output(name, head).split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or not parts:
        raise InputError(f"Image ids must stay inside the output folder, but got {name!r}.")
    if parts[0].casefold() in OWN_NAMES:  # some file systems do not tell capitals apart
        parts[0] += "_"
    return "/".join(parts)


def check_output_names(source: Source, *, samples: bool) -> None:
    """Raise InputError where two images would be written to one place."""
    ids = source.ids
    assert isinstance(ids, Texts)
    # Of those that keep their names nothing need be made: ids differ.
    files = source.chunks is None and not source.tensors
    moved = pc.any(pc.match_substring_regex(ids.array, _MOVED)).as_py()
    alike = samples and pc.any(pc.ends_with(ids.array, DEVIATIONS)).as_py()
    if files and not moved and not alike:
        return
    names: list[str] = []
    bare: list[str] = []
    for name in ids:
        with contextlib.suppress(InputError):
            names.append(output_name(source, name))
            if not files and not source.tensors and split(name)[1].lower() not in KINDS:
                bare.append(names[-1].removesuffix(".png"))
    if len(bare) < len(names):  # what the bytes of a bare one are is not known yet
        names += [name + suffix for name in bare for suffix in NOT_PNG.values()]
    written = pa.array(names + ([name + DEVIATIONS for name in names] if samples else []))
    found, counts = pc.value_counts(written).flatten()
    most = int(np.argmax(counts))
    if counts[most].as_py() > 1:
        raise InputError(
            f"Every image needs an output name of its own, but {counts[most]} of {source.name} "
            f"would be written to {found[most].as_py()!r}; rename them or denoise them apart."
        )


def read_files(source: Source, indices: Iterable[int]) -> Iterator[ImageFile]:
    """The files of a source, one after another; of those that cannot be read, the reason."""
    for index in indices:
        name, data, error, output, stamp = "", b"", "", "", ""
        try:
            stamp = source.stamp(index)
            name, data = source.file(index)
            output = output_name(source, source.ids[index], data[:HEAD_BYTES])
        except InputError as problem:
            error = str(problem)
        yield ImageFile(source.ids[index], output, name, data, source.tensors, error, stamp)


def open_files(
    files: Iterable[ImageFile],
    images: ImagesConfig,
    per_value: int = 0,
    pass_values: int = PASS_PIXELS,
) -> Iterator[tuple[list[Opened], list[Stack], list[Row]]]:
    """Decode files: portions of bounded size, each with its stacks and the failures before it.

    Pictures of one portion that share a shape share stacks of at most `pass_values`. An image
    that has no room in memory at `per_value` bytes for each value fails before it is decoded.
    """
    opened: list[Opened] = []
    pixels: list[list[Array]] = []
    failed: list[Row] = []
    held = 0
    for file in files:
        try:
            if file.error:
                raise InputError(file.error)
            check_room(file.data, file.name, per_value)
            white, window = images.white, images.window
            one = open_file(file.data, file.name, white=white, window=window, tensors=file.tensor)
        except InputError as error:
            failed.append(failure(file, "read", str(error)))
            continue
        frames = [frame.pixels for frame in one.frames]
        size = sum(frame.size for frame in frames)
        if opened and held + size > HELD_PIXELS:
            yield opened, _stacks(opened, pixels, pass_values), failed
            opened, pixels, failed, held = [], [], [], 0
        empty = [replace(frame, pixels=frame.pixels[:0].copy()) for frame in one.frames]
        opened.append(Opened(file, replace(one, frames=empty), [f.shape for f in frames]))
        pixels.append(frames)
        held += size
    yield opened, _stacks(opened, pixels, pass_values), failed


def _stacks(
    opened: Sequence[Opened], pixels: Sequence[Sequence[Array]], pass_values: int
) -> list[Stack]:
    by_shape: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for k, frames in enumerate(pixels):
        for j, frame in enumerate(frames):
            by_shape.setdefault(frame.shape, []).append((k, j))
    stacks = []
    for shape, members in by_shape.items():
        step = max(1, pass_values // int(np.prod(shape)))
        for start in range(0, len(members), step):
            part = members[start : start + step]
            ids = [opened[k].file.id + (f"#{j}" if j else "") for k, j in part]
            stacks.append(Stack(np.stack([pixels[k][j] for k, j in part]), part, ids))
    return stacks


def write_files(
    opened: Sequence[Opened], stacks: Sequence[Stack], answers: Sequence[Answer], target: Target
) -> list[Row]:
    """Encode and write results. Returns a row for each file: of the manifest, or a failure with id,
    stage and error; a failed image never takes another with it.

    Raises:
        NoRoom: if the output folder can take no more.
    """
    found: list[dict[int, _Picture]] = [{} for _ in opened]
    for stack, answer in zip(stacks, answers, strict=True):
        for place, (k, j) in enumerate(stack.owners):
            found[k][j] = _Picture(stack, answer, place)
    return [
        _write_one(one, [pictures[j] for j in range(len(one.shapes))], target)
        for one, pictures in zip(opened, found, strict=True)
    ]


@dataclass(frozen=True)
class _Picture:
    """One picture of a stack, and what the network made of it."""

    stack: Stack
    answer: Answer
    place: int

    @property
    def pixels(self) -> Array:
        return self.stack.pixels[self.place]

    @property
    def result(self) -> Array:
        return self.answer.images[self.place]

    def known(self, name: str) -> Any:
        """A field of the answer, or None."""
        values = getattr(self.answer, name)
        return None if values is None else values[self.place]


def _write_one(one: Opened, pictures: list[_Picture], target: Target) -> Row:
    file = one.file
    for picture in pictures:
        if picture.known("errors"):
            return failure(file, "swap", picture.known("errors"))
        if not np.isfinite(picture.result).all():
            return failure(file, "swap", "The network's answer is not finite.")
    doubted = any(bool(picture.known("doubtful")) for picture in pictures)
    decibels = [picture.known("explained") for picture in pictures]
    views = {picture.known("n_views") for picture in pictures}
    deviations = [picture.known("deviations") for picture in pictures]
    least = None if decibels[0] is None else float(min(decibels))
    if doubted and target.doubtful == "fail":
        return failure(file, DOUBTFUL, f"The result does not explain the image ({least:.0f} dB).")
    try:
        copied = doubted and target.doubtful == "copy"
        result = _encoded(one, pictures, target, copied=copied)
        if deviations[0] is not None:  # first: no result stands without its row
            name = file.output + DEVIATIONS
            target.out.write(name, _npy(deviations))
        write_image(target.out, file.output, result)
    except NotShared:
        raise
    except (InputError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise no_room(target.out, error) from None
        return failure(file, "write", f"{file.output} cannot be written ({error}).")
    channels, height, width = one.shapes[0]
    n_views = views.pop() if len(views) == 1 else None
    return {
        "id": file.id,
        "output": file.output,
        "frames": len(pictures),
        "height": height,
        "width": width,
        "channels": channels,
        "depth": str(one.open.frames[0].depth),
        "donor": pictures[0].known("donors"),
        "n_views": None if n_views is None else int(n_views),
        "explained": least,
        "std": None if deviations[0] is None else float(np.mean([d.mean() for d in deviations])),
        "seconds": sum(picture.answer.seconds for picture in pictures),
        "status": DOUBTFUL if doubted else DONE,
        "stamp": file.stamp,
    }


def _encoded(one: Opened, pictures: list[_Picture], target: Target, *, copied: bool) -> bytes:
    """The result's file, in which doubtful pictures are as they were if they are to be `copied`."""
    file, injected = one.file, target.inject
    doubtful = [k for k, picture in enumerate(pictures) if copied and picture.known("doubtful")]
    all_kept = len(doubtful) == len(pictures)
    suffix = split(file.output)[1].lower()
    same_format = split(file.name)[1].lower() == suffix or KINDS.get(suffix) == one.open.kind
    # A slice belongs into the series of the others, which is a new one.
    if all_kept and same_format and one.open.kind != "dicom":
        return file.data
    kept = dict[int, Values]()
    if doubtful and same_format:
        stored = stored_frames(file.data, file.name)
        kept = {k: stored[k] for k in doubtful if stored[k].dtype.kind != "b"}
    # Noise leaves the range of clean images; float files can hold that.
    whole = all_kept or (injected and one.open.frames[0].depth.kind == "f")
    frames = [
        picture.pixels if k in doubtful else picture.result for k, picture in enumerate(pictures)
    ]
    noise: Any = "kept" if all_kept else "injected" if injected else "removed"
    return one.open.encode(
        frames, file.output, clip=not whole, made=Made(target.job, noise, file.id), kept=kept
    )


def _npy(deviations: Sequence[Array]) -> bytes:
    """[H, W] or [H, W, C] of one picture, [F, ...] of several."""
    if len({d.shape for d in deviations}) > 1:
        raise InputError(
            "deviations of samples are one array, and its pictures differ in size or colours; "
            "split it, or leave out --samples"
        )
    out = io.BytesIO()
    frames = [np.moveaxis(d, 0, 2).squeeze(2) if len(d) == 1 else np.moveaxis(d, 0, 2)
              for d in deviations]  # fmt: skip
    np.save(out, frames[0] if len(frames) == 1 else np.stack(frames), allow_pickle=False)
    return out.getvalue()


def failure(file: ImageFile, stage: str, reason: str) -> Row:
    """The row of an image that could not be done."""
    return {"id": file.id, "output": file.output, "stage": stage, "error": reason}
