"""Logging: one JSON object per line on stderr. Log ids only: no patient data, file names or request bodies.

What may quote them (exceptions, warnings, libraries) is cut down by `ml.spec.private_logs`.
"""

import logging
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

from ml.spec.private_logs import hide_messages, places


def configure(process: str, level: str = "INFO") -> None:
    """Configure logging of this process, for structlog and for libraries that use `logging`."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _exception_as_places,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level)),
        logger_factory=structlog.stdlib.LoggerFactory(),
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in list(logging.root.manager.loggerDict):  # what libraries have set up for themselves
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True
    hide_messages()
    structlog.contextvars.bind_contextvars(process=process)


def _exception_as_places(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    given = event.pop("exc_info", None)
    error = given if isinstance(given, BaseException) else sys.exc_info()[1] if given else None
    return {**event, "exception": places(error)} if error is not None else event
