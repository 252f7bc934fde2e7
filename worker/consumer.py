"""Celery's consumer, but for one thing: events for Flower wait a little, so that no task waits for them."""

from typing import Any

from celery.worker.consumer import Consumer

EVENTS_SECONDS = 0.1


class EventsLater(Consumer):
    """Sends what was buffered a tenth of a second later, all at once.

    Celery sends it before it hands the task to its process: a trip to Redis that every unit would wait for.
    """

    _events_wait = False

    def on_send_event_buffered(self) -> None:  # type: ignore[override]
        """Called for each event that goes into the buffer."""
        if not self._events_wait:
            self._events_wait = True
            self.timer.call_after(EVENTS_SECONDS, self._send_events)

    def _send_events(self, *_: Any) -> None:
        self._events_wait = False
        dispatcher: Any = getattr(self, "event_dispatcher", None)
        if dispatcher is not None:  # there is none while Redis is away
            dispatcher.flush()
