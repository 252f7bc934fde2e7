"""Errors of all routes as problem details (RFC 9457), with `code`, `request_id`, and `errors` for fields.

`type` and `title` belong to the code, and `/v1/problems/CODE` describes it; `instance` is the request's id as a URN.
"""

import errno
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from functools import cached_property
from http import HTTPStatus
from itertools import islice
from typing import Any

import structlog
from flask import Flask, Response, current_app, g, request
from flask_smorest import Api
from marshmallow import Schema, fields
from sqlalchemy.exc import DBAPIError, IntegrityError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from api.http.body.content_coding import ACCEPTED
from api.http.body.spool import JSON_BYTES, SCAN_JSON_BYTES
from api.http.fields import one_of
from api.http.versioning import PREFIX
from jobs.error_codes import ERROR_CODES
from jobs.errors import (
    IdempotencyInFlight,
    Invalid,
    PromotionRefused,
    QuotaExceeded,
    RateLimited,
    RenalQError,
    ScanDeleted,
    TooLarge,
    Unauthorized,
    Unavailable,
    UnsupportedCoding,
    UploadBusy,
)

MEDIA_TYPE = "application/problem+json"
RETRY_SECONDS = 5
RETRYABLE = (QuotaExceeded, Unavailable, IdempotencyInFlight, UploadBusy, ScanDeleted)
"""Errors that a later try may not meet: they carry `Retry-After`."""
SCAN_CONSTRAINT = "fk_scan_results_scan_id_scans"
HTTP_CODES = {400: "BAD_REQUEST", 404: "NOT_FOUND", 405: "METHOD_NOT_ALLOWED"}
"""Codes of what Flask and werkzeug raise."""

MAX_ERRORS = 20
"""Most errors in an answer."""
DETAIL_LENGTH, POINTER_LENGTH = 1000, 500
"""Most characters of a text for people, and of a JSON pointer."""

log = structlog.get_logger()


class Location(StrEnum):
    """Where a field of a request is."""

    BODY = "body"
    QUERY = "query"
    HEADER = "header"


class InvalidFields(Invalid):
    """Fields of the request are missing, unknown or ill-typed: `errors` names each."""

    def __init__(self, errors: Iterable[tuple[str, str]], more: int = 0) -> None:
        """`more`: how many errors there are beside these."""
        found = list(islice(errors, MAX_ERRORS + 1))
        self.errors = found[:MAX_ERRORS]
        rest = f"{more} more" if more else "more"
        super().__init__(f"{self.__doc__} There are {rest}." if more or len(found) > MAX_ERRORS else None)


class StorageFull(Unavailable):
    """The server has no room for this upload. An administrator must free disk space."""

    code = "STORAGE_FULL"


class FieldProblemSchema(Schema):
    """One field that is wrong, and why."""

    pointer = fields.String(
        required=True, metadata={"description": "JSON pointer into the body; `/query/NAME` or `/headers/NAME`."}
    )
    detail = fields.String(required=True)
    in_ = fields.String(data_key="in", required=True, validate=one_of(Location))


class ProblemSchema(Schema):
    """An error (RFC 9457)."""

    type = fields.String(
        required=True, metadata={"description": "Address of the code's description.", "format": "uri-reference"}
    )
    title = fields.String(required=True, metadata={"description": "The code's meaning, the same each time."})
    status = fields.Integer(required=True)
    detail = fields.String(required=True, metadata={"description": "What happened this time, and what to do."})
    instance = fields.String(
        required=True, metadata={"description": "`request_id` as a URN.", "format": "uri-reference"}
    )
    code = fields.String(required=True, metadata={"description": "Stable error code for programs."})
    request_id = fields.String(required=True)
    errors = fields.List(fields.Nested(FieldProblemSchema))
    reasons = fields.List(fields.String())
    degraded = fields.List(fields.String())


class ProblemApi(Api):
    """flask-smorest with RFC 9457 errors. Its own handler drops headers such as `Allow`."""

    ERROR_SCHEMA = ProblemSchema

    def _register_responses(self) -> None:
        """Give errors their own media type in the OpenAPI document."""
        self.DEFAULT_RESPONSE_CONTENT_TYPE = MEDIA_TYPE
        super()._register_responses()
        del self.DEFAULT_RESPONSE_CONTENT_TYPE

    @cached_property
    def _document(self) -> bytes:
        return super()._openapi_json().get_data()  # type: ignore[no-any-return]

    def _openapi_json(self) -> Response:
        """Respond with the OpenAPI document, written once: that takes long, and nobody needs a key to ask for it."""
        return current_app.response_class(self._document, mimetype="application/json")

    def handle_http_exception(self, error: HTTPException) -> Response:
        """Respond to what Flask and werkzeug raise."""
        if error.response is not None:  # a redirect, or a response given to `abort`
            return current_app.make_response(error.response)
        if isinstance(error, RequestEntityTooLarge):
            return error_response(_too_large())
        status = HTTPStatus(error.code or 500)
        headers = {name: value for name, value in error.get_headers() if name not in ("Content-Type", "Content-Length")}
        code = HTTP_CODES.get(status, HTTP_CODES[400] if status < 500 else RenalQError.code)
        return problem(status, code, error.description or status.description, headers)


