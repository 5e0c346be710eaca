"""The images that a stage is given, opened aloud: what lies beside them and is not read is told."""

import sys

from snr_ray.images.collection import Source
from snr_ray.images.sources import open_source


def open_images(text: str) -> Source:
    """The source of an `SRC`; says on standard error what it leaves out, by reason.

    Raises:
        InputError: as `open_source`.
    """
    source = open_source(text)
    if source.left_out.counts:
        print(f"{source.name}: left out {source.left_out}.", file=sys.stderr)
    return source
