"""Stable hashes: what decides splits, orders, donors and seeds, and what names a result's origin.

Python's own hash() changes with every process; these do not.
"""

import hashlib


def hash64(text: str) -> int:
    """A text as a uniformly distributed integer in [0, 2**64)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def fingerprint(data: bytes | str) -> str:
    """Sixteen hexadecimal digits that change with the data."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()[:16]
