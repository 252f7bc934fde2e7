"""A hundred workers and one, two and ten dispatchers: `python -m bench.dispatch [--before PATH]`.

Simulated workers (their work is sleep) claim and end units by the product's own functions; the dispatchers are real
processes. One batch of 250 units: until all workers work, and how many looks at the queue that took. Then 20 tenants,
whose units end all the time: units dispatched beyond the idle workers, looks a second. Then kill -9 of the dispatcher
that leads. At last an urgent scan behind a real worker that was killed in a chunk, with the default clocks: started
again under its old name, or only its pool's child killed. Prints a table, writes bench/out/dispatch.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from bench.queues.checkouts import ROOT, Figures, add_before, measured, show, write
from bench.train import machine

OUT = ROOT / "bench" / "out" / "dispatch.json"
MOST_LOOKS, MOST_WAIT_SECONDS = 2, 3.0
LABELS = {
    "beyond_idle_batch": "dispatched beyond idle, a batch",
    "beyond_idle_tenants": "dispatched beyond idle, many tenants",
    "samples_beyond_idle": "  share of the samples",
    "looks_until_all_dispatched": "looks until all have a unit",
    "seconds_until_all_work": "seconds until all work",
    "at_work_after_45_s": "  at work then, or after 45 s",
    "looks_per_second_idle": "looks a second, idle",
    "looks_per_second_load": "looks a second, many tenants",
    "share_of_workers_busy": "share of the workers busy, many tenants",
    "connections": "connections of the dispatchers",
    "seconds_until_claim_after_kill": "a leader killed: seconds until a new job is claimed",
}
WAITS = {
    "restarted_from_ready": "worker killed and started again: from ready",
    "child_from_kill": "its child killed in a chunk: from the kill",
    "idle_child_from_kill": "its child killed while idle: from the kill",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report."""
    parsed = _parser().parse_args(argv)
    numbers = list(map(str, parsed.dispatchers))
    load = ["--workers", parsed.workers, "--units", parsed.units, "--load", parsed.load, "--dispatchers", *numbers]
    dispatching = measured("bench.queues.dispatching", parsed.before, load)
    _show_dispatching(dispatching, numbers)
    waits = measured("bench.queues.lost_worker", parsed.before, ["--rounds", parsed.rounds])
    _show_waits(waits)
    write(OUT, {"machine": machine(), "arguments": load, "dispatching": dispatching, "urgent_waits": waits})
    return _judge(dispatching["now"], waits["now"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.dispatch")
    add_before(parser)
    parser.add_argument("--workers", type=int, default=100)
    parser.add_argument("--dispatchers", type=int, nargs="+", default=[1, 2, 10])
    parser.add_argument("--units", type=int, default=250, help="of the batch")
    parser.add_argument("--load", type=int, default=800, help="units of the many tenants")
    parser.add_argument("--rounds", type=int, default=3, help="workers killed, of each kind")
    return parser


def _judge(found: Figures, waits: Figures) -> int:
    """0 if all bounds hold."""
    said = []
    for number, side in found.items():
        if side["beyond_idle_batch"] or side["beyond_idle_tenants"]:
            said.append(f"{number} dispatchers dispatched more than the idle workers take")
        if (side["looks_until_all_dispatched"] or MOST_LOOKS + 1) > MOST_LOOKS:
            said.append(f"{number} dispatchers needed more than {MOST_LOOKS} looks")
    if waits["restarted_from_ready"] > MOST_WAIT_SECONDS:
        said.append("an urgent scan waited long for a worker that had been started again")
    if waits["child_from_kill"] - waits["idle_child_from_kill"] > MOST_WAIT_SECONDS:
        said.append("an urgent scan waited long for a worker whose child had been killed")
    show(*(f"NOT MET: {line}" for line in said))
    return 1 if said else 0


def _show_dispatching(dispatching: dict[str, Figures], numbers: Sequence[str]) -> None:
    heads = [f"{name}: {number}" for number in numbers for name in dispatching]
    table = Table("simulated workers; dispatchers:", *heads, title="Dispatching to a hundred workers")
    for key, label in LABELS.items():
        table.add_row(label, *(_cell(side[number].get(key)) for number in numbers for side in dispatching.values()))
    show(table)


def _show_waits(waits: dict[str, Figures]) -> None:
    table = Table("real worker, default clocks", *waits, title="Seconds that an urgent scan waited, medians")
    for key, label in WAITS.items():
        table.add_row(label, *(_cell(side[key]) for side in waits.values()))
    show(table)


def _cell(value: Any) -> str:
    return "–" if value is None else f"{value:g}"


if __name__ == "__main__":
    raise SystemExit(main())
