"""Sends webhooks in threads beside the dispatch loop, which no slow receiver delays.

Each webhook has at most one delivery in flight, and each tenant a few: a dead receiver delays only its own deliveries.
Several dispatchers may send at once (`jobs.events.deliveries.claim`).
"""

import json
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import structlog
from standardwebhooks import Webhook

from jobs.db import listening, session_factory
from jobs.events import deliveries
from jobs.events.deliveries import Attempt, DueDelivery
from jobs.events.webhooks import DELIVERIES_CHANNEL, EventType
from jobs.settings import Settings
from worker.dispatcher import webhook_body
from worker.dispatcher.webhook_client import DeliveryFailed, post

log = structlog.get_logger()

MAX_PARALLEL = 16
"""Deliveries in flight at once."""
MAX_PARALLEL_PER_TENANT = 4
"""Deliveries in flight at once for one tenant."""
SHUTDOWN_SECONDS = 3.0
"""Seconds to wait for deliveries in flight at the end. Slower ones are sent again by the next dispatcher."""


@contextmanager
def sending_webhooks(settings: Settings) -> Iterator[None]:
    """Send due deliveries for the duration of the block. An exception, such as a lost connection, is not delayed by
    deliveries in flight; the normal end waits for them shortly."""
    sender = WebhookSender(settings)
    thread = threading.Thread(target=sender.run, name="webhooks", daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        sender.stop()
        raise
    sender.stop()
    thread.join()


class WebhookSender:
    """Claims due deliveries in its own thread, and sends each of them in another."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        # With 16 receivers at once, two further connections come and go.
        self._sessions = session_factory(settings.database_url, 1, "renalq-deliveries", overflow=2)
        # A claim expires so late that its receiver has timed out long before.
        self._hold = settings.webhook_seconds + settings.lease_seconds
        self._busy: dict[uuid.UUID, str] = {}  # webhooks with a delivery in flight, and their tenants
        self._stop = threading.Event()

    def run(self) -> None:
        """Work until `stop()`. While Postgres is away it waits."""
        while not self._stop.is_set():
            try:
                self._serve()
            except Exception as error:  # the dispatcher survives any error, and so must this thread
                log.warning("deliveries_interrupted", error=type(error).__name__)
                self._stop.wait(1)
        deadline = time.monotonic() + SHUTDOWN_SECONDS
        while self._busy and time.monotonic() < deadline:
            time.sleep(0.02)
        self._sessions.kw["bind"].dispose()

    def stop(self) -> None:
        """End `run()`: nothing more is claimed, and deliveries in flight get a short time to finish."""
        self._stop.set()

    def _serve(self) -> None:
        with listening(self._sessions.kw["bind"], DELIVERIES_CHANNEL) as notifications:
            while not self._stop.is_set():
                while len(self._busy) < MAX_PARALLEL and (due := self._claim()):
                    self._busy[due.webhook_id] = due.tenant_id
                    threading.Thread(target=self._send, args=[due], daemon=True).start()
                notifications.wait(self._settings.sweep_seconds)

    def _claim(self) -> DueDelivery | None:
        busy = self._busy.copy()  # a copy: sending threads remove their entries
        full = [tenant for tenant, number in Counter(busy.values()).items() if number >= MAX_PARALLEL_PER_TENANT]
        with self._sessions.begin() as session:
            return deliveries.claim(session, self._hold, list(busy), full)

    def _send(self, due: DueDelivery) -> None:
        attempt = self._attempt(due)
        try:
            # Progress is not repeated: what is sent next is newer.
            retries = () if due.type == EventType.JOB_PROGRESS else self._settings.webhook_retries
            with self._sessions.begin() as session:
                deliveries.record_attempt(session, due, attempt, retries)
                # Before the commit, whose NOTIFY announces the next one. Until then a disabled webhook's row is locked.
                del self._busy[due.webhook_id]
        except Exception as error:  # it is sent again when the claim expires
            self._busy.pop(due.webhook_id, None)
            log.warning("delivery_not_recorded", error=type(error).__name__)

    def _attempt(self, due: DueDelivery) -> Attempt:
        """Send it. Neither the URL, which may contain a password, nor the response is logged."""
        try:
            with self._sessions.begin() as session:
                told = webhook_body.details(session, due, self._settings)
            body, headers = signed_request(replace(due, data=due.data | told))
            status = post(due.url, body, headers, self._settings)
        except (DeliveryFailed, webhook_body.Outdated) as error:
            return Attempt(None, str(error))
        except Exception as error:  # a bug must neither end the thread nor block the webhook
            log.error("webhook_not_sent", delivery=str(due.id), error=type(error).__name__)
            return Attempt(None, f"It could not be sent ({type(error).__name__}).")
        return Attempt(status, None if 200 <= status < 300 else status_error(status))


def signed_request(due: DueDelivery) -> tuple[bytes, dict[str, str]]:
    """The body, and the headers of Standard Webhooks; without a secret no signature."""
    time_of_event = due.created_at.isoformat().replace("+00:00", "Z")
    body = json.dumps({"type": due.type, "timestamp": time_of_event, "data": due.data})
    headers = {
        "Content-Type": "application/json",
        "User-Agent": "renalq",
        "Connection": "close",
        "webhook-id": due.event_id,
        "webhook-timestamp": str(int(due.now.timestamp())),
    }
    if due.secret:
        headers["webhook-signature"] = Webhook(due.secret).sign(due.event_id, due.now, body)
    return body.encode(), headers


def status_error(status: int) -> str:
    """The message for the webhook's owner about a status that is not 2xx."""
    if 300 <= status < 400:
        return f"The receiver answered {status}: redirects are not followed, so give the final address."
    if status == deliveries.GONE:
        return f"The receiver answered {status}: nothing more is sent to it."
    return f"The receiver answered {status}."
