"""API keys and their scopes. A secret is shown once and stored as a hash.

`python -m jobs.keys NAME [SCOPE…]` creates a key without the API, such as the first one.
"""

import argparse
import datetime as dt
import hashlib
import secrets
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum

from sqlalchemy import ColumnElement, func, or_, select, update
from sqlalchemy.orm import Session

from jobs.db import NOW, seconds
from jobs.errors import Invalid, KeyEnded, KeyNotFound
from jobs.paging import Page, page
from jobs.tables import ApiKey

PREFIX = "rq_"
DEFAULT_TENANT = "default"
MAX_DAYS = 36_500
"""The longest lifetime of a key that expires."""
USED_SECONDS = 3600.0
"""`last_used_at` is written again after this time (s), so that requests do not each write a row."""


class Scope(StrEnum):
    """A permission of a key. `admin` includes all others of its tenant; `operator` is about the whole stack, and only
    an operator, or whoever may run `python -m jobs.keys`, can give it."""

    JOBS_READ = "jobs:read"
    JOBS_WRITE = "jobs:write"
    MODELS_WRITE = "models:write"
    ADMIN = "admin"
    OPERATOR = "operator"


@dataclass(frozen=True)
class Principal:
    """The caller: a key with its tenant and scopes."""

    key_id: uuid.UUID
    tenant_id: str
    scopes: frozenset[str]

    def may(self, scope: Scope) -> bool:
        """Whether the key has the scope."""
        return scope in self.scopes or (Scope.ADMIN in self.scopes and scope != Scope.OPERATOR)

    def missing(self, scopes: Collection[str]) -> str | None:
        """The first of the scopes that the key may not give to another key."""
        return next((scope for scope in scopes if not self.may(Scope(scope))), None)


@dataclass(frozen=True)
class NewKey:
    """A key with its secret, which cannot be shown again."""

    key: ApiKey
    secret: str


def create(
    session: Session,
    name: str,
    scopes: Sequence[str],
    tenant_id: str = DEFAULT_TENANT,
    expires_at: dt.datetime | None = None,
    replaces: uuid.UUID | None = None,
) -> NewKey:
    """Create a key of 256 random bits.

    Raises:
        Invalid: `expires_at` is not in the future, or beyond `MAX_DAYS`.
    """
    _require_future(session, expires_at)
    secret = PREFIX + secrets.token_urlsafe(32)
    key = ApiKey(
        tenant_id=tenant_id,
        name=name,
        scopes=list(scopes),
        secret_sha256=_hash(secret),
        hint=secret[: len(PREFIX) + 4],
        expires_at=expires_at,
        replaces=replaces,
    )
    session.add(key)
    session.flush()
    return NewKey(key, secret)


def _require_future(session: Session, expires_at: dt.datetime | None) -> None:
    if expires_at is None:
        return
    now = session.scalars(select(NOW)).one()
    if not now < expires_at <= now + dt.timedelta(days=MAX_DAYS):
        raise Invalid(f"Choose a time in the future, within {MAX_DAYS} days.", "/expires_at")


def rotate(
    session: Session, tenant_id: str, key_id: uuid.UUID, overlap: float, expires_at: dt.datetime | None = None
) -> NewKey:
    """Create a key with the name and scopes of another, which expires `overlap` seconds from now, or earlier if it
    would anyway. Without `expires_at` the new key lives as long as the old one was meant to.

    Raises:
        KeyNotFound
        KeyEnded: the old key was revoked or has expired.
        Invalid: `expires_at` is not in the future.
    """
    mine = ApiKey.id == key_id, ApiKey.tenant_id == tenant_id
    old = session.execute(select(ApiKey, _is_valid().label("valid"), NOW.label("now")).where(*mine).with_for_update())
    if (row := old.first()) is None:
        raise KeyNotFound
    key, valid, now = row
    if not valid:
        raise KeyEnded
    if expires_at is None and key.expires_at is not None:
        expires_at = now + (key.expires_at - key.created_at)
    new = create(session, key.name, key.scopes, tenant_id, expires_at, replaces=key_id)
    key.expires_at = min(filter(None, (key.expires_at, now + dt.timedelta(seconds=overlap))))
    session.flush()
    return new


