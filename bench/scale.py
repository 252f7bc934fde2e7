"""What the queue's length costs: `python -m bench.scale [--before PATH]`. 1,000 to 100,000 units, in one run.

Databases with so many waiting units, of one tenant, of a hundred, and all due in an hour, asked in turn: what workers,
dispatcher, clients and webhook sender ask all the time. A question is flat if the processor time that it takes (client
and server, median) is at most 1.2 times that at 1,000; a plan may change in between. Then: which updates are HOT; ten
minutes of a hundred workers' load while somebody holds a snapshot open; cancels of batches of 1,000 and 100,000 scans.
No plan may scan a table. Prints tables, writes bench/out/scale.json with the plans.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from rich.table import Table

from bench.queues.checkouts import ROOT, Figures, add_before, measured, show, write
from bench.train import machine

OUT = ROOT / "bench" / "out" / "scale.json"
FLAT = 1.2
HOT_TITLE = "Updates by verb, units of one running batch"
CANCEL_MS = 100.0
"""A request to cancel may take so much of the processors."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report."""
    parsed = _parser().parse_args(argv)
    arguments = [word for name in ("rounds", "cancels", "minutes") for word in (f"--{name}", getattr(parsed, name))]
    sides = measured("bench.queues.scaling", parsed.before, [*arguments, "--sizes", *parsed.sizes])
    for variant in sides["now"]["variants"]:
        _show_questions(variant, sides, parsed.sizes)
    _show_hot(sides)
    _show_load(sides)
    _show_cancel(sides)
    said = list(_not_met(sides["now"]))
    show(*(f"NOT MET: {line}" for line in said))
    write(OUT, {"machine": machine(), "arguments": arguments, "not_met": said, "sides": sides})
    return 1 if said else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.scale")
    add_before(parser)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="units, two or more")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--cancels", type=int, default=2, help="batches cancelled, of each size")
    parser.add_argument("--minutes", type=float, default=10, help="of load, with a snapshot held open")
    return parser


def _not_met(side: Figures) -> Iterator[str]:
    for variant, found in side["variants"].items():
        for question, row in found["questions"].items():
            if row["ratio"] > FLAT:
                yield f"{variant}: {question} takes {row['ratio']} times as long in a longer queue"
        if found["table_scans"]:
            yield f"{variant}: {len(found['table_scans'])} plans scan a table"
    for question, ratio in side["load"]["last_to_first"].items():
        if ratio > FLAT:
            yield f"open snapshot: {question} takes {ratio} times as long after the load"
    for scans, taken in side["cancel"].items():
        if taken["request_cpu_ms"] > CANCEL_MS:
            yield f"a cancel of {scans} scans takes {taken['request_cpu_ms']} ms of the processors"


# --- for people ---


def _show_questions(variant: str, sides: dict[str, Figures], sizes: Sequence[int]) -> None:
    title = f"{variant}: medians at {' '.join(f'{size:,}' for size in sizes)} units"
    table = Table("question", *_heads(sides, ["ms", "p95", "CPU ms", "ratio", "pages"]), title=title)
    found = {name: side["variants"][variant]["questions"] for name, side in sides.items()}
    for question in found["now"]:
        table.add_row(question, *(cell for side in found.values() for cell in _cells(side[question])))
    show(table)


def _heads(sides: dict[str, Figures], whats: Sequence[str]) -> list[str]:
    return [f"{name}: {what}" for name in sides for what in whats]


def _cells(row: Figures) -> list[str]:
    times = [" ".join(f"{value:.1f}" for value in row[name]) for name in ("median_ms", "p95_ms", "cpu_ms")]
    ratio = f"{row['ratio']:.2f}" if row["ratio"] <= FLAT else f"[bold]{row['ratio']:.2f}"
    return [*times, ratio, " ".join(f"{count:.0f}" for count in row["pages"])]


def _show_hot(sides: dict[str, Figures]) -> None:
    table = Table("HOT updates of", *_heads(sides, ["units", "jobs", "revisions of the job"]), title=HOT_TITLE)
    for verb in sides["now"]["hot"]:
        table.add_row(verb, *(cell for side in sides.values() for cell in _hot_cells(side["hot"][verb])))
    show(table)


def _hot_cells(found: Figures) -> list[str]:
    tables = (found.get(name) for name in ("units", "jobs"))
    return [*(f"{t['hot']:.0%} of {t['updated']}" if t else "none" for t in tables), str(found["job_revisions"])]


def _show_load(sides: dict[str, Figures]) -> None:
    minutes = sides["now"]["load"]["simulated_minutes"]
    title = f"A snapshot held open for {minutes:g} minutes of load: CPU ms in its first and its last tenth, medians"
    table = Table("question", *_heads(sides, ["first", "last", "ratio", "vacuumed", "pages"]), title=title)
    for question in sides["now"]["load"]["last_to_first"]:
        table.add_row(question, *(cell for side in sides.values() for cell in _load_cells(side["load"], question)))
    for name in ("units", "jobs", "job_events"):
        sizes = (side["load"]["tables"][name] for side in sides.values())
        cells = ([f"{size['dead']:,} dead", f"{size['bytes'] / 2**20:.0f} MB", "", "", ""] for size in sizes)
        table.add_row(name, *(cell for each in cells for cell in each))
    show(table)


def _load_cells(found: Figures, question: str) -> list[str]:
    tenths, ratio = found["cpu_ms_by_tenth"][question], found["last_to_first"][question]
    pages = " ".join(f"{each[question]:.0f}" for each in found["pages"].values())
    return [f"{tenths[0]:.1f}", f"{tenths[-1]:.1f}", f"{ratio:.2f}", f"{found['vacuumed'][question]:.1f}", pages]


def _show_cancel(sides: dict[str, Figures]) -> None:
    heads = [f"{name}: {int(scans):,}" for name, side in sides.items() for scans in side["cancel"]]
    table = Table("cancel", *heads, title="Batches of so many scans")
    for key in ("request_ms", "request_cpu_ms", "until_ended_ms", "until_ended_cpu_ms"):
        table.add_row(
            key.replace("_", " "), *(f"{size[key]:.0f}" for side in sides.values() for size in side["cancel"].values())
        )
    show(table)


if __name__ == "__main__":
    raise SystemExit(main())
