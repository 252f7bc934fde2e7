"""API keys and their scopes. A secret is shown once and stored as a hash."""

import hashlib
import secrets
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from jobs.errors import KeyNotFound
from jobs.tables import ApiKey

PREFIX = "rq_"
DEFAULT_TENANT = "default"


class Scope(StrEnum):
    """A permission of a key. `admin` includes all others."""

    JOBS_READ = "jobs:read"
    JOBS_WRITE = "jobs:write"
    MODELS_WRITE = "models:write"
    ADMIN = "admin"


@dataclass(frozen=True)
class Principal:
    """The caller: a key with its tenant and scopes."""

    key_id: uuid.UUID
    tenant_id: str
    scopes: frozenset[str]

    def may(self, scope: Scope) -> bool:
        """Whether the key has the scope."""
        return scope in self.scopes or Scope.ADMIN in self.scopes


@dataclass(frozen=True)
class NewKey:
    """A key with its secret, which cannot be shown again."""

    key: ApiKey
    secret: str


def create(session: Session, name: str, scopes: Sequence[str], tenant_id: str = DEFAULT_TENANT) -> NewKey:
    """Create a key of 256 random bits."""
    secret = PREFIX + secrets.token_urlsafe(32)
    key = ApiKey(
        tenant_id=tenant_id, name=name, scopes=list(scopes), secret_sha256=_hash(secret), hint=secret[: len(PREFIX) + 4]
    )
    session.add(key)
    session.flush()
    return NewKey(key, secret)


def authenticate(session: Session, secret: str) -> Principal | None:
    """The principal of a valid key. The lookup is by hash, so that its timing reveals nothing of the secret."""
    key = session.scalar(select(ApiKey).where(ApiKey.secret_sha256 == _hash(secret), ApiKey.revoked_at.is_(None)))
    return Principal(key.id, key.tenant_id, frozenset(key.scopes)) if key else None


def list_keys(session: Session, tenant_id: str) -> Sequence[ApiKey]:
    """The tenant's keys, oldest first, including revoked ones."""
    return session.scalars(select(ApiKey).where(ApiKey.tenant_id == tenant_id).order_by(ApiKey.id)).all()


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


def main() -> None:
    """`python -m jobs.keys NAME [SCOPE…]`: create a key (scope admin by default) and print its secret."""
    import sys

    from jobs.db import session_factory
    from jobs.settings import Settings

    name, *scopes = sys.argv[1:] or ["admin"]
    wanted = [Scope(scope) for scope in scopes] or [Scope.ADMIN]
    with session_factory(Settings().database_url).begin() as session:
        print(create(session, name, wanted).secret)


if __name__ == "__main__":
    main()
