"""Run the simulation of every size, about a quarter of an hour.

make bench-coverage
python -m bench.coverage 200       fewer test sets a size
python -m bench.coverage 600 7     other networks and test sets: the seed
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from bench.coverage.simulation import LEAST, MOST, SIZES, Row, coverage

OUT = Path("bench/out/coverage.json")
TRIALS, SEED = 600, 0


def _lines(trials: int, seed: int) -> Iterator[dict[str, object]]:
    for size in SIZES:
        started = time.perf_counter()
        rows = coverage(size, trials, seed)
        cells = " ".join(f"{name} {_cell(row)}" for name, row in sorted(rows.items()))
        print(f"{size!s:32} {cells}  ({time.perf_counter() - started:.0f} s)", flush=True)
        told = {name: asdict(row) | {"coverage": row.coverage} for name, row in rows.items()}
        yield {"size": asdict(size), "seed": seed, **told}


def _cell(row: Row) -> str:
    if row.coverage is None:
        return "-"
    return f"{row.coverage:.1f}{'' if LEAST <= row.coverage <= MOST else '!'} ({row.width:.2f})"


if __name__ == "__main__":
    given = [int(number) for number in sys.argv[1:]]
    trials, seed = (*given, *(TRIALS, SEED)[len(given) :])
    lines = list(_lines(trials, seed))
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(lines, indent=1))
