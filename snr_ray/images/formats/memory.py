"""How much memory an image will take, beside how much a node has."""

import functools
from pathlib import Path

import psutil

from snr_ray.errors import InputError

SHARE = 0.5
"""Of the memory of a node, what one image may take."""
HELD = 16
"""Bytes for each value of an image: decoded, its result, and both encoded."""
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def check_values(values: int, name: str, per_value: int = 0) -> None:
    """Raise InputError for an image of more values than a node has memory for, at `per_value` bytes
    for each beyond the image itself."""
    needed, there = values * (per_value + HELD), node_memory()
    if needed > SHARE * there:
        raise InputError(
            f"An image must need at most half of a node's {there / 2**30:.0f} GB of memory, but "
            f"{name} holds {values / 1e6:,.0f} million values, which take {needed / 2**30:,.0f} "
            "GB; cut it into smaller images, or use larger nodes."
        )


@functools.cache
def node_memory() -> int:
    """Bytes of memory that processes of this machine or container may use."""
    total = int(psutil.virtual_memory().total)
    for path in _LIMITS:
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text.isdecimal():
            total = min(total, int(text))
    return total
