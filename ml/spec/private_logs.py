"""Logs without patient data: of exceptions, warnings and libraries' messages, types and places alone are written.

An OSError quotes a path, a UnicodeError a text, a DICOM library's warning a header's value: each may name a patient. So
one rule holds for all of a process, whoever logs: a logger of ours is believed, others only as far as `INFRASTRUCTURE`.
"""

from __future__ import annotations

import logging
import sys
import threading
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

OURS = "ml"
"""The logger of our own messages, beside structlog's events."""
INFRASTRUCTURE = ("alembic", "celery", "flower", "granian", "gunicorn", "hypercorn", "kombu", "mlflow", "uvicorn")
"""Libraries whose message is shown, with all but numbers and `KEPT` left out of it: they read no scans."""
KEPT = ("id", "name")
"""Of a message's named arguments: Celery's id and name of a task."""
HIDDEN = "…"
FRAMES = 12
"""Most places of one exception; the last ones."""

log = logging.getLogger(OURS)


def places(error: BaseException | None) -> list[str]:
    """Type and places (`file:line function`) of an exception, then those of the ones that it came from."""
    found: list[str] = []
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        found.append(type(error).__name__)
        frames = traceback.extract_tb(error.__traceback__)[-FRAMES:]
        found += [f"  {frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
        error = error.__cause__ or error.__context__
    return found


def hide_messages() -> None:
    """From now on no log record, uncaught exception or warning of this process tells more than type and place."""
    logging.setLogRecordFactory(_record)
    logging.raiseExceptions = False  # a handler that fails would print the record's arguments
    sys.excepthook = _uncaught
    threading.excepthook = _uncaught_in_thread
    sys.unraisablehook = _unraisable
    warnings.showwarning = _warned


def _record(*arguments: Any, **named: Any) -> logging.LogRecord:
    record = logging.LogRecord(*arguments, **named)
    if record.name is None:  # a copy of another record is being made (logging.makeLogRecord)
        return record
    is_ours = isinstance(record.msg, dict) or record.name.split(".")[0] == OURS  # a dict is an event of structlog
    if not is_ours:
        if record.name != logging.root.name:  # handlers of its own would write a second line
            logging.getLogger(record.name).handlers.clear()
        record.msg, record.args = f"{record.name}: {_shown(record)} ({_place(record.pathname, record.lineno)})", None
    error = record.exc_info[1] if record.exc_info else None
    if error is not None and not isinstance(record.msg, dict):
        record.msg, record.args = "\n".join([record.getMessage(), *places(error)]), None
    record.exc_info = record.exc_text = record.stack_info = None
    return record


def _shown(record: logging.LogRecord) -> str:
    """The message as it stands in the library's code."""
    if record.name.split(".")[0] not in INFRASTRUCTURE:
        return "its message may quote a scan"
    args: Any = record.args
    if isinstance(args, Mapping):
        args = {name: value if name in KEPT else _hidden(value) for name, value in args.items()}
    elif args:
        args = tuple(map(_hidden, args))
    try:
        return str(record.msg) % args if args else str(record.msg)
    except (TypeError, ValueError, KeyError):
        return str(record.msg)


def _hidden(value: Any) -> Any:
    return value if isinstance(value, int | float) else HIDDEN


def _place(path: str, line: int) -> str:
    return f"{'/'.join(Path(path).parts[-2:])}:{line}"


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    log.critical("An exception ended the process.", exc_info=(kind, error, trace))


def _uncaught_in_thread(found: threading.ExceptHookArgs) -> None:
    if found.exc_type is not SystemExit and found.exc_value is not None:
        log.error("An exception ended a thread.", exc_info=(found.exc_type, found.exc_value, found.exc_traceback))


def _unraisable(found: Any) -> None:
    if found.exc_value is not None:
        log.error("An exception was ignored.", exc_info=(found.exc_type, found.exc_value, found.exc_traceback))


def _warned(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    log.warning("A warning of Python: %s (%s).", category.__name__, _place(filename, lineno))
