"""The logging of a service inside a test, and everything as it was afterwards."""

import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from jobs import logs


@contextmanager
def service_logs(process: str = "api", level: str = "INFO") -> Iterator[None]:
    """Log as this process does."""
    root = logging.getLogger()
    before = root.handlers[:], root.level, logging.getLogRecordFactory(), logging.raiseExceptions
    hooks = sys.excepthook, threading.excepthook, sys.unraisablehook, warnings.showwarning
    logs.configure(process, level)
    try:
        yield
    finally:
        root.handlers[:], root.level, factory, logging.raiseExceptions = before
        logging.setLogRecordFactory(factory)
        sys.excepthook, threading.excepthook, sys.unraisablehook, warnings.showwarning = hooks
