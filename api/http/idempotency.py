"""`Idempotency-Key` (draft-ietf-httpapi-idempotency-key-header): a POST that is sent twice creates one resource.

`@idempotent` stands directly above the view, so it sees the validated body. Only a 2xx response is stored; an error
releases the key. The lock of a dead process is taken over after a minute, and what that process had created is found:
a job's row has the key, and a change of the champion is noted in the key's row (`attach_resource`). Other resources
are found by their content (a scan), or may stay behind unused if the process died between its commit and its response
(an API key whose secret nobody has received).
"""

import hashlib
import json
import re
import uuid
from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import IO, Any, TypeVar

import structlog
from flask import Response, after_this_request, g, request
from flask_smorest import Blueprint
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.orm import Session
from werkzeug.datastructures import FileStorage

from api.http.context import services, tenant, transaction
from api.http.problems import InvalidFields
from jobs import idempotency
from jobs.idempotency import Acquired, KeyedRequest, StoredResponse

View = TypeVar("View", bound=Callable[..., Any])
Replayer = Callable[[uuid.UUID], Any]

HEADER = "Idempotency-Key"
REPLAYED = {"Idempotent-Replayed": "true", "Idempotency-Replayed": "true"}
"""The header as Stripe names it, and as RenalQ named it first."""
STORED_HEADERS = ("Content-Type", "Location", "Retry-After", "Preference-Applied", "Renalq-Disposition")
JOB_KEY_CONSTRAINT = "uq_jobs_tenant_id_idempotency_key"
PATTERN = r"^[\x21-\x7e]{1,255}$"
PARAMETER = {
    "in": "header",
    "name": HEADER,
    "schema": {"type": "string", "pattern": PATTERN},
    "description": "A repeated request with the same key gets the first response again, and creates nothing.",
}

log = structlog.get_logger()


def idempotent(replayer: Replayer | None = None, secrets: Sequence[str] = ()) -> Callable[[View], View]:
    """Declare that a view creates a resource, once for each `Idempotency-Key`.

    Args:
        replayer: gives the view's response for the job, or other resource, that an earlier try has created.
        secrets: fields of the response that are not stored; they are null when it is replayed.
    """

    def decorate(view: View) -> View:
        @wraps(view)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            call = partial(view, *args, **kwargs)
            if HEADER not in request.headers:
                return call()
            return _run_once(call, _keyed_request(args), replayer, secrets)

        documented: Any = Blueprint.doc(parameters=[PARAMETER])(wrapper)
        documented.idempotent = True
        return documented  # type: ignore[no-any-return]

    return decorate


def key() -> str | None:
    """The hash of the request's key, to be stored with the new job; None without one."""
    return g.idempotency[0].key_sha256 if "idempotency" in g else None


def attach_resource(session: Session, resource_id: uuid.UUID) -> None:
    """Note a created resource that is no job, in the transaction that creates it. Without a key it does nothing."""
    if "idempotency" in g:
        keyed, lock = g.idempotency
        idempotency.attach_resource(session, keyed, lock, resource_id)


def _run_once(call: Callable[[], Any], keyed: KeyedRequest, replayer: Replayer | None, secrets: Sequence[str]) -> Any:
    with transaction() as session:
        found = idempotency.acquire(session, keyed, services().settings.idempotency_hours)
    if isinstance(found, StoredResponse):
        return Response(found.body, found.status, {**found.headers, **REPLAYED})
    after_this_request(partial(_store, keyed, found, secrets))
    if found.resource_id is not None and replayer is not None:
        return _replayed(replayer(found.resource_id))
    g.idempotency = keyed, found
    try:
        return call()
    except IntegrityError as error:
        if replayer is None or _constraint(error) != JOB_KEY_CONSTRAINT:
            raise
    # The process whose lock we took over was only slow, and has created the job first.
    with transaction() as session:
        job_id = idempotency.find_resource(session, keyed)
    return _replayed(replayer(job_id))  # type: ignore[arg-type]


def _replayed(answer: Any) -> Any:
    after_this_request(_mark_replayed)
    return answer


def _mark_replayed(response: Response) -> Response:
    response.headers.update(REPLAYED)
    return response


def _store(keyed: KeyedRequest, lock: Acquired, secrets: Sequence[str], response: Response) -> Response:
    """Store a 2xx response, or release the key. If Postgres is away, the lock expires by itself.

    An image is not stored: a repeated request finds the job that made it.
    """
    try:
        with transaction() as session:
            if 200 <= response.status_code < 300 and not (response.mimetype or "").startswith("image/"):
                idempotency.store_response(session, keyed, lock, _to_store(response, secrets))
            else:
                idempotency.release(session, keyed, lock)
    except SQLAlchemyError as error:
        log.warning("idempotency_key_left_locked", error=type(error).__name__)
    return response


def _to_store(response: Response, secrets: Sequence[str]) -> StoredResponse:
    headers = {name: response.headers[name] for name in STORED_HEADERS if name in response.headers}
    body = response.get_data(as_text=True)
    if secrets:
        body = json.dumps({**json.loads(body), **dict.fromkeys(secrets)})
    return StoredResponse(response.status_code, headers, body)


def _constraint(error: IntegrityError) -> str | None:
    return getattr(getattr(error.orig, "diag", None), "constraint_name", None)


# --- which requests are the same ---


def _keyed_request(args: Sequence[Any]) -> KeyedRequest:
    given = request.headers[HEADER]
    # The draft writes the key as a quoted string, most clients send it bare: both are the same key.
    bare = given[1:-1] if len(given) > 2 and given[0] == given[-1] == '"' else given
    if not re.match(PATTERN, bare):
        raise InvalidFields([(f"/{HEADER}", "Must be 1 to 255 visible ASCII characters.")])
    return KeyedRequest(tenant(), hashlib.sha256(bare.encode()).hexdigest(), _fingerprint(args))


def _fingerprint(args: Sequence[Any]) -> str:
    """SHA-256 of method, URL and validated body: the prefix `/v1`, multipart boundaries, spaces and the order of fields
    do not count."""
    whole = [request.method, request.path, request.query_string.decode("latin-1"), *args]
    return hashlib.sha256(json.dumps(whole, sort_keys=True, default=_to_json).encode()).hexdigest()


def _to_json(value: Any) -> Any:
    """A value that JSON has no type for; a file as its hash, so that memory stays flat."""
    if isinstance(value, FileStorage):
        sent_as = {} if value.filename is None else {"file": value.filename}  # none: in base64
        return {**sent_as, "sha256": _hash(value.stream)}
    return str(value)


def _hash(stream: IO[bytes]) -> str:
    stream.seek(0)
    digest = hashlib.file_digest(stream, "sha256")  # type: ignore[arg-type]
    stream.seek(0)
    return digest.hexdigest()
