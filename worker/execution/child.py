"""A training's child process: start it, read its events, and make sure that it ends.

The memory of a training is freed with its process, and a hung device can be killed with it. The protocol is
`ml/runtime/events.py`: one JSON object per line.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import structlog

from ml.runtime import events
from worker.execution.signals import die_with_parent

log = structlog.get_logger()


class Child:
    """A running `python -m ml run FILE` in its own process group; the file holds an `ml.pipelines.TrainingJob`."""

    def __init__(self, job: Path, grace: float, log_file: Path) -> None:
        self._grace = grace
        self._stopping = threading.Lock()
        self._closed = False
        self._errors = log_file.open("wb")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ml", "run", str(job)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )

    def events(self) -> Iterator[events.Event]:
        """The child's events until it ends. A line that is not an event is skipped; only its length is logged."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                yield events.from_json(line.decode())
            except ValueError:
                log.warning("child_line_invalid", characters=len(line))

    @property
    def pid(self) -> int:
        """The id of the process and of its group."""
        return self._process.pid

    def exit_code(self) -> int:
        """Wait for the end. A negative code is the signal that ended it."""
        return self._process.wait()

    def stop(self) -> None:
        """End the whole process group: SIGTERM, then SIGKILL after the grace period. After `close()` this does nothing:
        the operating system may have given the group's id to another process."""
        with self._stopping:
            if self._closed:
                return
            self._signal(signal.SIGTERM)
            try:
                self._process.wait(self._grace)
            except subprocess.TimeoutExpired:
                log.warning("child_killed", grace=self._grace)
            self._signal(signal.SIGKILL)

    def close(self) -> None:
        """End the process group and release its pipes and log file."""
        self.stop()
        with self._stopping:
            self._closed = True
        self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()
        self._errors.close()

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):  # the whole group has ended
            os.killpg(self._process.pid, number)


@contextmanager
def child(job: Path, grace: float, log_file: Path) -> Iterator[Child]:
    """A child that does not outlive the block."""
    started = Child(job, grace, log_file)
    try:
        yield started
    finally:
        started.close()
