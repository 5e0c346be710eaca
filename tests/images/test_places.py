"""What a source is known by: the same for every spelling, another for another place, no secrets."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from snr_ray.errors import InputError
from snr_ray.images.places import find, printable, shown
from snr_ray.images.sources import open_source


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), 9).save(path)


def test_spellings_of_a_folder_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "real" / "scans" / "s.png")
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path / "real")
    full = str(tmp_path / "real" / "scans")
    spellings = ["scans", "scans/", "./scans", "../real/scans", full, f"{full}//",
                 str(tmp_path / "link" / "scans"), f"file://{full}"]  # fmt: skip
    assert {open_source(text).identity for text in spellings} == {full}
    monkeypatch.chdir(tmp_path / "link")
    assert open_source("scans").identity == full
    assert open_source("./scans/*.png").identity == open_source(f"{full}/*.png").identity
    assert open_source("scans/s.png").identity == f"{full}/s.png"
    assert {open_source(f"scans{tail}").home for tail in ("", "/*", "/s.png")} == {full}


def test_folders_may_be_called_as_patterns_and_columns_are(tmp_path: Path) -> None:
    for folder in ("scan [1]", "scan 1", "run#1", "run"):
        picture(tmp_path / folder / "s.png")
    for folder in ("scan [1]", "run#1"):
        home = open_source(f"{tmp_path}/{folder}/*.png").folder
        assert home is not None
        assert home.place == tmp_path / folder
    assert open_source(f"{tmp_path}/scan [12]/*.png").ids == ["scan 1/s.png"]
    assert find("data/test#noisy_20").column == find("file:///d#noisy_20").column == "noisy_20"


def test_what_may_not_be_looked_at_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"cannot be listed \(.*name too long"):
        open_source(str(tmp_path / ("a" * 300)))
    with pytest.raises(InputError, match=r"'~nobody-of-that-name/a\.png' is none of these"):
        open_source("~nobody-of-that-name/a.png")
    really = os.stat

    def locked(path: Any, *args: Any, **options: Any) -> os.stat_result:
        if str(path).startswith(str(tmp_path)):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return really(path, *args, **options)

    monkeypatch.setattr(os, "stat", locked)  # root may look everywhere
    for name in ("a.png", "*.png", "a [1]/*.png"):
        with pytest.raises(InputError, match=r"cannot be listed \(.*Permission denied"):
            open_source(str(tmp_path / name))


def test_what_can_be_read_only_once_is_no_source(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"files or a folder, .* but .*a\.png is a pipe"):
        open_source(str(tmp_path / "a.png"))


def test_the_same_name_in_another_folder_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for folder in "AB":
        picture(tmp_path / folder / "scans" / "s.png")
        monkeypatch.chdir(tmp_path / folder)
        found += [open_source("scans").identity, open_source("*/s.png").identity]
        found.append(open_source("places365:scans").identity)
    assert len(set(found)) == 6


def test_named_sources_are_known_by_their_name() -> None:
    assert open_source("glyphs").identity == "glyphs"


@pytest.mark.parametrize(
    ("text", "identity"),
    [
        ("s3://KEY:SECRET@bucket/scans/?region=eu-1&scheme=http", "s3://bucket/scans"),
        ("s3://bucket/scans?region=x", "s3://bucket/scans"),
        ("s3://bucket/a/*.png?endpoint_override=h:9&region=x",
         "s3://bucket/a?endpoint_override=h:9/*.png"),
    ],
)  # fmt: skip
def test_keys_of_a_bucket_stay_out(text: str, identity: str) -> None:
    assert find(text).identity == identity
    assert "SECRET" not in shown(text) + find(text).identity


def test_what_is_shown_hides_secrets_only() -> None:
    assert shown("a b/[c]*.png") == "a b/[c]*.png"
    assert shown("s3://K:S@b/x*?access_token=T&region=r") == "s3://b/x*?access_token=...&region=r"
    with pytest.raises(InputError) as error:
        find("ftp://user:SECRET@host/x")
    assert "SECRET" not in str(error.value)


def test_a_name_that_is_not_utf8_can_be_printed() -> None:
    assert printable(os.fsdecode(b"caf\xe9")) == "caf\\xe9"
    find(os.fsdecode(b"/nowhere/caf\xe9")).identity.encode()


def test_a_stamp_changes_with_the_file(tmp_path: Path) -> None:
    picture(tmp_path / "s.png")
    source = open_source(str(tmp_path))
    before = source.stamp(0)
    assert before == source.stamp(0)
    Image.new("L", (9, 9), 7).save(tmp_path / "s.png")
    assert source.stamp(0) not in ("", before)
    (tmp_path / "s.png").unlink()
    assert source.stamp(0) == ""
    assert open_source("glyphs").stamp(0) == ""


def test_a_collection_is_another_when_a_file_is_replaced(tmp_path: Path) -> None:
    for name in "ab":
        picture(tmp_path / f"{name}.png")
    before = open_source(str(tmp_path)).files()
    assert open_source(f"{tmp_path}/").files() == before
    Image.new("L", (9, 9), 7).save(tmp_path / "b.png")
    assert open_source(str(tmp_path)).files() != before
