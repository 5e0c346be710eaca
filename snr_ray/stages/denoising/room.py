"""How much memory an image will take, known from its header, beside how much a node has."""

from snr_ray.config import Config
from snr_ray.images.formats.headers import n_values
from snr_ray.images.formats.memory import check_values
from snr_ray.network.tiles import TILE
from snr_ray.noise.blocks import working_bytes

NETWORK_BYTES = 40
"""Of the network for each value of an image and channel of the stem: 1,000 to 1,200 bytes were
measured with 32 channels, on images of 512 and 1024 pixels."""
LARGE = 2048
"""Height and width of an image that says what the noise operator takes for each pixel."""


def bytes_per_value(config: Config, n_views: int | None) -> int:
    """Memory that cleaning takes for each value of an image, beyond the image itself; 0 where it
    is cleaned in tiles, so that its size does not matter."""
    if config.model.decoder == "network":
        return 0
    views = n_views or max(config.noise.n_views)
    operator = working_bytes(LARGE, LARGE, views) // LARGE**2
    return NETWORK_BYTES * config.model.stem_channels + operator


def check_room(data: bytes, name: str, per_value: int) -> None:
    """Raise InputError, before anything is decoded, for an image that a node has no memory for."""
    values = n_values(data, name)
    if values is not None and values >= TILE**2:
        check_values(values, name, per_value)
