"""Looking at processes from outside, for the tests of `renalq up`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil


def eventually(happened: Callable[[], Any], seconds: float = 20.0, what: str = "") -> Any:
    """The first true value; fails the test when there is none in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := happened():
            return value
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds:.0f} s: {what or happened}")


def alive(pids: Iterable[int]) -> list[int]:
    """Those that run; a zombie that nobody has collected yet does not."""
    return [pid for pid in pids if psutil.pid_exists(pid) and _status(pid) != psutil.STATUS_ZOMBIE]


def _status(pid: int) -> str:
    try:
        return psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return psutil.STATUS_ZOMBIE


def family(pid: int) -> list[int]:
    """A process and everything below it."""
    process = psutil.Process(pid)
    return [pid, *(child.pid for child in process.children(recursive=True))]


def speaking_of(folder: Path) -> list[str]:
    """Command lines of living processes that carry this RENALQ_HOME in environment or arguments, or work in it."""
    found = []
    for process in psutil.process_iter():
        try:
            line = process.cmdline()
            home, place = process.environ().get("RENALQ_HOME", ""), process.cwd()
            mine = process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            continue
        if mine and (home == str(folder) or any(str(folder) in part for part in [place, *line])):
            found.append(" ".join(line)[:200])
    return found


def read_json(file: Path) -> Any:
    """None while the file is not there."""
    return json.loads(file.read_text()) if file.exists() else None
