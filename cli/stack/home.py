"""RENALQ_HOME: where its parts lie, its lock, and files that only their owner may read."""

from __future__ import annotations

import fcntl
import os
import pwd
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console

from cli.stack.launch import CannotStartError
from jobs import stack_state

LOGIN_USER = "renalq"
"""The user of Flower and MLflow."""
HANDOVER_SECONDS = 25.0
"""How long a new stack waits for the orphan reaper of one that was killed."""


@dataclass(frozen=True)
class Home:
    """Where the parts of RENALQ_HOME lie."""

    path: Path

    @property
    def logs(self) -> Path:
        """One log file per process."""
        return self.path / "logs"

    @property
    def admin_key(self) -> Path:
        """The first key, mode 0600, written once."""
        return self.path / "admin.key"

    @property
    def flower(self) -> Path:
        """Flower's address, user and password, mode 0600."""
        return self.path / "flower.txt"

    @property
    def mlflow_login(self) -> Path:
        """MLflow's address, user and password, mode 0600."""
        return self.path / "mlflow.txt"

    @property
    def mlflow(self) -> Path:
        """All that MLflow keeps: it may enter no other part."""
        return self.path / "mlflow"

    @property
    def flower_history(self) -> Path:
        """What Flower has seen, for its next start: ids and states, no patient data."""
        return self.path / "flower.db"

    @property
    def state(self) -> Path:
        """Process ids, ports and addresses of the running stack, without passwords."""
        return self.path / stack_state.FILE

    @property
    def lock(self) -> Path:
        """Locked by the running stack."""
        return self.path / "stack.lock"

    def prepare(self) -> None:
        """Make the folder, for its owner alone, also where an older release or somebody else made it.

        Raises:
            CannotStartError: it is another user's, who could read and replace what RenalQ keeps there.
        """
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = self.path.stat().st_uid
        if owner != os.geteuid():
            raise CannotStartError(
                f"{self.path} belongs to {_user_name(owner)}, who could read and replace what RenalQ keeps there: "
                f"start RenalQ as that user, or chown -R {_user_name(os.geteuid())} it, or set RENALQ_HOME to another."
            )
        self.path.chmod(0o700)

    @property
    def ports(self) -> Path:
        """The ports that the last start chose."""
        return self.path / "ports.json"


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


@contextmanager
def locked(home: Home, console: Console) -> Iterator[int]:
    """Hold the home's lock, and yield its descriptor. The orphan reaper holds it too, until it has ended all processes.

    Raises:
        CannotStartError: another stack runs in this home.
    """
    with home.lock.open("a+") as stream:
        deadline = time.monotonic() + HANDOVER_SECONDS
        while not _try_lock(stream.fileno()):
            owner = _owner(home.lock)
            if owner is not None:
                raise CannotStartError(
                    f"Another `renalq up` (process {owner}) already uses {home.path}: "
                    "stop it (renalq down), or set RENALQ_HOME and RENALQ_PORT to others."
                )
            if time.monotonic() > deadline:
                raise CannotStartError(f"Processes of an earlier stack in {home.path} do not end.")
            console.print("An earlier stack was killed; waiting until its processes have ended …", highlight=False)
            time.sleep(1)
        stream.truncate(0)
        stream.write(f"{os.getpid()}\n")
        stream.flush()
        yield stream.fileno()


def running(home: Home) -> int | None:
    """Process id of the `renalq up` that uses this home; None without one."""
    return None if is_free(home) else _owner(home.lock)


def is_free(home: Home) -> bool:
    """Whether neither a stack nor what a killed one has left uses this home."""
    if not home.lock.exists():
        return True
    with home.lock.open() as stream:
        return _try_lock(stream.fileno())


def has_ended(home: Home, pid: int | None) -> bool:
    """Whether this `renalq up`, which gives the home free at its very end, and all its processes have ended."""
    return is_free(home) and (pid is None or _owner(home.lock) != pid)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _owner(lock: Path) -> int | None:
    """The living `renalq up` that wrote the lock; None if it is dead and only its orphan reaper holds the lock."""
    text = lock.read_text().strip()
    if not text.isdigit() or not psutil.pid_exists(int(text)):
        return None
    try:
        return int(text) if psutil.Process(int(text)).status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:  # it has just ended
        return None


def secret_file(path: Path, make: Callable[[], str] = lambda: secrets.token_urlsafe(24)) -> str:
    """The text of a file of mode 0600; if it does not exist, it is written with `make()` first."""
    with suppress(FileNotFoundError):
        return path.read_text().strip()
    text = make()
    write_secret(path, text + "\n")
    return text


def write_secret(path: Path, text: str) -> None:
    """Write a file of mode 0600, completely or not at all. Passwords and keys never appear on a command line."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.write(text)
    draft.replace(path)


def write_login(path: Path, address: str) -> str:
    """Write a service's address, user and password into a file of mode 0600. Returns the password, which stays the same
    from one start to the next: browsers keep it."""
    kept = dict(line.split(": ", 1) for line in path.read_text().splitlines()) if path.exists() else {}
    password = kept.get("password") or secrets.token_urlsafe(18)
    write_secret(path, f"address: {address}\nuser: {LOGIN_USER}\npassword: {password}\n")
    return password