def authenticate(session: Session, secret: str) -> Principal | None:
    """The principal of a valid key. The lookup is by hash, so that its timing reveals nothing of the secret."""
    used = func.coalesce(ApiKey.last_used_at > NOW - seconds(USED_SECONDS), False)
    valid = select(ApiKey, used.label("used")).where(ApiKey.secret_sha256 == _hash(secret), _is_valid())
    row = session.execute(valid).first()
    if row is None:
        return None
    key: ApiKey = row.ApiKey
    if not row.used:
        _note_use(session, key.id)
    return Principal(key.id, key.tenant_id, frozenset(key.scopes))


def _is_valid() -> ColumnElement[bool]:
    """SQL: the key is neither revoked nor expired."""
    unexpired: ColumnElement[bool] = or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > NOW)
    return ApiKey.revoked_at.is_(None) & unexpired


def _note_use(session: Session, key_id: uuid.UUID) -> None:
    """Write `last_used_at`, unless another request is doing that: nobody waits for it."""
    mine = select(ApiKey.id).where(ApiKey.id == key_id).with_for_update(skip_locked=True, key_share=True)
    used = update(ApiKey).where(ApiKey.id.in_(mine)).values(last_used_at=NOW)
    session.execute(used.execution_options(synchronize_session=False))


def list_keys(session: Session, tenant_id: str, limit: int = 100, after: uuid.UUID | None = None) -> Page[ApiKey]:
    """The tenant's keys, oldest first, including revoked and expired ones."""
    query = select(ApiKey).where(ApiKey.tenant_id == tenant_id).order_by(ApiKey.id).limit(limit + 1)
    if after is not None:
        query = query.where(ApiKey.id > after)
    return page(session.scalars(query).all(), limit, lambda key: key.id)


def get(session: Session, tenant_id: str, key_id: uuid.UUID) -> ApiKey:
    """A key of the tenant, revoked ones too.

    Raises:
        KeyNotFound
    """
    found = session.scalar(select(ApiKey).where(ApiKey.id == key_id, ApiKey.tenant_id == tenant_id))
    if found is None:
        raise KeyNotFound
    return found


def revoke(session: Session, tenant_id: str, key_id: uuid.UUID) -> None:
    """Revoke a key. Idempotent.

    Raises:
        KeyNotFound: no such key of this tenant.
    """
    found = session.scalar(
        update(ApiKey)
        .where(ApiKey.id == key_id, ApiKey.tenant_id == tenant_id)
        .values(revoked_at=func.coalesce(ApiKey.revoked_at, func.clock_timestamp()))
        .returning(ApiKey.id)
    )
    if found is None:
        raise KeyNotFound


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


# --- the command ---


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.keys", description="Create an API key and print its secret, which is shown only once."
    )
    parser.add_argument("name", help="what the key is for, such as pacs-bridge")
    parser.add_argument("scopes", nargs="*", metavar="SCOPE", help=f"{', '.join(Scope)}; without any: admin")
    parser.add_argument("--tenant", default=DEFAULT_TENANT, help="owner of the key (default: %(default)s)")
    parser.add_argument("--days", type=float, help="the key expires after so many days (default: never)")
    return parser


def main() -> None:
    """Create a key by the arguments of the command line. Wrong arguments create none."""
    parser = _parser()
    given = parser.parse_args()
    if unknown := [scope for scope in given.scopes if scope not in set(Scope)]:
        parser.error(f"unknown scope {unknown[0]!r}: use {', '.join(Scope)}")
    if not 1 <= len(given.name) <= 200 or not 1 <= len(given.tenant) <= 63:
        parser.error("a name has 1 to 200 characters, a tenant 1 to 63")
    if given.days is not None and not 0 < given.days < MAX_DAYS:
        parser.error(f"--days: more than 0, and less than {MAX_DAYS}")
    print(_created(given))


def _created(given: argparse.Namespace) -> str:
    from jobs.db import session_factory
    from jobs.settings import Settings

    with session_factory(Settings().database_url).begin() as session:
        expires_at = None if given.days is None else session.scalar(select(NOW + seconds(given.days * 86_400)))
        return create(session, given.name, given.scopes or [Scope.ADMIN], given.tenant, expires_at).secret


if __name__ == "__main__":
    main()
