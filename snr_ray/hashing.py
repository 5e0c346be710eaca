"""Stable hashes: what decides splits, orders, donors and seeds, and what names a result's origin.

Python's own hash() changes with every process; these do not.
"""

import hashlib
from collections.abc import Iterable


def hash64(text: str) -> int:
    """A text as a uniformly distributed integer in [0, 2**64)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def fingerprint(data: bytes | str | Iterable[str]) -> str:
    """Sixteen hexadecimal digits that change with the data; of texts, those of their lines."""
    if isinstance(data, (bytes, str)):
        return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()[:16]
    digest = hashlib.sha256()
    for text in data:
        digest.update(text.encode() + b"\n")
    return digest.hexdigest()[:16]
