"""Buckets: objects that must not be there yet, and what a store says that cannot be written to."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar
from urllib.parse import parse_qs, urlsplit

import pyarrow.fs as pafs
import pytest

from snr_ray.address import open_folder
from snr_ray.bucketcreate import create_object
from snr_ray.errors import InputError
from snr_ray.folder import JOB


def test_missing_bucket_and_wrong_key_are_told(bucket: tuple[pafs.FileSystem, str]) -> None:
    place = open_folder(f"s3://nowhere/out?{bucket[1]}")
    with pytest.raises(OSError, match="does not exist"):
        place.write("x", "")
    with pytest.raises(OSError, match="does not exist"):
        place.create("x", "")


def test_what_was_lost_on_its_way_back_was_written(
    bucket: tuple[pafs.FileSystem, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from moto.s3.responses import S3Response

    put, seen = S3Response.put_object, list[int]()

    def lose_the_first(response: S3Response) -> object:
        answer = put(response)
        seen.append(1)
        return answer if len(seen) > 1 else (503, {}, "")

    monkeypatch.setattr(S3Response, "put_object", lose_the_first)
    place = open_folder(f"s3://bucket/out?{bucket[1]}")
    assert place.create(JOB, "mine")
    assert place.read(JOB) == b"mine"
    assert not place.create(JOB, "other")


class _Google(BaseHTTPRequestHandler):
    """Uploads as Google's JSON API takes them: with ifGenerationMatch=0 only to free names."""

    objects: ClassVar[dict[str, bytes]] = {}

    def do_POST(self) -> None:
        url = urlsplit(self.path)
        asked = {key: value[0] for key, value in parse_qs(url.query).items()}
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if url.path != "/upload/storage/v1/b/bucket/o" or asked["uploadType"] != "media":
            status = 404
        elif asked["ifGenerationMatch"] == "0" and asked["name"] in self.objects:
            status = 412
        else:
            status, self.objects[asked["name"]] = 200, body
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Tests are quiet."""


@pytest.fixture
def google() -> Iterator[pafs.FileSystem]:
    """A file system of gs:// whose store is on loopback."""
    _Google.objects = {}
    with ThreadingHTTPServer(("127.0.0.1", 0), _Google) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        place = f"127.0.0.1:{server.server_port}"
        yield pafs.FileSystem.from_uri(
            f"gs://anonymous@bucket/x?scheme=http&endpoint_override={place}"
        )[0]
        server.shutdown()
        thread.join()


def test_an_object_of_google_is_created_once(google: pafs.FileSystem) -> None:
    assert create_object(google, "bucket/out/a b.json", b"mine")
    assert not create_object(google, "bucket/out/a b.json", b"other")
    assert _Google.objects == {"out/a b.json": b"mine"}
    with pytest.raises(OSError, match="404"):
        create_object(google, "nowhere/x", b"")


def test_a_store_without_conditional_writes_is_refused() -> None:
    with pytest.raises(InputError, match=r"buckets of s3:// and gs://, but got mock://bucket/x, "):
        create_object(pafs._MockFileSystem(), "bucket/x", b"")
