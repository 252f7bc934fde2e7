"""What a hundred waiting clients cost everybody else: `python -m bench.waiting`.

A real API (gunicorn, as `renalq up` starts it) on a real Postgres. 50 clients wait with `Prefer: wait=30`, 50 watch a
job's events, and one asks `GET /jobs/ID` 500 times. The peer: the same GETs, as many jobs in the queue, nobody waiting.
Both in turns, since a machine's speed drifts. Prints a table, writes bench/out/waiting.json.
"""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from bench.train import ROOT
from cli.stack import launch, services
from cli.stack.embedded import embedded_postgres
from cli.stack.server_plan import LOOPBACK, free_port
from jobs import keys
from jobs.db import session_factory

OUT = ROOT / "bench" / "out" / "waiting.json"
ROUNDS, GETS, CLIENTS, PAUSE_SECONDS, WAIT_SECONDS = 5, 100, 50, 0.01, 30
TRAIN = ("POST", "/jobs/train", {"source_url": "http://127.0.0.1/scans.zip"})  # no worker runs: nobody fetches it


@dataclass(frozen=True)
class Api:
    """A running API."""

    port: int
    headers: dict[str, str]
    process: psutil.Process
    ready_seconds: float

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """One request on a connection of its own, read to its end."""
        with closing(http.client.HTTPConnection(LOOPBACK, self.port, timeout=90)) as connection:
            connection.request(method, path, json.dumps(body) if body else None, {**self.headers, **headers})
            response = connection.getresponse()
            return response.status, dict(response.headers), response.read()

    def cancel_all(self) -> None:
        """Cancel every job in the queue."""
        while jobs := json.loads(self.ask("GET", "/jobs?state=queued&limit=100")[2])["data"]:
            for job in jobs:
                self.ask("POST", f"/jobs/{job['id']}/cancel")

    def rss_mb(self) -> float:
        """Resident memory of gunicorn's processes; pages that they share are counted in each."""
        return round(sum(each.memory_info().rss for each in [self.process, *self.process.children()]) / 1e6, 1)


def main() -> int:
    """Measure without and with those who wait, in turns, and report."""
    times: dict[str, list[float]] = {"alone": [], "waiting": []}
    with ExitStack() as everything:
        folder = Path(everything.enter_context(tempfile.TemporaryDirectory(prefix="renalq-bench-")))
        api = everything.enter_context(serving(folder, everything.enter_context(migrated_postgres(folder))))
        results: dict[str, Any] = {"ready_seconds": api.ready_seconds, "rss_mb_idle": api.rss_mb()}
        for _ in range(ROUNDS):
            times["alone"] += alone(api)
            found, results["rss_mb_waiting"] = waiting(api)
            times["waiting"] += found
    for side, each in times.items():
        results |= {f"get_ms_p{of}_{side}": round(quantiles(each, n=100)[of - 1], 2) for of in (50, 95, 99)}
    _report(results | {"ratio_p95": round(results["get_ms_p95_waiting"] / results["get_ms_p95_alone"], 2)})
    return 0


def alone(api: Api) -> list[float]:
    """The peer: as many jobs in the queue (each GET counts a place in it), and nobody waits."""
    jobs = [api.ask(*TRAIN)[1]["Location"] for _ in range(CLIENTS + 1)]
    times = gets(api, jobs[0])
    api.cancel_all()
    return times


def waiting(api: Api) -> tuple[list[float], float]:
    """The same while a hundred wait, and memory; then their jobs are cancelled, which must answer every one."""
    pool, prefer, job = ThreadPoolExecutor(2 * CLIENTS), f"wait={WAIT_SECONDS}", api.ask(*TRAIN)[1]["Location"]
    clients = [pool.submit(api.ask, "GET", f"{job}/events", Accept="text/event-stream") for _ in range(CLIENTS)]
    clients += [pool.submit(api.ask, *TRAIN, Prefer=prefer) for _ in range(CLIENTS)]
    time.sleep(3)
    times, memory = gets(api, job), api.rss_mb()
    assert not any(client.done() for client in clients), "somebody did not wait until the last GET"
    api.cancel_all()
    answers = [client.result(WAIT_SECONDS) for client in clients]
    assert all(status == 200 and b"cancelled" in text for status, _, text in answers), "somebody did not see the end"
    assert sum(headers.get("Preference-Applied") == prefer for _, headers, _ in answers) == CLIENTS
    return times, memory


def gets(api: Api, job: str) -> list[float]:
    """Milliseconds of GETs one after the other, on one connection."""
    times = []
    with closing(http.client.HTTPConnection(LOOPBACK, api.port, timeout=30)) as connection:
        for _ in range(GETS):
            started = time.perf_counter()
            connection.request("GET", job, headers=api.headers)
            assert b'"queued"' in connection.getresponse().read()
            times.append((time.perf_counter() - started) * 1000)
            time.sleep(PAUSE_SECONDS)
    return times


@contextmanager
def migrated_postgres(folder: Path) -> Iterator[str]:
    """The URL of a Postgres with our tables."""
    with embedded_postgres(folder) as url:
        environ = _environ(folder, url, free_port())
        subprocess.run(services.migration(environ, url).command, cwd=ROOT, env=environ, check=True)
        yield url


@contextmanager
def serving(folder: Path, url: str, *options: str) -> Iterator[Api]:
    """An API on this Postgres, as `renalq up` starts it but for these options of gunicorn."""
    port = free_port()
    with session_factory(url, pool_size=1).begin() as session:
        key = f"Bearer {keys.create(session, 'bench', [keys.Scope.ADMIN]).secret}"
    environ = _environ(folder, url, port)
    service, log, started = services.api(environ), folder / f"api-{port}.log", time.perf_counter()
    child = launch.start([*service.command, *options], log, {**environ, **service.environ}, ROOT)
    try:
        while services.http_status(LOOPBACK, port, "/health/live") != 200:
            assert child.poll() is None, f"the API ended: {launch.last_line(log)}"
            time.sleep(0.01)
        yield Api(port, {"Authorization": key}, psutil.Process(child.pid), round(time.perf_counter() - started, 2))
    finally:
        launch.stop(child, service.stop_signal, service.grace_seconds)


def _environ(folder: Path, url: str, port: int) -> dict[str, str]:
    ours = {"RENALQ_HOME": str(folder), "RENALQ_HOST": LOOPBACK, "RENALQ_DATABASE_URL": url, "RENALQ_PORT": str(port)}
    ours["RENALQ_FETCH_HOSTS"] = LOOPBACK
    return {name: value for name, value in os.environ.items() if not name.startswith("RENALQ_")} | ours


def _report(results: dict[str, Any]) -> None:
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps({"cores": os.cpu_count(), **results}, indent=1) + "\n", encoding="utf-8")
    table = Table("", "nobody waits", f"{2 * CLIENTS} wait", title=f"GET /jobs/ID, {ROUNDS * GETS} times")
    for name in ("get_ms_p50", "get_ms_p95", "get_ms_p99"):
        table.add_row(f"{name[-3:]}, ms", f"{results[f'{name}_alone']:.1f}", f"{results[f'{name}_waiting']:.1f}")
    table.add_row("[bold]p95, times as long", "", f"[bold]{results['ratio_p95']:.2f}")
    table.add_row("API, MB (idle at first)", f"{results['rss_mb_idle']:.0f}", f"{results['rss_mb_waiting']:.0f}")
    Console().print(table, f"ready after {results['ready_seconds']} s; written: {OUT.relative_to(ROOT)}")


if __name__ == "__main__":
    raise SystemExit(main())
