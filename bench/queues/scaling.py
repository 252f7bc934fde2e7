"""A side of `bench.scale`: queues of several lengths, asked in turn; cancels; load with a snapshot held open."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from bench.queues.cancelling import cancel
from bench.queues.checkouts import Figures, hand_in, say
from bench.queues.filled import Costs, Queue, filled
from bench.queues.sustained import hot_shares, load
from cli.stack.embedded import embedded_postgres
from jobs import logs

VARIANTS: dict[str, dict[str, Any]] = {
    "one tenant": {"tenants": 1},
    "100 tenants": {"tenants": 100},
    "all due in an hour": {"tenants": 1, "ahead": 3600.0},
}
HELD = "one tenant"
"""The worst case: all that has ended was at the front of the same index range."""
WARM = 10
SCANNED = ("Seq Scan on units", "Seq Scan on jobs", "Seq Scan on deliveries")


def main() -> None:
    """Fill, ask in turn, hand in."""
    parsed = _parser().parse_args()
    with tempfile.TemporaryDirectory(prefix="renalq-bench-") as name, embedded_postgres(Path(name)) as server:
        os.environ["RENALQ_HOME"] = name
        logs.configure("bench", "WARNING")
        ends = parsed.sizes[0], parsed.sizes[-1]
        found: Figures = {"cancel": cancel(server, ends, parsed.cancels), "variants": {}}
        for number, (variant, how) in enumerate(VARIANTS.items()):
            say(f"{variant}: {parsed.sizes} units")
            queues = [filled(server, Path(name), f"queue_{number}_{n}", n, **how) for n in parsed.sizes]
            found["variants"][variant] = _asked(queues, parsed.rounds)
            if variant == HELD:
                found |= {"hot": hot_shares(queues[-1]), "load": load(queues[-1], parsed.minutes)}
            for queue in queues:
                queue.close()
    hand_in(found)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=int, nargs="+")
    for name in ("--rounds", "--cancels"):
        parser.add_argument(name, type=int)
    parser.add_argument("--minutes", type=float)
    return parser


def _asked(queues: list[Queue], rounds: int) -> Figures:
    for number in range(WARM + rounds):
        for queue in queues if number % 2 else reversed(queues):
            queue.ask(number)
    questions = {name: _compared([queue.costs[name] for queue in queues]) for name in queues[0].costs}
    for touched in [queue.pages_touched(lambda queue=queue: queue.ask(0), WARM) for queue in queues]:
        for name, count in touched.items():
            questions[name]["pages"].append(count)
    explained = [queue.explained() for queue in queues]
    plans = queues[-1].plans()
    scans = [line.strip() for line in plans if any(scan in line for scan in SCANNED)]
    return {"questions": questions, "explained": explained, "table_scans": scans, "plans": plans}


def _compared(costs: list[Costs]) -> Figures:
    """One question in queues of all lengths. `ratio`: the worst processor time (median) to that of the shortest."""
    cpu = [median(each.cpu_ms[WARM:]) for each in costs]
    return {
        "median_ms": [round(median(each.ms[WARM:]), 3) for each in costs],
        "p95_ms": [round(quantiles(each.ms[WARM:], n=20)[-1], 3) for each in costs],
        "cpu_ms": [round(each, 3) for each in cpu],
        "ratio": round(max(cpu[1:]) / cpu[0], 2),
        "pages": [],
    }


if __name__ == "__main__":
    main()
