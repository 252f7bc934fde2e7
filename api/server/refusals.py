"""What the server itself answers, before or instead of the application: problem details (RFC 9457), as everywhere.

Neither answer nor log repeats anything that the client sent. Our packages are imported in the functions: gunicorn's
arbiter reads this module, and stays small without them.
"""

import json
import uuid
from dataclasses import dataclass
from http import HTTPStatus

from gunicorn.http import errors


@dataclass(frozen=True)
class Refusal:
    """An answer to what is no request, or to one that cannot be taken.

    Args:
        detail: what was wrong, and what to do.
        retry_seconds: when to come again (s); None: that would not help.
    """

    status: HTTPStatus
    code: str
    detail: str
    retry_seconds: int | None = None


NOT_HTTP = Refusal(HTTPStatus.BAD_REQUEST, "BAD_REQUEST", "This is no request of HTTP/1.1 (RFC 9112). Correct it.")
LONG_LINE = Refusal(
    HTTPStatus.REQUEST_URI_TOO_LONG,
    "BAD_REQUEST",
    "The address is longer than 4094 bytes. Send long lists in the body.",
)
LARGE_HEAD = Refusal(
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
    "BAD_REQUEST",
    "The headers are too large: 100 at most, of 8 kB each and 16 kB together. Send fewer, such as fewer cookies.",
)
UNEXPECTED = Refusal(
    HTTPStatus.EXPECTATION_FAILED, "BAD_REQUEST", "Of `Expect` only `100-continue` is understood. Leave it out."
)
UNKNOWN_CODING = Refusal(
    HTTPStatus.NOT_IMPLEMENTED,
    "BAD_REQUEST",
    "Of Transfer-Encoding only `chunked` is read. Name other codings in Content-Encoding.",
)
SLOW_HEAD = Refusal(
    HTTPStatus.REQUEST_TIMEOUT,
    "TOO_SLOW",
    "The head of the request did not come in time (RENALQ_HEAD_SECONDS). Send it again on a new connection.",
)
MANY_CONNECTIONS = Refusal(
    HTTPStatus.SERVICE_UNAVAILABLE,
    "TOO_MANY_CONNECTIONS",
    "Too many connections of this address are being served (RENALQ_ADDRESS_CONNECTIONS). Use fewer at once.",
    retry_seconds=1,
)
INTERNAL = Refusal(
    HTTPStatus.INTERNAL_SERVER_ERROR,
    "INTERNAL",
    "Something went wrong here. Give the request_id to your administrator.",
)
_OF_ERRORS: tuple[tuple[type[Exception], Refusal], ...] = (
    (errors.LimitRequestLine, LONG_LINE),
    (errors.LimitRequestHeaders, LARGE_HEAD),
    (errors.ExpectationFailed, UNEXPECTED),
    (errors.UnsupportedTransferCoding, UNKNOWN_CODING),
    (errors.ParseException, NOT_HTTP),
)


def refusal_of(error: Exception) -> Refusal:
    """What to answer where gunicorn, or what it called, has raised this."""
    return next((refusal for kind, refusal in _OF_ERRORS if isinstance(error, kind)), INTERNAL)


def answer(refusal: Refusal) -> bytes:
    """The answer as it is sent. It is logged; the connection is to be closed behind it."""
    import structlog

    request_id = uuid.uuid4().hex
    body = _body(refusal, request_id)
    head = [
        f"HTTP/1.1 {refusal.status.value} {refusal.status.phrase}",
        "Connection: close",
        "Content-Type: application/problem+json",
        f"Content-Length: {len(body)}",
        "Cache-Control: no-store",
        "X-Content-Type-Options: nosniff",
        f"X-Request-Id: {request_id}",
    ]
    if refusal.retry_seconds is not None:
        head.append(f"Retry-After: {refusal.retry_seconds}")
    structlog.get_logger().info("refused", status=refusal.status.value, code=refusal.code, request_id=request_id)
    return "\r\n".join([*head, "", ""]).encode() + body


def _body(refusal: Refusal, request_id: str) -> bytes:
    from api.http.versioning import PREFIX
    from jobs.error_codes import ERROR_CODES

    problem = {
        "type": f"{PREFIX}/problems/{refusal.code}",
        "title": ERROR_CODES[refusal.code].title,
        "status": refusal.status.value,
        "detail": refusal.detail,
        "instance": f"urn:renalq:request:{request_id}",
        "code": refusal.code,
        "request_id": request_id,
    }
    return json.dumps(problem).encode()
