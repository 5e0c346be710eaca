"""What ends a stage in a sentence: wrong input, a lost cluster, a run that cannot go on."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""What a file system says that takes no more files."""


class InputError(ValueError):
    """Something the user can put right; its text says the rule, what came, and the way out."""


class Lost(RuntimeError):
    """What a job worked with went away, such as its cluster; the same command continues."""


class RunError(RuntimeError):
    """A run that cannot go on, though all that was asked for was right; its text says why, and what
    is kept."""


class NoRoom(RunError):
    """An output folder can take no more files, whichever it is."""


def no_room(out: object, error: OSError) -> NoRoom:
    """What is said of an output folder that can take no more files."""
    return NoRoom(
        f"--out must have room, but {out} can take no more files ({error.strerror}); make some, "
        "and the same command continues."
    )


@contextmanager
def room_in(out: Path) -> Iterator[None]:
    """Raise NoRoom in place of what it led to that an output folder can take no more files."""
    try:
        yield
    except (InputError, RunError):
        raise
    except Exception as error:  # torch has its own words for a file that it could not write
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, OSError) and cause.errno in NO_ROOM and _is_in(out, cause):
                raise no_room(out, cause) from None
            cause = cause.__cause__ or cause.__context__
        raise


def _is_in(out: Path, error: OSError) -> bool:
    """Whether an error may be of a file in a folder: those of writes do not tell of which."""
    return not isinstance(error.filename, str) or Path(error.filename).is_relative_to(out)


def check(rule: bool, sentence: str) -> None:
    """Raise InputError with the sentence where the rule does not hold."""
    if not rule:
        raise InputError(sentence)
