"""Webhooks leave the house here: in threads beside the dispatcher's ringing, which no slow receiver delays.

Each webhook has one delivery on its way at a time, and each tenant a few: a receiver that is dead holds up what is for
itself. Several dispatchers may do this at once (`jobs.events.deliveries.claim`).
"""

import json
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg2
import structlog
from sqlalchemy.exc import SQLAlchemyError
from standardwebhooks import Webhook

from jobs.db import listening, session_factory
from jobs.events import deliveries
from jobs.events.deliveries import Attempt, DueDelivery
from jobs.events.webhooks import DELIVERIES_CHANNEL
from jobs.settings import Settings
from worker.dispatcher.webhook_client import Undelivered, post

log = structlog.get_logger()

SENDERS = 16
"""Deliveries on their way at once."""
SENDERS_OF_ONE = 4
"""The same for one tenant."""
FAREWELL = 3.0
"""Seconds that deliveries on their way are waited for at the end. What takes longer is sent again by the next one."""
LOST_DATABASE = (SQLAlchemyError, psycopg2.Error)


@contextmanager
def delivering(settings: Settings) -> Iterator[None]:
    """Send what is due as long as the block lasts."""
    deliverer = Deliverer(settings)
    thread = threading.Thread(target=deliverer.run, name="deliverer", daemon=True)
    thread.start()
    try:
        yield
    finally:
        deliverer.stop()
        thread.join()


class Deliverer:
    """Claims what is due in the thread that runs it, and sends each delivery in a thread of its own."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._sessions = session_factory(settings.database_url, pool_size=3, application="renalq-deliveries")
        # A frozen sender is given up so much later than its receiver.
        self._hold = settings.webhook_seconds + settings.lease_seconds
        self._busy: dict[uuid.UUID, str] = {}  # webhooks with a delivery on its way, and their tenants
        self._stop = threading.Event()

    def run(self) -> None:
        """Work until `stop()`. Postgres going away is waited out."""
        while not self._stop.is_set():
            try:
                self._serve()
            except Exception as error:  # whatever it is, the dispatcher goes on, and so must this
                log.warning("deliveries_interrupted", error=type(error).__name__)
                self._stop.wait(1)
        deadline = time.monotonic() + FAREWELL
        while self._busy and time.monotonic() < deadline:
            time.sleep(0.02)
        self._sessions.kw["bind"].dispose()

    def stop(self) -> None:
        """End `run()`: nothing more is claimed, and what is on its way is waited for a little."""
        self._stop.set()

    def _serve(self) -> None:
        with listening(self._sessions.kw["bind"], DELIVERIES_CHANNEL) as bell:
            while not self._stop.is_set():
                while len(self._busy) < SENDERS and (due := self._claimed()):
                    self._busy[due.webhook_id] = due.tenant_id
                    threading.Thread(target=self._send, args=[due], daemon=True).start()
                bell.wait(self._settings.sweep_seconds)

    def _claimed(self) -> DueDelivery | None:
        busy = self._busy.copy()  # senders take themselves out of it
        full = [tenant for tenant, number in Counter(busy.values()).items() if number >= SENDERS_OF_ONE]
        with self._sessions.begin() as session:
            return deliveries.claim(session, self._hold, list(busy), full)

    def _send(self, due: DueDelivery) -> None:
        attempt = self._attempted(due)
        del self._busy[due.webhook_id]  # before the bell rings for the next one
        try:
            with self._sessions.begin() as session:
                deliveries.record_attempt(session, due, attempt, self._settings.webhook_retries)
        except LOST_DATABASE as error:  # it is sent again when the claim is over
            log.warning("database_lost", error=type(error).__name__)

    def _attempted(self, due: DueDelivery) -> Attempt:
        """Send it. Nobody else learns of the address, which may hold a password, or of the answer."""
        try:
            body, headers = signed(due)
            status = post(due.url, body, headers, self._settings)
        except Undelivered as error:
            return Attempt(None, str(error))
        except Exception as error:  # a defect of ours: it must neither end the thread nor block the webhook
            log.error("webhook_not_sent", delivery=str(due.id), error=type(error).__name__)
            return Attempt(None, f"It could not be sent ({type(error).__name__}).")
        return Attempt(status, None if 200 <= status < 300 else complaint(status))


def signed(due: DueDelivery) -> tuple[bytes, dict[str, str]]:
    """The body, and the headers of Standard Webhooks."""
    time_of_event = due.created_at.isoformat().replace("+00:00", "Z")
    body = json.dumps({"type": due.type, "timestamp": time_of_event, "data": due.data})
    headers = {
        "Content-Type": "application/json",
        "User-Agent": "renalq",
        "Connection": "close",
        "webhook-id": due.event_id,
        "webhook-timestamp": str(int(due.now.timestamp())),
        "webhook-signature": Webhook(due.secret).sign(due.event_id, due.now, body),
    }
    return body.encode(), headers


def complaint(status: int) -> str:
    """What its owner has to know of an answer that is not good."""
    if 300 <= status < 400:
        return f"The receiver answered {status}: redirects are not followed, so give the final address."
    if status == deliveries.GONE:
        return f"The receiver answered {status}: nothing more is sent to it."
    return f"The receiver answered {status}."
