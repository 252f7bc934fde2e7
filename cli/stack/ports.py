"""The ports of a stack beside the API's: the same at each start, others only where they are taken."""

from __future__ import annotations

import json
import socket
from collections.abc import Collection
from contextlib import closing
from pathlib import Path

from cli.stack.launch import CannotStartError
from cli.stack.server_plan import LOOPBACK, free_port
from jobs.settings import Settings

OFFSETS = {"flower": 100, "mlflow": 200, "postgres": 300, "redis": 400}
"""Default ports, counted from RENALQ_PORT: so far apart that stacks on neighbouring ports do not meet."""
LAST_PORT = 65_535


def choose_ports(settings: Settings, names: Collection[str], kept: Path) -> dict[str, int]:
    """A port on loopback for each name, of `OFFSETS`.

    A port that a setting gives is used as it is. Otherwise it is the first one that is free: that of the last start
    (kept in the file `kept`, as long as RENALQ_PORT stays the same), RENALQ_PORT plus the offset, or a random one.

    Raises:
        CannotStartError: a port that a setting gives is taken, or given twice.
    """
    before = _read(kept)
    if before.get("renalq") != settings.port:
        before = {}
    chosen = {"renalq": settings.port}
    given: dict[str, int | None] = {name: getattr(settings, f"{name}_port") for name in names}
    for name, port in sorted(given.items(), key=lambda item: item[1] is None):  # those that leave no choice first
        if port is not None:
            _require_unused(name, port, chosen)
        chosen[name] = port or _first_free([before.get(name, 0), settings.port + OFFSETS[name]], chosen.values())
    kept.write_text(json.dumps({**before, **chosen}, indent=2) + "\n")
    return {name: chosen[name] for name in names}


def require_free(host: str, port: int, setting: str) -> None:
    """Raises `CannotStartError`, which names the setting, unless this process can listen there."""
    with closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of the last start may linger
        try:
            probe.bind((host, port))
        except OSError as error:
            raise CannotStartError(
                f"Cannot listen on {host}:{port} ({error.strerror}): set {setting} to a free port."
            ) from error


def _require_unused(name: str, port: int, chosen: dict[str, int]) -> None:
    setting = f"RENALQ_{name.upper()}_PORT"
    others = [other for other, used in chosen.items() if used == port]
    if others:
        raise CannotStartError(f"{setting} and the port of {others[0]} are both {port}: set {setting} to another.")
    require_free(LOOPBACK, port, setting)


def _first_free(candidates: list[int], used: Collection[int]) -> int:
    for port in candidates:
        if 0 < port <= LAST_PORT and port not in used and _is_free(port):
            return port
    return free_port()


def _is_free(port: int) -> bool:
    try:
        require_free(LOOPBACK, port, "")
    except CannotStartError:
        return False
    return True


def _read(kept: Path) -> dict[str, int]:
    """What the last start wrote; empty if there was none, or if the file is damaged."""
    try:
        return {str(name): int(port) for name, port in json.loads(kept.read_text()).items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
