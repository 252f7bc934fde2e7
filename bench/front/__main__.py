"""What the API's own worker costs honest clients: `python -m bench.front`. The peer: gunicorn's gthread, in turns.

Both serve the same application on one Postgres. Eight clients ask as fast as they can: polls (`GET /jobs/ID`) on kept
connections and on new ones, `/health/live`, submissions (`POST /jobs/train`, which no worker takes). Prints requests
per second, writes bench/out/front.json; exit code 1 if one kind is more than a tenth slower.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from bench.train import ROOT
from bench.waiting import TRAIN, Api, migrated_postgres, serving
from cli.stack.server_plan import LOOPBACK

OUT = ROOT / "bench" / "out" / "front.json"
CLIENTS, BOUND = 8, 0.9
SIDES = {"ours": (), "gthread": ("--worker-class", "gthread", "--worker-connections", "1024")}
KINDS = ("polls", "polls, new connections", "live", "submits")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure both sides in turns, and report."""
    parser = argparse.ArgumentParser(prog="python -m bench.front")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each kind in a round")
    given = parser.parse_args(argv)
    found: dict[str, dict[str, list[float]]] = {side: {kind: [] for kind in KINDS} for side in SIDES}
    with ExitStack() as everything:
        folder = Path(everything.enter_context(tempfile.TemporaryDirectory(prefix="renalq-bench-")))
        url = everything.enter_context(migrated_postgres(folder))
        apis = {side: everything.enter_context(serving(folder, url, *options)) for side, options in SIDES.items()}
        for number in range(given.rounds):
            for side in sorted(SIDES, reverse=bool(number % 2)):
                for kind in KINDS:
                    found[side][kind].append(_per_second(apis[side], kind, given.seconds))
                apis[side].cancel_all()
    return _report(found)


def _per_second(api: Api, kind: str, seconds: float) -> float:
    job = api.ask(*TRAIN)[1]["Location"]
    with ThreadPoolExecutor(CLIENTS) as pool:
        until = time.monotonic() + seconds
        return sum(pool.map(lambda _: _requests(api, kind, job, until), range(CLIENTS))) / seconds


def _requests(api: Api, kind: str, job: str, until: float) -> int:
    """Requests of one client until then."""
    method, path, body = TRAIN if kind == "submits" else ("GET", "/health/live" if kind == "live" else job, None)
    connection, count = http.client.HTTPConnection(LOOPBACK, api.port, timeout=30), 0
    while time.monotonic() < until:
        connection.request(method, path, json.dumps(body) if body else None, api.headers)
        response = connection.getresponse()
        response.read()
        assert response.status in (200, 202), response.status
        count += 1
        if kind == "polls, new connections":
            connection.close()
    connection.close()
    return count


def _report(found: dict[str, dict[str, list[float]]]) -> int:
    rates = {side: {kind: round(median(times), 1) for kind, times in kinds.items()} for side, kinds in found.items()}
    ratios = {kind: round(rates["ours"][kind] / rates["gthread"][kind], 3) for kind in KINDS}
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps({"cores": os.cpu_count(), "rates": rates, "ratios": ratios, "all": found}, indent=1))
    table = Table("requests per second", *SIDES, "ratio", title=f"{CLIENTS} clients, median of the rounds")
    for kind in KINDS:
        table.add_row(kind, *(f"{rates[side][kind]:.0f}" for side in SIDES), f"{ratios[kind]:.2f}")
    Console().print(table)
    return 0 if min(ratios.values()) >= BOUND else 1


if __name__ == "__main__":
    raise SystemExit(main())
