"""HOME/stack.json: what `renalq up` says of its processes, read by the API's `/health` and by `renalq status`."""

import datetime as dt
import os
from enum import StrEnum
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

FILE = "stack.json"


class ServiceState(StrEnum):
    """What a process of the stack does."""

    STARTING = "starting"
    """It lives, and does not answer yet."""
    RUNNING = "running"
    RESTARTING = "restarting"
    """It died, and is started again after a wait."""


class ServiceStatus(BaseModel):
    """One process of the stack."""

    model_config = ConfigDict(frozen=True)

    name: str
    state: ServiceState
    since: dt.datetime
    """When this state began."""
    essential: bool
    """Whether jobs need it."""
    pid: int
    restarts: int = 0
    last_death: str = ""
    """How it died last, such as `was killed by SIGKILL`; empty while it has not."""


class StackState(BaseModel):
    """A whole stack, without passwords."""

    model_config = ConfigDict(frozen=True)

    ready: bool
    """Whether it has been ready: everything that jobs need has answered once."""
    pid: int
    """Of `renalq up` itself."""
    port: int
    addresses: dict[str, str]
    pids: dict[str, int]
    logs: str
    services: list[ServiceStatus] = []


def read(home: Path) -> StackState | None:
    """The state of the stack that runs in `home`; None where none does (in containers, or after `renalq up` ended)."""
    try:
        state = StackState.model_validate_json((home / FILE).read_bytes())
    except (OSError, ValidationError):
        return None
    return state if _lives(state.pid) else None


def write(home: Path, state: StackState) -> None:
    """Write it completely or not at all: others read it at any time."""
    draft = home / f"{FILE}.new"
    draft.write_text(state.model_dump_json(indent=2) + "\n")
    draft.chmod(0o600)
    draft.replace(home / FILE)


def impairments(state: StackState) -> list[str]:
    """A sentence for each process that does not run as it should, once the stack has been ready."""
    services = state.services if state.ready else []
    return [_impairment(service) for service in services if service.state is not ServiceState.RUNNING]


def _impairment(service: ServiceStatus) -> str:
    why = f", since it {service.last_death}" if service.last_death else ""
    goes_on = "" if service.essential else " Jobs go on without it."
    return f"{service.name}: {service.state}{why}.{goes_on}"


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # another user's
    return True
