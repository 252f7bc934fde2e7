"""What several resources answer with: media types and their negotiation, downloads, streams."""

import os
from collections.abc import Callable, Iterable

from flask import Response, request, send_file

from api.http.context import services
from jobs.errors import ArtifactNotFound

JSON, CSV, NDJSON, SSE = "application/json", "text/csv", "application/x-ndjson", "text/event-stream"
HTML, MARKDOWN, PNG, BYTES = "text/html", "text/markdown", "image/png", "application/octet-stream"
PDF = "application/pdf"
BINARY = {"type": "string", "format": "binary"}
"""OpenAPI schema of a file."""
TEXT = {"type": "string"}
"""OpenAPI schema of a text."""
POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "object-src 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
"""Content-Security-Policy: nothing from other origins, nothing inline, no HTML from strings, no frames."""
DOCUMENTS = frozenset((HTML, "application/xhtml+xml", "image/svg+xml", "text/xml", "application/xml"))
"""Media types in which a browser runs scripts."""
KEEP_ALIVE_SECONDS = 15.0
"""Longest silence of a stream: proxies close a connection that carries nothing."""


def negotiate(*alternatives: str, default: str = JSON) -> str:
    """The media type that the client accepts best; the default where it states no preference."""
    return request.accept_mimetypes.best_match([default, *alternatives], default)


def protect_document(response: Response) -> Response:
    """Send the policy with every document, whoever wrote it."""
    if response.mimetype in DOCUMENTS:
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers["X-Frame-Options"] = "DENY"  # for browsers that do not know frame-ancestors
    return response


def stream(chunks: Iterable[str], media_type: str, on_close: Callable[[], None]) -> Response:
    """A response that is sent as it is generated."""
    response = Response(chunks, mimetype=media_type)
    response.headers["X-Accel-Buffering"] = "no"  # a proxy that buffers would hold the stream back
    response.call_on_close(on_close)
    return response


def download(sha256: str, name: str, media_type: str = BYTES) -> Response:
    """A stored blob under a file's name. Its hash is the ETag: 304 where the client has it.

    Raises:
        ArtifactNotFound: the bytes are gone.
    """
    try:
        content = services().blobs.open(sha256)
    except FileNotFoundError:
        raise ArtifactNotFound("This file's bytes are no longer stored.") from None
    size = content.seek(0, os.SEEK_END)
    content.seek(0)
    response = send_file(content, media_type, True, name, etag=sha256)
    if response.status_code == 200:
        response.content_length = size
    return response
