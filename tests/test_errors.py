"""What ends a stage in a sentence."""

import errno
from pathlib import Path

import pytest

from snr_ray.errors import InputError, NoRoom, room_in


def save() -> None:
    """Fails as torch does where a disk is full."""
    try:
        raise OSError(errno.ENOSPC, "No space left on device")
    except OSError:
        raise RuntimeError("unexpected pos 768 vs 662") from None


def test_whatever_a_full_folder_led_to_is_a_sentence(tmp_path: Path) -> None:
    said = rf"{tmp_path} can take no more files \(No space left on device\)"
    with pytest.raises(NoRoom, match=said), room_in(tmp_path):
        save()
    with pytest.raises(NoRoom), room_in(tmp_path):
        raise OSError(errno.EROFS, "Read-only file system", str(tmp_path / "file"))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "/elsewhere/file"),
        OSError(errno.EACCES, "Permission denied"),
        InputError("The rule."),
    ],
)
def test_other_errors_stay_what_they_are(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as raised, room_in(tmp_path):
        raise error
    assert raised.value is error
