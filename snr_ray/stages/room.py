"""How much memory an image will take, known from its header, beside how much a node has."""

import functools
from pathlib import Path

import psutil

from snr_ray.config import Config, InputError
from snr_ray.images.headers import n_values
from snr_ray.network.tiles import TILE

NETWORK_BYTES = 40
"""Of the network for each value of an image and channel of the stem: 1,000 to 1,200 bytes were
measured with 32 channels, on images of 512 and 1024 pixels."""
LARGE = 2048
"""Height and width of an image that says what the noise operator takes for each pixel."""
SHARE = 0.5
"""Of the memory of a node, what one image may take."""
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def bytes_per_value(config: Config, n_views: int | None) -> int:
    """Memory that cleaning takes for each value of an image, beyond the image itself; 0 where it
    is cleaned in tiles, so that its size does not matter."""
    if config.model.decoder == "network":
        return 0
    from snr_ray.noise.operator import working_bytes  # compiled; tasks that only read do without

    views = n_views or max(config.noise.n_views)
    operator = working_bytes(LARGE, LARGE, views) // LARGE**2
    return NETWORK_BYTES * config.model.stem_channels + operator


def check_room(data: bytes, name: str, per_value: int) -> None:
    """Raise InputError, before anything is decoded, for an image that a node has no memory for."""
    values = n_values(data, name)
    if values is None or values < TILE**2:
        return
    needed, there = values * (per_value + 16), node_memory()  # decoded, result and both encoded
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
