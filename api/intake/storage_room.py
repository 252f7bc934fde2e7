"""What a request may still store before its tenant's quota is reached.

Requests at the same time do not see each other: what they are sending right now may go beyond the quota together.
"""

import math
import threading
from collections.abc import Callable

from flask import g
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from api.http.context import services, tenant, transaction
from jobs.errors import StorageQuotaExceeded
from jobs.storage.usage import usage


class StorageRoom:
    """Bytes that are left.

    Args:
        used: bytes stored so far.
        limit: the quota; 0: none.
        released: bytes that are deleted once the request has succeeded: its upload.
    """

    def __init__(self, used: int, limit: int, released: int = 0) -> None:
        self._used, self._limit = used, limit
        self._left = limit + released - used if limit else math.inf
        self._lock = threading.Lock()

    def take(self, size: int, is_stored: Callable[[], bool] = lambda: False) -> None:
        """Use `size` bytes of it. What is stored already needs none; that is asked only if the room is too small.

        Raises:
            StorageQuotaExceeded
        """
        with self._lock:
            if size <= self._left:
                self._left -= size
                return
        if not is_stored():
            raise StorageQuotaExceeded(used=self._used, limit=self._limit, more=size)


def storage_room() -> StorageRoom:
    """What is left for this request."""
    with transaction() as session:
        return _room(session)


def reserve(session: Session, size: int) -> None:
    """Make sure that the tenant may store so many bytes more, which the caller's transaction adds. One transaction of
    the tenant at a time: a reservation is large and costs its client nothing.

    Raises:
        StorageQuotaExceeded
    """
    session.execute(select(func.pg_advisory_xact_lock(func.hashtext("storage:" + tenant()))))
    _room(session).take(size)


def _room(session: Session) -> StorageRoom:
    used = usage(session, tenant()).total  # also without a quota: reading folds the account
    return StorageRoom(used, services().settings.quota_storage_bytes, getattr(g, "released_bytes", 0))


def release_after_success(size: int) -> None:
    """Say that the request deletes so many stored bytes if it succeeds."""
    g.released_bytes = size
