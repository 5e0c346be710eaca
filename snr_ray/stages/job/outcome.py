"""What stages tell the command line of what they did."""

from dataclasses import dataclass
from pathlib import Path

from snr_ray.folder import Folder


@dataclass(frozen=True)
class Outcome:
    """What a stage did: where, how many images, and how many of them failed."""

    out: Path | Folder
    images: int
    failed: int
    doubtful: int = 0
    """Images whose results do not explain them."""
