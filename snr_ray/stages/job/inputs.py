"""The images that a stage is given, opened aloud: what lies beside them and is not read is told,
and what keeps them together in one split."""

import sys

from snr_ray.images.collection import Source
from snr_ray.images.groups import Grouped, group_images
from snr_ray.images.sources import NAMES, open_source
from snr_ray.outputs import Progress

MANY = 2000
"""So many headers take long enough for a progress line."""


def open_images(text: str) -> Source:
    """The source of an `SRC`; says on standard error what it leaves out, by reason.

    Raises:
        InputError: as `open_source`.
    """
    source = open_source(text)
    if source.left_out.counts:
        print(f"{source.name}: left out {source.left_out}.", file=sys.stderr)
    return source


def split_images(source: Source, group: str | None) -> Grouped:
    """A source whose splits are as images.group says; says on standard error what they keep
    together.

    Raises:
        InputError: as `group_images`.
    """
    if group is None and source.name.partition(":")[0] in NAMES:  # sets without patients
        return Grouped(source, None, ())
    line = Progress("headers", len(source.ids), unit="files")

    def tell(done: int) -> None:
        if len(source.ids) >= MANY:
            line.update(done)

    grouped = group_images(source, group, tell)
    for sentence in grouped.said:
        print(f"{source.name}: {sentence}.", file=sys.stderr)
    return grouped
