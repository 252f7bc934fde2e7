"""Media types of answers, and which of them a client accepts best."""

from flask import request

SSE, NDJSON, CSV = "text/event-stream", "application/x-ndjson", "text/csv"
KEEP_ALIVE_SECONDS = 15.0


def wanted(*kinds: str) -> str:
    """The kind of answer that the client accepts best; JSON where it does not say."""
    return request.accept_mimetypes.best_match(["application/json", *kinds], "application/json")
