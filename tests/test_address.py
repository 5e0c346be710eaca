"""Paths and URIs of users: opened or refused by a sentence, waited for, without their secrets."""

import pickle
import socket
import time
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from snr_ray import address
from snr_ray import configfile as configs
from snr_ray.address import open_folder, within, without_secrets
from snr_ray.arguments import parser
from snr_ray.errors import InputError, Lost
from snr_ray.images import files
from snr_ray.images.places import find
from snr_ray.images.sources import open_source
from snr_ray.learning.modelfolder import read_model
from snr_ray.localfolder import LocalFolder


@pytest.mark.parametrize("text", ["s3:/bucket/x", "gs:/bucket/x"])
def test_a_uri_that_lost_a_slash_is_no_folder(text: str) -> None:
    with pytest.raises(InputError, match=f"give {text.replace(':/', '://')}"):
        open_folder(text)


def test_file_uri_is_a_folder(tmp_path: Path) -> None:
    place = open_folder(f"file://{tmp_path}/out")
    assert isinstance(place, LocalFolder)
    assert place.local == tmp_path / "out"


def test_a_tilde_that_the_shell_left_is_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_folder("~/out").local == tmp_path / "out"
    words = ["denoise", "--images=~/in", "--out=~/out"]
    assert parser().parse_args(words).out == tmp_path / "out"
    (tmp_path / "notmnist").mkdir()
    with pytest.raises(InputError, match=f"but {tmp_path}/notmnist/model does not"):
        read_model("~/notmnist/model")
    (tmp_path / "my.yaml").write_text("train: {steps: 7}")
    assert configs.load(["~/my.yaml"]).train.steps == 7
    for text in ("~nobodys/in", "~in"):  # of a user who is not there, or a name like any other
        assert find(text).root == str(Path(text).absolute())


@pytest.mark.parametrize("text", ["nosuch://bucket/x", "s3://", "http://host/x"])
def test_a_uri_that_cannot_be_opened_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"can be opened|name a bucket"):
        open_folder(text)


def test_a_store_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address, "ANSWER_S", 0.3)
    monkeypatch.setattr(files, "ANSWER_S", 0.3)
    begun = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        where = f"scheme=http&endpoint_override=127.0.0.1:{port}&region=us-east-1"
        for opened in (open_folder, open_source):  # a job that is tried again may find it awake
            with pytest.raises(Lost, match=r"^s3://bucket/x\S+ must .* no answer within"):
                opened(f"s3://key:secret@bucket/x?{where}")
    assert time.monotonic() - begun < 3


def test_within_tells_what_went_wrong() -> None:
    def fail() -> None:
        raise OSError("why")

    with pytest.raises(OSError, match="why"):
        within(5, fail)


def test_secrets_are_never_shown(bucket: tuple[pafs.FileSystem, str]) -> None:
    place = open_folder(f"s3://key:se%2Fcret@bucket/out?{bucket[1]}")
    assert str(place) == f"s3://bucket/out?{bucket[1]}"
    assert "cret" not in str(pickle.loads(pickle.dumps(place.join("x"))))
    said = without_secrets("read 's3://k:s@b/x', s3://t@b, mail a@b.c at http://h/p?u=a@b")
    assert said == "read 's3://b/x', s3://b, mail a@b.c at http://h/p?u=a@b"
    kept = "s3://b/x@y.png s3://b/x:1@y http://h:80/x@y"
    assert without_secrets(kept) == kept
    with pytest.raises(InputError, match="s3://bucket/out is not a URI that") as told:
        open_folder("s3://key:se/c+ret@bucket/out")  # not escaped, as it should be
    assert "ret" not in str(told.value)
