"""Objects in a bucket that must not be there yet: written by a conditional request, so that of
several writers at once exactly one is told that it did it. pyarrow's file systems have no such
write; S3 and its like take `If-None-Match: *`, Google's store `ifGenerationMatch=0`.
"""

from typing import Any
from urllib.parse import quote

import pyarrow.fs as pafs

from snr_ray.errors import InputError

CONFLICTS = (409, 412)
"""Another writer was there before, or is at it just now."""
GOOGLE = "storage.googleapis.com"
GOOGLE_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
ANSWER_S = 60.0


def create_object(fs: pafs.FileSystem, path: str, data: bytes) -> bool:
    """Write the object `BUCKET/NAME` if there is none.

    Returns:
        Whether it was written.

    Raises:
        OSError: what the store says against it.
        InputError: if the store is neither S3's kind nor Google's.
    """
    bucket, _, name = path.partition("/")
    for kind, write in ((pafs.S3FileSystem, _in_s3), (pafs.GcsFileSystem, _in_google)):
        if isinstance(fs, kind):
            # What is pickled of a file system is all there is of its address and credentials.
            return write(fs.__reduce__()[1][0], bucket, name, data)
    raise InputError(
        f"Outputs go to folders and buckets of s3:// and gs://, but got {fs.type_name}://{path}, "
        "where two writers could both succeed; give another --out."
    )


def _in_s3(options: dict[str, Any], bucket: str, name: str, data: bytes) -> bool:
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.session import Session

    endpoint = options["endpoint_override"]
    if endpoint and "://" not in endpoint:
        endpoint = f"{options['scheme'] or 'https'}://{endpoint}"
    path_style = endpoint and not options["force_virtual_addressing"]
    try:
        client = Session().create_client(
            "s3",
            region_name=options["region"] or None,
            endpoint_url=endpoint or None,
            aws_access_key_id=options["access_key"] or None,
            aws_secret_access_key=options["secret_key"] or None,
            aws_session_token=options["session_token"] or None,
            verify=options["tls_ca_file_path"] or None,
            config=Config(s3={"addressing_style": "path" if path_style else "auto"}),
        )
        try:
            client.put_object(Bucket=bucket, Key=name, Body=data, IfNoneMatch="*")
        except ClientError as error:
            how = error.response["ResponseMetadata"]
            if how["HTTPStatusCode"] not in CONFLICTS:
                raise
            # A request whose answer was lost is sent again, and then finds what it has written.
            again = how["RetryAttempts"] > 0
            return again and client.get_object(Bucket=bucket, Key=name)["Body"].read() == data
    except (ClientError, BotoCoreError) as error:
        raise OSError(str(error)) from None
    return True


def _in_google(options: dict[str, Any], bucket: str, name: str, data: bytes) -> bool:
    import google.auth
    import requests
    from google.auth.exceptions import GoogleAuthError
    from google.auth.transport.requests import AuthorizedSession
    from google.oauth2.credentials import Credentials

    endpoint = f"{options['scheme'] or 'https'}://{options['endpoint_override'] or GOOGLE}"
    try:
        if options["anonymous"]:
            session = requests.Session()
        elif options["access_token"]:
            session = AuthorizedSession(Credentials(options["access_token"]))
        else:
            session = AuthorizedSession(google.auth.default([GOOGLE_SCOPE])[0])
        answer = session.post(
            f"{endpoint}/upload/storage/v1/b/{quote(bucket, safe='')}/o",
            params={"uploadType": "media", "name": name, "ifGenerationMatch": "0"},
            data=data,
            timeout=ANSWER_S,
        )
    except (GoogleAuthError, requests.RequestException) as error:
        raise OSError(str(error)) from None
    if answer.status_code in CONFLICTS:
        return False
    if not answer.ok:
        raise OSError(f"{answer.status_code} {answer.reason}: {answer.text[:300]}")
    return True
