"""Start and end child processes so that none outlives the command that started it.

Three safeguards, each for what the one before cannot do:

1. `stop` ends a child's whole process group when this process ends normally.
2. `with_pdeathsig` asks the kernel (PR_SET_PDEATHSIG, through util-linux' setpriv) to signal the child when this
   process is killed. It fires when the starting THREAD ends: start children from the main thread only.
3. `cli.stack.orphan_reaper` ends what is left, which it finds by a mark in the environment (`STACK_MARK`).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

STACK_MARK = "RENALQ_STACK_MARK"
"""Environment variable of every process of one stack, grandchildren included."""


class CannotStartError(Exception):
    """Something cannot be started; the message says what, and what to do about it."""


@cache
def setpriv() -> str | None:
    """The path of a setpriv that has --pdeathsig (util-linux 2.33 or later, not busybox), or None."""
    path = shutil.which("setpriv", path=os.environ.get("PATH", "") + ":/usr/bin:/bin")
    if path is None:
        return None
    listing = subprocess.run([path, "--help"], capture_output=True, text=True, check=False)
    return path if "--pdeathsig" in listing.stdout else None


def with_pdeathsig(command: list[str], on_death: signal.Signals = signal.SIGTERM) -> list[str]:
    """The command, which the kernel signals with `on_death` when this process dies. Unchanged without setpriv."""
    program = setpriv()
    if program is None:
        return command
    return [program, f"--pdeathsig={on_death.name.removeprefix('SIG')}", "--", *command]


def start(
    command: list[str], log: Path, environ: Mapping[str, str], folder: Path | None = None
) -> subprocess.Popen[bytes]:
    """`spawn` a command whose stdout and stderr are appended to the file `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as stream:
        return spawn(command, stream.fileno(), environ, folder)


def spawn(
    command: list[str], output: int, environ: Mapping[str, str], folder: Path | None = None
) -> subprocess.Popen[bytes]:
    """Start a command (see `with_pdeathsig`) in its own session, with stdout and stderr to the descriptor `output`.

    What it writes is for its user alone: scans, keys and networks among it.
    """
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        env=dict(environ),
        cwd=folder,
        umask=0o077,
        # Its own session: Ctrl-C in the terminal reaches only this process, which ends the others in order.
        start_new_session=True,
    )


def signal_group(pid: int, number: signal.Signals) -> None:
    """Send a signal to the process group of a child of `start`. Nothing happens if the group has ended."""
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):
        return  # macOS answers EPERM for a group of zombies


def stop(child: subprocess.Popen[bytes], ask: signal.Signals, grace_seconds: float) -> None:
    """Ask the child to end, wait, then kill what is left of its process group."""
    stop_all([(child, ask, grace_seconds)])


def stop_all(children: Iterable[tuple[subprocess.Popen[bytes], signal.Signals, float]]) -> None:
    """`stop` for several at once: all are asked first, and their grace times run in parallel."""
    waiting, asked_at = list(children), time.monotonic()
    for child, ask, _ in waiting:
        if child.poll() is None:
            child.send_signal(ask)
    for child, _, grace_seconds in waiting:
        with suppress(subprocess.TimeoutExpired):
            child.wait(max(0.0, asked_at + grace_seconds - time.monotonic()))
        signal_group(child.pid, signal.SIGKILL)
        child.wait()


def last_line(log: Path) -> str:
    """The last non-empty line of a log file, for messages; empty if there is none."""
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1].strip() if lines else ""
