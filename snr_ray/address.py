"""Addresses as users give them, paths and URIs: opened, waited for so long and no longer, and shown
without the secrets in them."""

import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from snr_ray.bucketfolder import BucketFolder
from snr_ray.errors import InputError, Lost, check
from snr_ray.folder import JOB, Folder
from snr_ray.localfolder import LocalFolder

ANSWER_S = 60.0
"""How long a store may take to answer when it is opened."""
_SECRET = re.compile(
    r"(\b[A-Za-z][A-Za-z0-9+.-]*://)"
    # A secret may hold slashes that should have been escaped; what follows a port is no secret.
    r"([^\s/?#@'\"]*|[^\s/?#@'\":]*:(?!\d+/)[^\s?#@'\"]*)@"
)

T = TypeVar("T")


def open_folder(place: str | Path | Folder) -> Folder:
    """The output place that a user named: a path, or a URI with what pyarrow takes in its query.

    Nothing is made yet. Credentials are those of the environment, or stand in the URI.

    Raises:
        InputError: if a URI cannot be opened.
        Lost: if its store does not answer within a minute, which it may the next time.
    """
    if isinstance(place, Folder):
        return place
    text = str(place)
    if "://" not in text:
        mangled = re.match(r"(s3|gs|gcs|abfss?|hdfs|file):/", text)
        check(
            mangled is None,
            f"A URI has two slashes after its scheme, but got {text!r}; give "
            f"{text.replace(':/', '://', 1)}.",
        )
        return LocalFolder(local_path(text))
    fs, root = open_uri(text)
    if isinstance(fs, pafs.LocalFileSystem):
        return LocalFolder(Path(root))
    check(bool(root), f"A URI must name a bucket, but got {text!r}; give s3://BUCKET/FOLDER.")
    folder = BucketFolder(without_secrets(text), fs, root)
    try:
        within(ANSWER_S, lambda: folder.exists(JOB))
    except TimeoutError as error:
        raise Lost(f"{folder} must be in a store that answers, but it gave {error}") from None
    except OSError as error:
        raise InputError(
            f"{folder} must be in a bucket that can be reached, but the store says: "
            f"{without_secrets(str(error))}; look at the name, the region and the credentials."
        ) from None
    return folder


def local_path(text: str | Path) -> Path:
    """A path as shells read it: `~` is the home folder, also where a shell has left it, as it does
    in `--out=~/x`."""
    return Path(os.path.expanduser(text))


def open_uri(uri: str) -> tuple[pafs.FileSystem, str]:
    """File system and path of a URI.

    Raises:
        InputError: if pyarrow cannot open it.
        Lost: if its store does not answer within a minute.
    """
    try:
        return within(ANSWER_S, lambda: pafs.FileSystem.from_uri(uri))
    except TimeoutError as error:
        raise Lost(
            f"{without_secrets(uri)} must be in a store that answers, but it gave {error}"
        ) from None
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(
            f"{without_secrets(uri)} is not a URI that can be opened "
            f"({without_secrets(str(error))})."
        ) from None


def without_secrets(text: str) -> str:
    """Any text with `KEY:SECRET@` taken out of the URIs in it."""
    return _SECRET.sub(r"\1", text)


def within(seconds: float, ask: Callable[[], T]) -> T:
    """The answer of a call that may wait for the network. Raises TimeoutError if it takes longer.

    The call goes on in a thread that does not keep the process from ending.
    """
    answers: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            answers.append(ask())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not answers:
        raise TimeoutError(f"no answer within {seconds:.0f} seconds")
    return answers[0]
