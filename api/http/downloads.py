"""Stored bytes as a file to download."""

import os

from flask import Response, send_file

from api.http.context import services
from jobs.errors import ArtifactNotFound

BYTES = "application/octet-stream"


def download(sha256: str, name: str, media_type: str = BYTES) -> Response:
    """The blob under a file's name, tagged by its hash: 304 where the client has it.

    Raises:
        ArtifactNotFound: the bytes are gone.
    """
    try:
        stream = services().artifacts.open(sha256)
    except FileNotFoundError:
        raise ArtifactNotFound("This file's bytes are no longer stored.") from None
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    response = send_file(stream, media_type, True, name, etag=sha256)
    if response.status_code == 200:
        response.content_length = size
    return response
