"""Waiting for jobs to change without holding a database connection: one listener thread wakes all waiters.

The thread receives Postgres' NOTIFY on one connection of its own. While it has none, each waiter polls every
`POLL_SECONDS`: without a listener waiters are slower, but miss nothing. A job that changes often wakes each of its
waiters once every `READ_SECONDS`, since each reads the job then.

The slots are shared: while some are free, everybody takes what they need. Once all are taken, a newcomer gets the slot
of the tenant that has most, if that has at least two more; else that of a key of its own tenant, by the same rule. So
each of n tenants can have an n-th of them, and of its share each of its keys, whatever the others do.
"""

import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count

import structlog
from sqlalchemy.engine import Engine

from jobs.db import listening
from jobs.errors import TooManyWatchers
from jobs.events.job_events import JOBS_CHANNEL

POLL_SECONDS = 2.0
"""How often a waiter polls while no listener is connected."""
READ_SECONDS = 0.25
"""Mean time between two changes that one waiter is told of."""
READ_AT_ONCE = 4
"""Changes that a waiter is told of without a pause, after a rest. A single scan has three: submission, claim, end."""
LISTEN_SECONDS = 5.0
"""How long the listener waits for a notification before it checks whether it was closed."""

log = structlog.get_logger()


class Subscription:
    """Notices when one job may have changed. Made by `ChangeListener.subscribe`.

    Args:
        holder: whose slot it is.
        number: of the subscription, in the order of their beginnings.
    """

    def __init__(self, listener: "ChangeListener", job_id: uuid.UUID, holder: "Holder", number: int) -> None:
        self._listener = listener
        self.job_id, self.holder, self.number = job_id, holder, number
        self._ended = False
        self._told_until = 0.0  # READ_SECONDS for each change that was told, from the time it was told
        self.event = threading.Event()

    @property
    def closed(self) -> bool:
        """Whether to stop waiting: the process ends, or another client got the slot."""
        return self._ended or self._listener.closed

    def end(self) -> None:
        """Take the slot away, and wake whoever waits."""
        self._ended = True
        self.event.set()

    def wait(self, seconds: float) -> bool:
        """Wait for a change, `seconds` at most. False: there was none. Returns at once when it is closed.

        Changes in fast succession are told together, the last one among them. Without a connected listener it returns
        True every `POLL_SECONDS`, so that the caller reads the job itself.
        """
        deadline = time.monotonic() + seconds
        while not self.closed:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            if self.event.wait(min(left, POLL_SECONDS)):
                self._pause(left)
                self.event.clear()  # before the caller reads: what changes then wakes it again
                return True
            if not self._listener.listening:
                return True
        return True

    def _pause(self, longest: float) -> None:
        """Wait until this waiter may be told of a change again: a leaky bucket of `READ_AT_ONCE`."""
        now = time.monotonic()
        pause = self._told_until - (READ_AT_ONCE - 1) * READ_SECONDS - now
        self._told_until = max(self._told_until, now) + READ_SECONDS
        time.sleep(min(max(pause, 0.0), longest))


@dataclass(frozen=True)
class Holder:
    """Whose waiting it is."""

    tenant_id: str
    key_id: uuid.UUID


class ChangeListener:
    """The waiters of one process, and the thread that wakes them.

    Args:
        engine: where to listen.
        slots: how many may wait at once.
    """

    def __init__(self, engine: Engine, slots: int) -> None:
        self._engine = engine
        self._slots = slots
        self._lock = threading.Lock()
        self._numbers = count()
        self._subscriptions: dict[uuid.UUID, set[Subscription]] = defaultdict(set)
        self._thread: threading.Thread | None = None
        self.listening = False
        self.closed = False

    @contextmanager
    def subscribe(self, job_id: uuid.UUID, holder: Holder) -> Iterator[Subscription]:
        """Subscribe to a job for the length of the block. Read the job only inside it, or a change may be missed.

        Raises:
            TooManyWatchers: all slots are taken, and `holder` has its share.
        """
        with self._lock:
            if self.closed:
                raise TooManyWatchers
            if self.waiting >= self._slots:
                self._take_slot(holder)
            subscription = Subscription(self, job_id, holder, next(self._numbers))
            self._subscriptions[job_id].add(subscription)
            self._start()
        try:
            yield subscription
        finally:
            with self._lock:
                self._remove(subscription)

    def _take_slot(self, holder: Holder) -> None:
        """End a subscription of the largest tenant, or of the largest key in the holder's tenant: the latest one."""
        all_ = list(self._all())
        if not all_:
            raise TooManyWatchers
        tenants = Counter(one.holder.tenant_id for one in all_)
        largest = max(tenants, key=lambda tenant: tenants[tenant])
        if tenants[largest] < tenants[holder.tenant_id] + 2:
            largest = holder.tenant_id
        keys = Counter(one.holder for one in all_ if one.holder.tenant_id == largest)
        key = max(keys, key=lambda one: keys[one], default=holder)
        if largest == holder.tenant_id and keys[key] < keys[holder] + 2:
            raise TooManyWatchers
        latest = max((one for one in all_ if one.holder == key), key=lambda one: one.number)
        self._remove(latest)
        latest.end()

    def _remove(self, subscription: Subscription) -> None:
        of_job = self._subscriptions.get(subscription.job_id, set())
        of_job.discard(subscription)
        if not of_job:
            self._subscriptions.pop(subscription.job_id, None)

    def _all(self) -> Iterator[Subscription]:
        return chain.from_iterable(self._subscriptions.values())

    @property
    def waiting(self) -> int:
        """Number of subscriptions."""
        return sum(map(len, self._subscriptions.values()))

    def close(self) -> None:
        """Wake all waiters and refuse new ones: the process ends."""
        self.closed = True
        self._wake_all()

    def _start(self) -> None:
        """Start the thread with the first waiter, so that a process without waiters has none."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._listen, name="change-listener", daemon=True)
            self._thread.start()

    def _listen(self) -> None:
        while not self.closed:
            try:
                self._listen_once()
            except Exception as error:  # any error: a dead thread would leave all waiters polling
                log.warning("listener_lost", error=type(error).__name__)
            self.listening = False
            time.sleep(1)

    def _listen_once(self) -> None:
        with listening(self._engine, JOBS_CHANNEL) as notifications:
            self.listening = True
            self._wake_all()  # for changes while nothing listened
            while not self.closed:
                for payload in notifications.wait(LISTEN_SECONDS):
                    self._wake(payload)

    def _wake(self, payload: str) -> None:
        try:
            job_id = uuid.UUID(payload)
        except ValueError:
            return
        with self._lock:
            subscriptions = tuple(self._subscriptions.get(job_id, ()))
        for subscription in subscriptions:
            subscription.event.set()

    def _wake_all(self) -> None:
        with self._lock:
            subscriptions = list(self._all())
        for subscription in subscriptions:
            subscription.event.set()
