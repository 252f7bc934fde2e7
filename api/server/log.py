"""gunicorn's own log, without anything that clients have sent: its messages hold addresses of requests."""

import sys
import traceback
from typing import Any

from gunicorn.glogging import Logger

FRAMES = 12
"""Of a traceback, the innermost."""


class Log(Logger):
    """What `logger_class` of gunicorn's configuration names."""

    def exception(self, msg: object, *args: Any, **kwargs: Any) -> None:
        """Log type and places of the current exception, but neither its text nor what gunicorn says of the request."""
        kind, _, trace = sys.exc_info()
        places = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(trace)[-FRAMES:]]
        self.error("A request ended with %s at %s", kind.__name__ if kind else "no exception", ", ".join(places))
