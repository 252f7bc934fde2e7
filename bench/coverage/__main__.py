"""Run the simulation of every size, about a quarter of an hour.

make bench-coverage
python -m bench.coverage 200     fewer test sets a size
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from bench.coverage.simulation import LEAST, MOST, SIZES, Row, coverage

OUT = Path("bench/out/coverage.json")
TRIALS = 600


def _lines(trials: int) -> Iterator[dict[str, object]]:
    for size in SIZES:
        started = time.perf_counter()
        rows = coverage(size, trials)
        cells = " ".join(f"{name} {_cell(row)}" for name, row in sorted(rows.items()))
        print(f"{size!s:32} {cells}  ({time.perf_counter() - started:.0f} s)", flush=True)
        yield {"size": asdict(size), **{name: asdict(row) | {"coverage": row.coverage} for name, row in rows.items()}}


def _cell(row: Row) -> str:
    if row.coverage is None:
        return "-"
    return f"{row.coverage:.1f}{'' if LEAST <= row.coverage <= MOST else '!'} ({row.width:.2f})"


if __name__ == "__main__":
    lines = list(_lines(int(sys.argv[1]) if sys.argv[1:] else TRIALS))
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(lines, indent=1))
