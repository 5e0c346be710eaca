"""What went wrong with a file -> one sentence that names the cause and the way out.

Stores, file systems, Arrow and a dozen decoders each raise their own errors; here they become the
sentences that users read: gone, not allowed, a decoder that is missing, too large, or damaged.
"""

import re

from snr_ray.errors import InputError

_MISSING = re.compile(r"requires the '?([\w-]+)'? package|No module named '([\w.]+)'|"
                      r"missing (?:required )?dependencies|could not import name")  # fmt: skip
_UNKNOWN = re.compile(r"not supported|unsupported|not implemented|unknown compression", re.I)


def unreadable(name: str, error: Exception, what: str = "") -> InputError:
    """The sentence for an error while reading `name`; `what` says what it should have been read
    as, for example "as an image"."""
    reason = " ".join(re.sub(r"<[^>]*>", name, str(error)).split())[:300] or type(error).__name__
    cannot = f"{name} cannot be read{' ' + what if what else ''}"
    if isinstance(error, FileNotFoundError):
        return InputError(f"{name} is gone: it was there when the images were listed.")
    if isinstance(error, PermissionError):
        return InputError(f"{name} may not be read by this user ({error.strerror or reason}).")
    if isinstance(error, MemoryError):
        return InputError(f"{cannot}: its pixels do not fit in memory; cut it into smaller files.")
    missing = _MISSING.search(reason)
    if isinstance(error, ImportError) or missing:
        return InputError(f"{cannot} without a decoder that is not installed ({reason}).")
    if isinstance(error, NotImplementedError) or _UNKNOWN.search(reason):
        return InputError(
            f"{cannot}, as it uses what the decoder does not know ({reason}); convert it to PNG or "
            "to plain TIFF."
        )
    if isinstance(error, OSError) and error.errno:  # of the file system, not of a decoder
        return InputError(f"{cannot} ({reason}).")
    way_out = "; replace the file" if what else ""
    return InputError(f"{cannot} ({reason}){way_out}.")