def register(app: Flask) -> None:
    """Register handlers for all exceptions but werkzeug's."""
    app.register_error_handler(RenalQError, error_response)
    for kind in (OperationalError, InterfaceError, PoolTimeout):
        app.register_error_handler(kind, _database_unavailable)
    app.register_error_handler(DBAPIError, _database_error)
    app.register_error_handler(IntegrityError, _integrity_error)
    app.register_error_handler(OSError, _storage_error)
    app.register_error_handler(Exception, _unexpected)


def error_response(error: RenalQError) -> Response:
    """Respond with the status and code of a RenalQError."""
    headers = {}
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = 'Bearer realm="renalq"'
    if isinstance(error, UnsupportedCoding):
        headers["Accept-Encoding"] = ACCEPTED
    if isinstance(error, RETRYABLE):
        headers["Retry-After"] = str(1 if isinstance(error, IdempotencyInFlight) else RETRY_SECONDS)
    if isinstance(error, RateLimited):
        headers["Retry-After"] = str(error.seconds)
    more: dict[str, Any] = {"reasons": error.reasons} if isinstance(error, PromotionRefused) else {}
    if errors := _field_errors(error):
        more["errors"] = errors
    return problem(error.status, error.code, str(error), headers, **more)


def problem(
    status: int,
    code: str,
    detail: str,
    headers: Mapping[str, str] | None = None,
    **more: Any,
) -> Response:
    """A problem details response."""
    known, request_id = ERROR_CODES.get(code), getattr(g, "request_id", "")
    body: dict[str, Any] = {
        # The code of an installed pipeline may be one that RenalQ does not know.
        "type": f"{PREFIX}/problems/{code}" if known else "about:blank",
        "title": known.title if known else HTTPStatus(status).phrase,
        "status": status,
        "detail": _cut(detail, DETAIL_LENGTH),
        "instance": f"urn:renalq:request:{request_id}",
        "code": code,
        "request_id": request_id,
        **more,
    }
    response = current_app.response_class(current_app.json.dumps(body), status, dict(headers or {}))
    response.content_type = MEDIA_TYPE
    return response


def _field_errors(error: RenalQError) -> list[dict[str, str]]:
    found: Sequence[tuple[str, str]] = ()
    if isinstance(error, InvalidFields):
        found = error.errors
    elif isinstance(error, Invalid) and error.pointer is not None:
        found = [(error.pointer, str(error))]
    return [
        {"pointer": _cut(pointer, POINTER_LENGTH), "detail": _cut(why, DETAIL_LENGTH), "in": _location(pointer)}
        for pointer, why in found
    ]


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}…"


def _location(pointer: str) -> Location:
    """Where the field is. An unknown field of a body may be called `query`, but no pointer leads into it."""
    name = pointer.partition("/")[2].partition("/")[0]
    if pointer.startswith("/headers/") or name == "Idempotency-Key":
        return Location.HEADER
    in_query = pointer.startswith("/query/") or name in request.args or request.method == "GET"
    return Location.QUERY if in_query else Location.BODY


def _too_large() -> TooLarge:
    limit = request.max_content_length
    if limit == SCAN_JSON_BYTES:  # these limits have no setting
        return TooLarge(f"JSON is taken up to {limit} bytes. Send scans as multipart files, or fewer at once.")
    if limit == JSON_BYTES:
        return TooLarge(f"JSON is taken up to {limit} bytes here. Send less at once, or a batch as a manifest (CSV).")
    return TooLarge(limit=limit, setting="RENALQ_MAX_UPLOAD_BYTES")


def _integrity_error(error: IntegrityError) -> Response:
    """A job refers to a scan that was deleted between the two transactions of its request."""
    constraint = getattr(getattr(error.orig, "diag", None), "constraint_name", None)
    return error_response(ScanDeleted()) if constraint == SCAN_CONSTRAINT else _unexpected(error)


def _database_unavailable(error: Exception) -> Response:
    log.warning("database_unavailable", error=type(error).__name__)
    return error_response(Unavailable("The database does not answer. Try again shortly."))


def _database_error(error: DBAPIError) -> Response:
    return _database_unavailable(error) if error.connection_invalidated else _unexpected(error)


def _storage_error(error: OSError) -> Response:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        log.error("storage_full")
        return error_response(StorageFull())
    return _unexpected(error)


def _unexpected(error: Exception) -> Response:
    """A bug."""
    log.error("unexpected", error=type(error).__name__, exc_info=error)
    detail = "Something went wrong here. Give the request_id to your administrator."
    return problem(500, RenalQError.code, detail)
