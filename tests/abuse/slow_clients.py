"""Clients that are slow on purpose, while honest ones go on: `python -m tests.abuse.slow_clients URL --key KEY`.

Prints, for each attack, how long an honest `GET /health/live` and a poll (`GET /jobs`) took meanwhile, each on a
connection of its own, how many of them failed, and the memory of the API. None but `slow bodies` sends a key.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import quantiles
from typing import Any
from urllib.parse import urlsplit

import psutil

from tests.abuse.flood import memory

PATIENCE_SECONDS = 10.0
"""How long an honest client waits for an answer."""
PAUSE_SECONDS = 0.2


@dataclass
class Target:
    """Where the attack goes."""

    host: str
    port: int
    key: str = ""

    def head(self, start: str, *headers: str, key: bool = False) -> bytes:
        """The beginning of a request."""
        own = [f"Authorization: Bearer {self.key}"] if key else []
        return "\r\n".join([f"{start} HTTP/1.1", "Host: x", *own, *headers, ""]).encode()


@dataclass
class Client:
    """One slow client."""

    target: Target
    number: int
    small_buffer: bool = False
    stays: bool = False
    reader: asyncio.StreamReader = field(init=False)
    writer: asyncio.StreamWriter = field(init=False)

    async def open(self) -> None:
        """Connect; with a small buffer the system reads nothing ahead."""
        sock = socket.socket()
        sock.setblocking(False)
        if self.small_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        await asyncio.get_running_loop().sock_connect(sock, (self.target.host, self.target.port))
        self.reader, self.writer = await asyncio.open_connection(sock=sock, limit=2048)

    async def send(self, data: bytes) -> None:
        """Send."""
        self.writer.write(data)
        await self.writer.drain()

    async def trickle(self, data: bytes, seconds: float) -> None:
        """Send this again and again, each time after so many seconds."""
        while True:
            await asyncio.sleep(seconds)
            await self.send(data)


Attack = Callable[[Client], Awaitable[None]]


async def half_heads(client: Client) -> None:
    """Half a head, then one byte each 3 s."""
    await client.open()
    await client.send(client.target.head("GET /health/live") + b"X-Long: ")
    await client.trickle(b"a", 3)


async def silent(client: Client) -> None:
    """Nothing at all."""
    await client.open()
    await asyncio.sleep(3600)


async def slow_bodies(client: Client) -> None:
    """A body with a key, at 1 kB/s."""
    await client.open()
    lines = ["Content-Type: application/json", "Content-Length: 1000000"]
    await client.send(client.target.head("POST /scans/known", *lines, "", key=True))
    await client.trickle(b" " * 250, 0.25)


async def byte_bodies(client: Client) -> None:
    """A body with a key, one byte each 3 s."""
    await client.open()
    lines = ["Content-Type: application/json", "Content-Length: 1000000"]
    await client.send(client.target.head("POST /scans/known", *lines, "", key=True))
    await client.trickle(b" ", 3)


async def keyless_bodies(client: Client) -> None:
    """A body without a key, one byte each 3 s."""
    await client.open()
    await client.send(client.target.head("POST /scans", "Content-Type: text/csv", "Content-Length: 1000000", ""))
    await client.trickle(b" ", 3)


async def deaf_readers(client: Client) -> None:
    """A request for 1.7 MB that anybody may read, of which nothing is taken."""
    client.small_buffer = client.stays = True
    await client.open()
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    await client.send(client.target.head("GET /docs/swagger-ui-bundle.js", ""))
    await asyncio.sleep(3600)


async def never_closing(client: Client) -> None:
    """Whole requests that ask for the connection to be closed, and then keep it open."""
    client.stays = True
    await client.open()
    await client.send(client.target.head("GET /health/live", "Connection: close", ""))
    await asyncio.sleep(3600)


ATTACKS: dict[str, tuple[Attack, int]] = {
    "half heads": (half_heads, 300),
    "half heads 1000": (half_heads, 1000),
    "silent": (silent, 1100),
    "slow bodies": (slow_bodies, 50),
    "byte bodies": (byte_bodies, 300),
    "keyless bodies": (keyless_bodies, 300),
    "deaf readers": (deaf_readers, 300),
    "never closing": (never_closing, 300),
}


@dataclass
class Honest:
    """What honest clients saw."""

    live: list[float] = field(default_factory=list)
    polls: list[float] = field(default_factory=list)
    failed: int = 0

    async def go_on(self, target: Target) -> None:
        """Ask again and again, each time on a connection of its own."""
        while True:
            for times, path in ((self.live, "/health/live"), (self.polls, "/jobs?limit=1")):
                began = time.monotonic()
                try:
                    async with asyncio.timeout(PATIENCE_SECONDS):
                        status = await _asked(target, path)
                except (OSError, TimeoutError):
                    status = 0
                times.append(time.monotonic() - began)
                self.failed += status != 200
            await asyncio.sleep(PAUSE_SECONDS)


async def _asked(target: Target, path: str) -> int:
    reader, writer = await asyncio.open_connection(target.host, target.port)
    try:
        writer.write(target.head(f"GET {path}", "Connection: close", "", key=True))
        answer = await reader.read()
        return int(answer.split(b" ", 2)[1]) if answer else 0
    finally:
        writer.close()


async def attack(target: Target, name: str, seconds: float, pid: int | None = None) -> dict[str, Any]:
    """Attack for so long, and what came of it; times in seconds.

    Args:
        pid: a process of the API, whose memory is measured with its children's.
    """
    how, count = ATTACKS[name]
    before = _memory_mb(pid)
    clients = [asyncio.create_task(_slow(how, Client(target, number))) for number in range(count)]
    await asyncio.sleep(2)
    honest, peak = Honest(), before
    asking = asyncio.create_task(honest.go_on(target))
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        await asyncio.sleep(0.5)
        peak = max(peak, _memory_mb(pid))
    alive = sum(not client.done() for client in clients)
    for task in (asking, *clients):
        task.cancel()
    await asyncio.gather(asking, *clients, return_exceptions=True)
    return {
        "attack": name,
        "clients": count,
        "asked": len(honest.live) + len(honest.polls),
        "failed": honest.failed,
        "live_p95": _p95(honest.live),
        "live_max": round(max(honest.live, default=PATIENCE_SECONDS), 3),
        "poll_p95": _p95(honest.polls),
        "poll_max": round(max(honest.polls, default=PATIENCE_SECONDS), 3),
        "not_cut_off": alive,
        "memory_mb": before,
        "memory_peak_mb": peak,
    }


async def _slow(how: Attack, client: Client) -> None:
    with suppress(OSError):
        cut = asyncio.create_task(_until_cut_off(client))
        doing = asyncio.create_task(how(client))  # type: ignore[arg-type]
        try:
            await asyncio.wait((cut, doing), return_when=asyncio.FIRST_COMPLETED)
        finally:
            cut.cancel()
            doing.cancel()
            if hasattr(client, "writer"):
                client.writer.transport.abort()  # type: ignore[attr-defined]


async def _until_cut_off(client: Client) -> None:
    """Returns when the server has closed the connection, for those that mind."""
    while not hasattr(client, "writer"):
        await asyncio.sleep(0.1)
    if client.stays:
        await asyncio.sleep(3600)
    with suppress(OSError):
        while await client.reader.read(2048):
            pass


def _p95(times: list[float]) -> float:
    return round(quantiles(times, n=20)[-1], 3) if len(times) > 1 else PATIENCE_SECONDS


def _memory_mb(pid: int | None) -> float:
    if pid is None:
        return 0.0
    with suppress(psutil.NoSuchProcess):
        return round(memory(pid) / 1e6, 1)
    return 0.0


def raise_descriptors() -> None:
    """A client needs a descriptor for each connection too."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main() -> None:
    """Attack one way after the other, and print a line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("url")
    parser.add_argument("--key", default="")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--attack", choices=ATTACKS, action="append")
    parser.add_argument("--pid", type=int, help="of the API, to measure its memory")
    given = parser.parse_args()
    parts = urlsplit(given.url)
    target = Target(parts.hostname or "127.0.0.1", parts.port or 80, given.key)
    raise_descriptors()
    for name in given.attack or ATTACKS:
        print(json.dumps(asyncio.run(attack(target, name, given.seconds, given.pid))), flush=True)


if __name__ == "__main__":
    main()
