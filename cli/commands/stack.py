"""`renalq status`, `logs` and `down`: look at the stack of this RENALQ_HOME, and stop it."""

from __future__ import annotations

import datetime as dt
import os
import signal
import sys
import time

import click

from cli.commands.jobs import as_json, print_json, print_table
from cli.stack.home import Home, has_ended, is_free, running
from jobs import stack_state
from jobs.settings import Settings
from jobs.stack_state import ServiceStatus, StackState

STOP_SECONDS = 60.0
"""How long a stack may take to stop; then it is killed, and its orphan reaper ends what is left."""
REAP_SECONDS = 30.0
POLL_SECONDS = 0.1


def _home() -> Home:
    home = Home(Settings().home.resolve())
    if home.path.exists() and not os.access(home.path, os.R_OK | os.X_OK):
        raise click.ClickException(f"{home.path} belongs to another user.")
    return home


@click.command()
@as_json
def status(as_json: bool) -> None:
    """Show what each process does. The exit code is 0 if jobs are being processed."""
    home = _home()
    state = stack_state.read(home.path)
    if state is None:
        raise click.ClickException(f"No stack runs in {home.path}: start it with renalq up.")
    reasons = _reasons(state)
    if as_json:
        print_json({**state.model_dump(mode="json"), "reasons": reasons})
    else:
        _show(state, reasons)
    sys.exit(1 if reasons else 0)


def _reasons(state: StackState) -> list[str]:
    """Why jobs are not processed, by the API; empty if they are."""
    import requests

    if not state.ready:
        return ["It is still starting."]
    try:
        answer = requests.get(f"{state.addresses['api']}/v1/health/ready", timeout=10)
        return [str(reason) for reason in answer.json()["reasons"]]
    except (requests.RequestException, ValueError, KeyError):
        return ["The API does not answer."]


def _show(state: StackState, reasons: list[str]) -> None:
    print_table(
        ("process", "state", "for", "restarts", "pid", "address"),
        [_row(service, state.addresses.get(service.name)) for service in state.services],
    )
    address = state.addresses.get("api", f"port {state.port}")
    lines = [f"renalq up (process {state.pid}) at {address}: {'not ready' if reasons else 'ready'}"]
    lines += [f"  {reason}" for reason in reasons]
    lines += [f"  last death: {each.name} {each.last_death}" for each in state.services if each.last_death]
    click.echo("\n".join([*lines, f"  logs: {state.logs}"]))


def _row(service: ServiceStatus, address: str | None) -> list[object]:
    seconds = int((dt.datetime.now(dt.UTC) - service.since).total_seconds())
    life = dt.timedelta(seconds=seconds), service.restarts, service.pid
    return [service.name, service.state, *life, address]


@click.command()
@click.option("-f", "--follow", is_flag=True, help="Show new lines as they come; Ctrl-C ends it.")
@click.option("-n", "--lines", default=100, show_default=True, help="How many of the last lines to begin with.")
@click.argument("names", metavar="[NAME]...", nargs=-1)
def logs(follow: bool, lines: int, names: tuple[str, ...]) -> None:
    """Show the logs of the stack, or of the processes NAME. They are in HOME/logs, also while it does not run."""
    folder = _home().logs
    known = sorted(path.stem for path in folder.glob("*.log"))
    if not known:
        raise click.ClickException(f"There are no logs in {folder}.")
    for name in names:
        if name not in known:
            raise click.ClickException(f"There is no log of {name}; there are logs of: {', '.join(known)}.")
    options = ["-n", str(lines), *(["-F"] if follow else [])]  # -F follows the name: it goes on after a rotation
    files = [str(folder / f"{name}.log") for name in names or known]
    os.execvp("tail", ["tail", *options, "--", *files])  # noqa: S606  (no shell is wanted)


@click.command()
def down() -> None:
    """Stop the stack of this RENALQ_HOME, and wait until its last process has ended."""
    home = _home()
    if is_free(home):
        click.echo(f"No stack runs in {home.path}.")
        return
    if not _stops(home, signal.SIGTERM, STOP_SECONDS) and not _stops(home, signal.SIGKILL, REAP_SECONDS):
        raise click.ClickException(f"Processes of the stack in {home.path} do not end; renalq status names them.")
    click.echo(f"The stack in {home.path} has stopped.")


def _stops(home: Home, number: signal.Signals, seconds: float) -> bool:
    """Signal the stack; whether all its processes have ended in time."""
    pid = running(home)
    try:
        if pid is not None:
            os.kill(pid, number)
    except PermissionError as error:
        raise click.ClickException(f"The stack (process {pid}) belongs to another user.") from error
    except ProcessLookupError:
        pass  # it has just ended
    deadline = time.monotonic() + seconds
    while not has_ended(home, pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True
