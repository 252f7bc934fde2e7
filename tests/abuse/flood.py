"""One key sends the worst bodies; how much memory does the API take, and how long do others wait for their polls?

`python -m tests.abuse.flood URL KEY OTHER_KEY PID [SECONDS] [CONNECTIONS]`: PID is that of the API's arbiter.
"""

from __future__ import annotations

import http.client
import itertools
import multiprocessing
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import psutil

from tests.abuse.bodies import MAKERS, Attack, attack

POLL_SECONDS = 0.05
PATIENCE_SECONDS = 130.0


@dataclass
class Measured:
    """What a flood did: answers by status, memory of the API (bytes), and the times of the polls (s)."""

    before: int
    peak: int = 0
    after: int = 0
    answers: dict[str, Counter[int]] = field(default_factory=dict)
    longest_answer: int = 0
    polls: list[float] = field(default_factory=list)
    failed_polls: int = 0

    @property
    def rise(self) -> float:
        """Of the memory, in MB."""
        return (self.peak - self.before) / 1e6

    def poll_ms(self, share: float) -> float:
        """The time within which this share of the polls was answered (ms)."""
        return statistics.quantiles(self.polls, n=1000)[round(share * 1000) - 1] * 1000

    def text(self) -> str:
        """For people."""
        lines = [f"{name:<40} {dict(found)}" for name, found in self.answers.items()]
        memory = " → ".join(f"{size / 1e6:.0f} MB" for size in (self.before, self.peak, self.after))
        polls = ", ".join(f"{name} {self.poll_ms(share):.0f} ms" for name, share in (("p50", 0.5), ("p95", 0.95)))
        lines += [f"API before → peak → after: {memory}; longest answer: {self.longest_answer} bytes"]
        return "\n".join([*lines, f"{len(self.polls)} polls: {polls}, max {max(self.polls) * 1000:.0f} ms; "
                                  f"{self.failed_polls} failed"])  # fmt: skip


def memory(pid: int) -> int:
    """Resident bytes of a process and its children."""
    process = psutil.Process(pid)
    return sum(one.memory_info().rss for one in [process, *process.children(recursive=True)])


def send(url: str, key: str, what: Attack) -> tuple[int, int]:
    """Status and size of the answer; (0, 0) if there was none."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=PATIENCE_SECONDS)
    try:
        connection.request("POST", what.path, what.body, {**what.headers, "Authorization": f"Bearer {key}"})
        answer = connection.getresponse()
        return answer.status, len(answer.read())
    except (OSError, http.client.HTTPException):
        return 0, 0
    finally:
        connection.close()


def poll(url: str, key: str, measured: Measured) -> None:
    """One poll of another client, on a connection of its own."""
    began = time.monotonic()
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    try:
        connection.request("GET", "/v1/jobs?limit=1", headers={"Authorization": f"Bearer {key}"})
        measured.failed_polls += connection.getresponse().status != 200
    except (OSError, http.client.HTTPException):
        measured.failed_polls += 1
    finally:
        connection.close()
        measured.polls.append(time.monotonic() - began)


def attack_all(url: str, key: str, seconds: float, connections: int, names: list[str], told: Any) -> None:
    """Send all bodies again and again, on so many connections at once. Each answer is put into the queue `told`."""
    bodies, end = {name: attack(name) for name in names}, time.monotonic() + seconds
    left, lock = itertools.cycle(names), threading.Lock()

    def attacking() -> None:
        while time.monotonic() < end:
            with lock:
                name = next(left)
            told.put((name, *send(url, key, bodies[name])))

    threads = [threading.Thread(target=attacking) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def flood(
    url: str, key: str, other: str, pid: int, seconds: float, connections: int, names: Iterable[str] = tuple(MAKERS)
) -> Measured:
    """Attack from another process, and measure from this one."""
    for _ in range(10):  # the first requests load what all of them need
        poll(url, other, Measured(0))
    measured, apart = Measured(memory(pid)), multiprocessing.get_context("spawn")
    told: Any = apart.Queue()
    attackers = apart.Process(target=attack_all, args=(url, key, seconds, connections, list(names), told), daemon=True)
    attackers.start()
    while attackers.is_alive() or not told.empty():
        measured.peak = max(measured.peak, memory(pid))
        poll(url, other, measured)
        time.sleep(POLL_SECONDS)
        while not told.empty():
            name, status, size = told.get()
            measured.answers.setdefault(name, Counter())[status] += 1
            measured.longest_answer = max(measured.longest_answer, size)
    time.sleep(1)
    measured.after = memory(pid)
    return measured


if __name__ == "__main__":
    where, mine, theirs, arbiter, *more = sys.argv[1:]
    print(flood(where, mine, theirs, int(arbiter), *map(float, more[:1] or [60]), *map(int, more[1:] or [8])).text())
