"""One measurement with the code of several checkouts, in one run: before a change and after it.

Each side is a process of its own. `bench` is this checkout's in all of them; `jobs`, `worker`, `api`, `tests` and the
migrations are those of the measured one, whose root is the process's working directory. So a side uses only what both
checkouts have.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent.parent
ENTER = """
import runpy, sys
root, module = sys.argv[1:3]
del sys.argv[1:3]
sys.path.insert(0, root)
import bench
del sys.path[0]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
FILE_WIDTH = 190
Figures = dict[str, Any]


def add_before(parser: argparse.ArgumentParser) -> None:
    """`--before PATH`: another checkout to measure first."""
    parser.add_argument("--before", type=Path, metavar="PATH", help="root of another checkout, measured first")


def measured(module: str, before: Path | None, arguments: Sequence[object]) -> dict[str, Figures]:
    """The figures of each side: of `before`, if it is given, and of this checkout (`now`)."""
    trees = {"before": before.resolve()} if before else {}
    found = {}
    for name, tree in {**trees, "now": ROOT}.items():
        Console(stderr=True).print(f"── {name}: {tree}")
        found[name] = _run(module, tree, arguments)
    return found


def _run(module: str, tree: Path, arguments: Sequence[object]) -> Figures:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("RENALQ_") and k != "PYTHONPATH"}
    command = [sys.executable, "-c", ENTER, str(ROOT), module, *map(str, arguments)]
    output = subprocess.run(command, cwd=tree, env=environ, stdout=subprocess.PIPE, text=True, check=True).stdout
    figures: Figures = json.loads(output.splitlines()[-1])
    return figures


def hand_in(figures: Figures) -> None:
    """A side's last line of output. Refuses where the code was not the working directory's."""
    import jobs

    assert Path(str(jobs.__file__)).is_relative_to(Path.cwd()), jobs.__file__
    print(json.dumps(figures))


def say(text: str) -> None:
    """Progress, for who waits."""
    Console(stderr=True).print(text)


def show(*what: object) -> None:
    """Print for people; wide tables keep their rows in a file too."""
    console = Console()
    (console if console.is_terminal else Console(width=FILE_WIDTH)).print(*what, sep="\n")


def write(out: Path, figures: Figures) -> None:
    """Write the figures of all sides to a file of bench/out."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    show(f"written: {out.relative_to(ROOT)}")
