"""Claiming an output folder: whose it is, what is replaced, a stop at any point of it; progress."""

import io
import json
import time
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest

from snr_ray.address import open_folder
from snr_ray.errors import InputError
from snr_ray.folder import JOB, Folder
from snr_ray.hashing import fingerprint
from snr_ray.localfolder import LocalFolder
from snr_ray.lock import locked
from snr_ray.outputs import FILES, Progress, check_file, claim

MINE = {"stage": "denoise", "source": "scans"}
OTHER = {"stage": "denoise", "source": "photos"}


@pytest.fixture(params=["local", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    if request.param == "local":
        return open_folder(tmp_path / "out")
    _, query = request.getfixturevalue("bucket")
    return open_folder(f"s3://bucket/out?{query}")


def take(place: Folder, identity: dict[str, Any], overwrite: bool = False) -> bool:
    return claim(place, identity, owned=("manifest", "parts"), overwrite=overwrite)


def test_a_job_continues_and_another_is_refused(place: Folder) -> None:
    assert take(place, MINE) is False
    assert take(place, MINE) is True
    with pytest.raises(InputError, match=r"another job \(source: 'scans' there, 'photos' now\)"):
        take(place, OTHER)


def test_files_that_were_replaced_are_another_job_but_not_to_an_older_one(place: Folder) -> None:
    job = {"stage": "denoise", "source": "a"}
    claim(place, job, owned=(), overwrite=False)  # as earlier versions wrote it
    assert claim(place, job | {FILES: "now"}, owned=(), overwrite=False)
    claim(place, job | {FILES: "now"}, owned=(), overwrite=True)
    with pytest.raises(InputError, match=r"another job \(sizes and times of the images: 'now'"):
        claim(place, job | {FILES: "later"}, owned=(), overwrite=False)


def test_overwrite_removes_what_the_stage_owns(place: Folder) -> None:
    take(place, MINE)
    for name in ("manifest", "parts/1/2", "kept.png"):
        place.write(name, "")
    assert take(place, OTHER, overwrite=True) is False
    assert place.list() == [JOB, "kept.png"]
    assert take(place, OTHER) is True


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_another_stage_wrote_is_not_replaced(overwrite: bool, place: Folder) -> None:
    take(place, MINE | {"stage": "train"})
    place.write("manifest", "of the run")
    with pytest.raises(InputError, match="what snr train wrote, which snr denoise neither"):
        take(place, MINE, overwrite)
    assert place.list() == [JOB, "manifest"]
    assert take(place, MINE | {"stage": "train"}) is True


def test_files_of_others_are_left_alone(place: Folder) -> None:
    place.write("manifest", "theirs")
    with pytest.raises(InputError, match="holds other files"):
        take(place, MINE)
    with pytest.raises(InputError, match="manifest is not from snr"):
        take(place, MINE, overwrite=True)
    assert place.list() == ["manifest"]


class Stops(LocalFolder):
    """A folder whose driver is killed at its n-th change."""

    left = 0

    def _count(self) -> None:
        Stops.left -= 1
        if Stops.left < 0:
            raise KeyboardInterrupt

    def write(self, name: str, data: bytes | str, *, durable: bool = False) -> None:
        self._count()
        super().write(name, data, durable=durable)

    def create(self, name: str, data: bytes | str) -> bool:
        self._count()
        return super().create(name, data)

    def remove(self, name: str) -> None:
        self._count()
        super().remove(name)


@pytest.mark.parametrize("after", range(6))
@pytest.mark.parametrize("again", [MINE, OTHER])
def test_a_stop_in_the_middle_of_overwrite(
    after: int, again: dict[str, str], tmp_path: Path
) -> None:
    place = open_folder(tmp_path / "out")
    take(place, MINE)
    for name in ("manifest", "parts/1"):
        place.write(name, "of MINE")
    Stops.left = after
    finished = True
    try:
        take(Stops(tmp_path / "out"), OTHER, overwrite=True)
    except KeyboardInterrupt:
        finished = False
    # Never refused for ever, and what is left of a job never passes for that of another.
    if again == OTHER and after:
        assert take(place, OTHER) is finished
        assert place.list() == [JOB]
    elif again == MINE and after == 0:
        assert take(place, MINE) is True
        assert place.list() == [JOB, "manifest", "parts/1"]
    else:
        with pytest.raises(InputError, match="another job"):
            take(place, again)
        assert take(place, again, overwrite=True) is False
        assert place.list() == [JOB]


@pytest.mark.parametrize("text", ["", '{"stage": "den', "[]", "{}", "\udcff"])
def test_damaged_job_is_a_sentence(text: str, place: Folder) -> None:
    place.write(JOB, text.encode(errors="surrogateescape"))
    place.write("manifest", "")
    with pytest.raises(InputError, match=r"job.json must say .* is damaged; .* --overwrite"):
        take(place, MINE)
    assert take(place, MINE, overwrite=True) is False
    assert place.list() == [JOB]


def test_secrets_are_not_written(place: Folder) -> None:
    take(place, {"source": "s3://key:secret@bucket/x"})
    assert json.loads(place.read(JOB)) == {"source": "s3://bucket/x"}
    assert take(place, {"source": "s3://other:key@bucket/x"}) is True


def test_a_place_that_cannot_be_written_is_a_sentence(
    bucket: tuple[pafs.FileSystem, str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--out must be a folder that can be written"):
        take(open_folder(tmp_path / "file" / "out"), MINE)
    with pytest.raises(InputError, match=r"--out must be a folder, but .*file is a file"):
        take(open_folder(tmp_path / "file"), MINE)
    with pytest.raises(InputError, match=r"can be written, but s3://nowhere/out\?.* cannot"):
        take(open_folder(f"s3://nowhere/out?{bucket[1]}"), MINE)


def test_a_bucket_without_write_permission_is_a_sentence(
    bucket: tuple[pafs.FileSystem, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from moto.s3.responses import S3Response

    text = "<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
    denied = (403, {"Content-Type": "application/xml"}, text)
    monkeypatch.setattr(S3Response, "put_object", lambda _: denied)
    place = open_folder(f"s3://bucket/out?{bucket[1]}")
    with pytest.raises(
        InputError, match=r"written, but s3://bucket/out\S* cannot \(.*AccessDenied"
    ):
        take(place, MINE)
    with pytest.raises(InputError, match=r"a lock .*AccessDenied.*give another --out"):
        locked(place, "train").__enter__()


@pytest.fixture
def rival(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Another driver, which claims the same folder between our look and our claim."""
    identity: dict[str, str] = {}
    create = LocalFolder.create

    def late(self: LocalFolder, name: str, data: bytes | str) -> bool:
        create(self, name, json.dumps(identity))
        return create(self, name, data)

    monkeypatch.setattr(LocalFolder, "create", late)
    return identity


def test_another_driver_is_a_moment_faster(rival: dict[str, str], tmp_path: Path) -> None:
    rival |= OTHER
    with pytest.raises(InputError, match="another job"):
        take(open_folder(tmp_path / "out"), MINE)
    rival |= MINE
    assert take(open_folder(tmp_path / "out2"), MINE) is True


@pytest.mark.parametrize(
    ("done", "seconds", "said"),
    [
        (800, 8, "denoise: 800/1,000 images, 100 images/s, 0:02 left, 3 failed\n"),
        (10, 40, "denoise: 10/1,000 images, 4.0 s/image, 66:00 left, 3 failed\n"),
    ],
)
def test_progress_is_in_units_that_say_something(
    done: int, seconds: float, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    line = io.StringIO()
    progress = Progress("denoise", 1000, stream=line)
    now += seconds
    progress.update(done, "3 failed")
    assert line.getvalue() == said


def test_what_only_the_job_before_had_makes_it_another(place: Folder) -> None:
    take(place, MINE | {"size": 32})
    with pytest.raises(InputError, match=r"belongs to another job \(size: 32 there, None now\)"):
        take(place, MINE)


def test_a_fingerprint_that_differs_is_said_to_and_not_shown(place: Folder) -> None:
    take(place, MINE | {"ids": fingerprint("a")})
    with pytest.raises(InputError, match=r"belongs to another job \(ids changed\); give"):
        take(place, MINE | {"ids": fingerprint("b")})


@pytest.mark.parametrize("name", ["folder", "file/x.json"])
def test_a_file_that_cannot_be_written_is_told_before(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    check_file(None)
    check_file(tmp_path / "new" / "x.json")
    with pytest.raises(InputError, match=r"--out must be a file that can be written, but "):
        check_file(tmp_path / name)
