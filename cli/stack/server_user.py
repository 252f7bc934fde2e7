"""The user that Postgres and Redis run as where RenalQ is started as root: without capabilities, and not root.

Its data lies in RENALQ_HOME, which only root may enter. So a server is started in its data folder, and names it
`HERE`, a link that the kernel follows without asking for rights on the folders above (proc_pid_cwd(5)).
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import stat
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from cli.stack.launch import CannotStartError, setpriv, with_pdeathsig

HERE = "/proc/self/cwd"
"""A process' own working folder."""
CACHE = Path("/var/cache/renalq")
"""Copies of programs from a virtual environment that the servers' user may not enter."""
CANDIDATES = ("renalq", "daemon")
"""Users to take where RENALQ_RUN_AS names none. Not nobody: others' processes run as nobody, and would have the same
rights on the servers. The Linux Standard Base asks for `daemon` on every system."""
REMEDY = "Start RenalQ as an ordinary user, or set RENALQ_DATABASE_URL and RENALQ_REDIS_URL to servers of your own."


@dataclass(frozen=True)
class ServerUser:
    """A user and its group."""

    uid: int
    gid: int

    def command(self, command: list[str], folder: Path, on_death: signal.Signals) -> list[str]:
        """The command, run as this user in its `folder`, and signalled when this process dies.

        Raises:
            CannotStartError: util-linux' setpriv is missing.
        """
        program = setpriv()
        if program is None:
            raise CannotStartError(f"Servers do not run as root, and util-linux' setpriv is missing. {REMEDY}")
        identity = [f"--reuid={self.uid}", f"--regid={self.gid}", "--clear-groups", "--inh-caps=-all", "--no-new-privs"]
        death = (
            f"--pdeathsig={on_death.name.removeprefix('SIG')}"  # the kernel forgets it when a process changes its user
        )
        return ["env", f"--chdir={folder.resolve()}", program, *identity, death, "--", *command]

    def own(self, folder: Path) -> None:
        """Give it the folder, unless it has it: root made it, or a release that ran servers as another user."""
        for path in [*folder.rglob("*"), folder] if folder.stat().st_uid != self.uid else []:
            os.chown(path, self.uid, self.gid, follow_symlinks=False)

    def may_run(self, program: Path) -> bool:
        """Whether it may enter all folders above the program, and execute it."""
        return all(self._may_execute(path) for path in (program, *program.parents))

    def _may_execute(self, path: Path) -> bool:
        found = path.stat()
        if found.st_uid == self.uid:
            return bool(found.st_mode & stat.S_IXUSR)
        return bool(found.st_mode & (stat.S_IXGRP if found.st_gid == self.gid else stat.S_IXOTH))


def server_user(name: str = "") -> ServerUser | None:
    """The user of this name, else the first of `CANDIDATES`; None where this process is not root.

    Raises:
        CannotStartError: there is no such user, or it is root.
    """
    if os.geteuid() != 0:
        return None
    for candidate in (name,) if name else CANDIDATES:
        try:
            entry = pwd.getpwnam(candidate)
        except KeyError:
            continue
        if entry.pw_uid != 0:
            return ServerUser(entry.pw_uid, entry.pw_gid)
    wanted = name or " or ".join(CANDIDATES)
    raise CannotStartError(
        f"Servers do not run as root, and there is no other user {wanted} (RENALQ_RUN_AS): "
        f"useradd --system renalq makes one. {REMEDY}"
    )


def as_server(user: ServerUser | None, command: list[str], folder: Path, on_death: signal.Signals) -> list[str]:
    """The command of a server with its data in `folder`, as it is to be started."""
    return user.command(command, folder, on_death) if user else with_pdeathsig(command, on_death)


def runnable(user: ServerUser | None, program: Path, wheel: str, parts: tuple[str, ...]) -> Path:
    """The program from a wheel, or its copy in `CACHE` where the user may not run it in its place.

    Args:
        wheel: the distribution; its version is part of the copy's name.
        parts: what of site-packages the program needs; the first holds the program.
    """
    site = next((folder for folder in program.parents if (folder / parts[0]).is_dir()), None)
    if user is None or site is None or user.may_run(program):
        return program
    copy = CACHE / f"{wheel}-{version(wheel)}"
    if not copy.exists():
        _copy(site, parts, copy)
    return copy / program.relative_to(site)


def _copy(site: Path, parts: tuple[str, ...], copy: Path) -> None:
    """Copy the parts, readable by everyone, and rename: a killed copy leaves nothing that looks like a whole one."""
    draft = copy.with_name(f"{copy.name}.{os.getpid()}")
    try:
        for part in parts:
            shutil.copytree(site / part, draft / part, ignore=shutil.ignore_patterns("include", "*.a"))
        for path in [copy.parent, draft, *draft.rglob("*")]:
            path.chmod(0o755 if path.is_dir() or path.stat().st_mode & stat.S_IXUSR else 0o644)
        draft.rename(copy)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise CannotStartError(
            f"Servers do not run as root, and {copy} cannot be written ({error}). {REMEDY}"
        ) from error
