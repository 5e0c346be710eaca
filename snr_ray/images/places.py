"""What the user typed for a path -> a file system, a folder or file in it, and what it is known by.

One place decides when two spellings mean the same images: `scans`, `scans/`, `./scans`, the full
path and the way over a link are one; the same relative name in another folder is another. What a
place is known by goes into files that others read, so it holds no key of a bucket.
"""

import os
import re
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import pyarrow.fs as pafs

from snr_ray.address import local_path, open_uri

WHERE = ("endpoint_override", "blob_storage_authority", "dfs_storage_authority")
"""Parts of a URI's query that say where a bucket is; the others say how to get there."""
_SECRET = re.compile("key|secret|token|password|credential|signature", re.IGNORECASE)
_WILD = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Place:
    """Where images are."""

    fs: pafs.FileSystem
    root: str
    """A folder or file, as its file system names it; the folder that a glob begins in."""
    pattern: str
    """Glob of what is meant, relative to `root`; "" means all of it."""
    column: str
    """Column of Parquet tables that was asked for, or ""."""
    identity: str
    """The same for all spellings, without secrets."""
    home: str
    """The same of `root` alone, whatever is chosen in it; no column."""

    @property
    def local(self) -> bool:
        """Whether it is on this machine, or mounted as if it were."""
        return isinstance(self.fs, pafs.LocalFileSystem)


def find(text: str) -> Place:
    """The place of a path, glob or URI; `#COLUMN` may follow. It need not exist.

    Raises:
        InputError: if a URI cannot be opened.
    """
    column, pattern, uri = "", "", "://" in text
    if uri or not _exists(text):  # names of files may hold any character
        before, mark, after = text.rpartition("#")
        if mark and not re.search(r"[/*\[]", after):  # else it belongs to a name
            text, column = before, after
        parts = text.split("/")
        # A question mark in a URI begins its query; a folder may be called as patterns are.
        wild = [
            i
            for i, part in enumerate(parts)
            if _WILD.search(part.split("?")[0] if uri else part)
            and (uri or not _exists("/".join(parts[: i + 1])))
        ]
        if wild:
            pattern = "/".join(part for part in parts[wild[0] :] if part not in ("", "."))
            text = "/".join(parts[: wild[0]]) or ("/" if text.startswith("/") else ".")
            if uri and "?" in pattern:
                pattern, _, query = pattern.partition("?")
                text += f"?{query}"
    if uri:
        fs, root = open_uri(text)
    else:
        fs, root = pafs.LocalFileSystem(), str(local_path(text).absolute())
    local = isinstance(fs, pafs.LocalFileSystem)
    home = _address(text)
    if local and os.path.isdir(root):
        home = printable(os.path.realpath(root)).rstrip("/")
    elif local:  # a link to a file is known by its own name, which is that of the result
        folder, name = os.path.split(root.rstrip("/"))
        home = printable(f"{os.path.realpath(folder).rstrip('/')}/{name}")
    tail = f"/{printable(pattern)}" if pattern else ""
    wanted = f"#{column}" if column else ""
    return Place(fs, root, pattern, column, home + tail + wanted or "/", home or "/")


def _exists(text: str) -> bool:
    """Whether there is such a path; False where this user may not look."""
    return os.path.exists(local_path(text))


def shown(text: str) -> str:
    """A path or URI as it may be printed and kept: without keys and passwords."""
    if "://" not in text:
        return printable(text)
    url = urlsplit(text)
    query = [(k, "..." if _SECRET.search(k) else v) for k, v in parse_qsl(url.query)]
    return urlunsplit(url._replace(netloc=_netloc(text), query=urlencode(query, safe=":/.*[]")))


def printable(text: str) -> str:
    """A name that can be printed and stored as UTF-8; bytes that are not are escaped."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def _netloc(text: str) -> str:
    url = urlsplit(text)
    user, at, host = url.netloc.rpartition("@")
    # An S3 URI holds keys there; one of Azure a container, before what may be a password.
    user = "" if url.scheme in ("s3", "gs", "gcs") else user.partition(":")[0]
    return user + at + host if user else host


def _address(text: str) -> str:
    url = urlsplit(text)
    query = urlencode([(k, v) for k, v in sorted(parse_qsl(url.query)) if k in WHERE], safe=":/")
    path = url.path.rstrip("/") + (f"?{query}" if query else "")
    return f"{url.scheme}://{_netloc(text)}{path}"
