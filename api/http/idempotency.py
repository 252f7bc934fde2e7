"""`Idempotency-Key` (draft-ietf-httpapi-idempotency-key-header): a POST that is sent twice makes one thing.

`@idempotent` stands directly above the view, so it sees the body as it was checked. The first answer is kept as it
leaves, and only if it is a 2xx: an error gives the key up. The lock that a dead process leaves is taken over after a
minute, and what it had made is found again: a job's row bears the key, and the key's row a change of the champion
(`bear`). What else is no job is either found by its bytes (a scan), or may be left behind unseen by a process that died
between its commit and its answer (an API key whose secret nobody has learnt).
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
from jobs.idempotency import Fresh, Keyed, Replay

View = TypeVar("View", bound=Callable[..., Any])
Again = Callable[[uuid.UUID], Any]

HEADER, REPLAYED = "Idempotency-Key", "Idempotency-Replayed"
KEPT_HEADERS = ("Content-Type", "Location", "Retry-After", "Preference-Applied", "Renalq-Disposition")
JOB_BEARS_KEY = "uq_jobs_tenant_id_idempotency_key"
BLOCK = 1024 * 1024
PATTERN = r"^[\x21-\x7e]{1,255}$"
PARAMETER = {
    "in": "header",
    "name": HEADER,
    "schema": {"type": "string", "pattern": PATTERN},
    "description": "Sent again with the same request, the first answer comes again and nothing is made twice.",
}

log = structlog.get_logger()


def idempotent(again: Again | None = None, secrets: Sequence[str] = ()) -> Callable[[View], View]:
    """Declare that a view makes something, and makes it once for each `Idempotency-Key`.

    Args:
        again: the view's answer for the job, or for what else an earlier try of the same request has made.
        secrets: fields of the answer that are not kept; they are null when it comes again.
    """

    def decorate(view: View) -> View:
        @wraps(view)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            call = partial(view, *args, **kwargs)
            return _once(call, _keyed(args), again, secrets) if HEADER in request.headers else call()

        documented: Any = Blueprint.doc(parameters=[PARAMETER])(wrapper)
        documented.idempotent = True
        return documented  # type: ignore[no-any-return]

    return decorate


def key() -> str | None:
    """What the new job must bear: the hash of the request's key, or None without one."""
    return g.idempotency_held[0].key_sha256 if "idempotency_held" in g else None


def bear(session: Session, made_id: uuid.UUID) -> None:
    """Note what a view makes that is no job, in its own transaction. Nothing without a key."""
    if "idempotency_held" in g:
        keyed, held = g.idempotency_held
        idempotency.bear(session, keyed, held, made_id)


def _once(call: Callable[[], Any], keyed: Keyed, again: Again | None, secrets: Sequence[str]) -> Any:
    with transaction() as session:
        found = idempotency.begin(session, keyed, services().settings.idempotency_hours)
    if isinstance(found, Replay):
        return Response(found.body, found.status, {**found.headers, REPLAYED: "true"})
    after_this_request(partial(_keep, keyed, found, secrets))
    if found.made_id is not None and again is not None:
        return _replayed(again(found.made_id))
    g.idempotency_held = keyed, found
    try:
        return call()
    except IntegrityError as error:
        if again is None or _constraint(error) != JOB_BEARS_KEY:
            raise
    # Whoever was taken for dead was only slow, and has made the job first.
    with transaction() as session:
        job_id = idempotency.made(session, keyed)
    return _replayed(again(job_id))  # type: ignore[arg-type]


def _replayed(answer: Any) -> Any:
    after_this_request(_mark)
    return answer


def _mark(response: Response) -> Response:
    response.headers[REPLAYED] = "true"
    return response


def _keep(keyed: Keyed, held: Fresh, secrets: Sequence[str], response: Response) -> Response:
    """Keep a good answer, or give the key up. Where Postgres is away, the lock runs out by itself.

    A picture is not kept: the same request again finds the job that made it.
    """
    try:
        with transaction() as session:
            if 200 <= response.status_code < 300 and not (response.mimetype or "").startswith("image/"):
                idempotency.finish(session, keyed, held, _replay(response, secrets))
            else:
                idempotency.release(session, keyed, held)
    except SQLAlchemyError as error:
        log.warning("idempotency_key_left_locked", error=type(error).__name__)
    return response


def _replay(response: Response, secrets: Sequence[str]) -> Replay:
    headers = {name: response.headers[name] for name in KEPT_HEADERS if name in response.headers}
    body = response.get_data(as_text=True)
    if secrets:
        body = json.dumps({**json.loads(body), **dict.fromkeys(secrets)})
    return Replay(response.status_code, headers, body)


def _constraint(error: IntegrityError) -> str | None:
    return getattr(getattr(error.orig, "diag", None), "constraint_name", None)


# --- what makes a request the same ---


def _keyed(args: Sequence[Any]) -> Keyed:
    given = request.headers[HEADER]
    # The draft writes the key as a quoted string, most clients send it bare: both are the same key.
    bare = given[1:-1] if len(given) > 2 and given[0] == given[-1] == '"' else given
    if not re.match(PATTERN, bare):
        raise InvalidFields([(f"/{HEADER}", "Must be 1 to 255 visible ASCII characters.")])
    return Keyed(tenant(), hashlib.sha256(bare.encode()).hexdigest(), _fingerprint(args))


def _fingerprint(args: Sequence[Any]) -> str:
    """SHA-256 over method, address and checked body: its boundaries, spaces and order of fields are no difference."""
    whole = [request.method, request.path, request.query_string.decode("latin-1"), *args]
    return hashlib.sha256(json.dumps(whole, sort_keys=True, default=_described).encode()).hexdigest()


def _described(value: Any) -> Any:
    """What JSON has no word for. Of contents only the hash, so that memory stays flat."""
    if isinstance(value, FileStorage):
        return {"file": value.filename, "sha256": _hash(value.stream)}
    if isinstance(value, bytes):
        return {"sha256": hashlib.sha256(value).hexdigest()}
    return str(value)


def _hash(stream: IO[bytes]) -> str:
    digest = hashlib.sha256()
    stream.seek(0)
    while block := stream.read(BLOCK):
        digest.update(block)
    stream.seek(0)
    return digest.hexdigest()
