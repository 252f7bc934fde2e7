"""How child processes are started and ended, so that none outlives the command that started it.

Three fences, each for what the one before cannot do:

1. `stop` ends a child's whole process group when we end in good order.
2. `bound_to_us` asks the kernel (PR_SET_PDEATHSIG, through util-linux' setpriv) to signal the child when
   we are killed with -9. It fires when the starting THREAD ends: start children from the main thread only.
3. `cli.stack.orphan_reaper` sweeps up what is left, found by the mark in its environment (`STACK_MARK`).
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

STACK_MARK = "RENALQ_STACK_MARK"
"""Environment variable that every process of one stack carries, grandchildren included."""

_UNPRIVILEGED = "nobody"


class CannotStartError(Exception):
    """Something cannot be started here; the message says what, and what to do about it."""


@cache
def _setpriv() -> str | None:
    """The path of a setpriv that knows --pdeathsig (util-linux 2.33 or later, not busybox'), or None."""
    path = shutil.which("setpriv", path=os.environ.get("PATH", "") + ":/usr/bin:/bin")
    if path is None:
        return None
    listing = subprocess.run([path, "--help"], capture_output=True, text=True, check=False)
    return path if "--pdeathsig" in listing.stdout else None


def bound_to_us(command: list[str], on_death: signal.Signals = signal.SIGTERM) -> list[str]:
    """The command, to be sent `on_death` by the kernel when we die. Unchanged where setpriv is missing."""
    setpriv = _setpriv()
    if setpriv is None:
        return command
    return [setpriv, f"--pdeathsig={on_death.name.removeprefix('SIG')}", "--", *command]


def unprivileged_ids() -> tuple[int, int] | None:
    """User and group that a server which refuses root shall run as; None where we are not root."""
    if os.geteuid() != 0:
        return None
    try:
        entry = pwd.getpwnam(_UNPRIVILEGED)
    except KeyError as error:
        raise CannotStartError(
            f"There is no user '{_UNPRIVILEGED}' for Postgres, which refuses root. {_REMEDY}"
        ) from error
    return entry.pw_uid, entry.pw_gid


_REMEDY = "Run as an ordinary user, or set RENALQ_DATABASE_URL to a Postgres of your own."


def bound_and_unprivileged(command: list[str], on_death: signal.Signals) -> list[str]:
    """Like `bound_to_us`, and not as root.

    The one capability kept, CAP_DAC_OVERRIDE, lets the server reach its data folder below a 0700 folder of
    root's (such as `mktemp -d` makes) without our changing the mode of anybody's folders.
    """
    ids = unprivileged_ids()
    if ids is None:
        return bound_to_us(command, on_death)
    setpriv = _setpriv()
    if setpriv is None:
        raise CannotStartError(f"Postgres refuses to run as root, and util-linux' setpriv is missing. {_REMEDY}")
    return [
        setpriv,
        f"--reuid={ids[0]}",
        f"--regid={ids[1]}",
        "--clear-groups",
        "--inh-caps=+dac_override",
        "--ambient-caps=+dac_override",
        # Else access(2) leaves that capability out of account, and initdb finds no `postgres` beside itself when the
        # virtual environment, too, lies below such a folder.
        "--securebits=+no_setuid_fixup",
        f"--pdeathsig={on_death.name.removeprefix('SIG')}",
        "--",
        *command,
    ]


def start(
    command: list[str], log: Path, environ: Mapping[str, str], folder: Path | None = None
) -> subprocess.Popen[bytes]:
    """Start a command (see `bound_to_us`) in its own session, both its streams appended to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as stream:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            env=dict(environ),
            cwd=folder,
            # A session of its own: Ctrl-C in the terminal reaches us alone, and we end the others in order.
            start_new_session=True,
        )


def signal_group(pid: int, number: signal.Signals) -> None:
    """Send a signal to the process group that `start` made for this child. A group that is gone is fine."""
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):
        return  # macOS answers EPERM for a group of zombies


def stop(child: subprocess.Popen[bytes], ask: signal.Signals, grace_seconds: float) -> None:
    """Ask the child itself to end, wait, then kill what its process group still holds."""
    stop_all([(child, ask, grace_seconds)])


def stop_all(children: Iterable[tuple[subprocess.Popen[bytes], signal.Signals, float]]) -> None:
    """`stop` for several at once: all are asked first, and their grace times run side by side."""
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
