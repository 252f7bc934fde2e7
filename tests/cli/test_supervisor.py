"""The supervisor over tiny real processes (`small_stack.py`): order, deaths, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.stack.supervisor import MAX_RESTARTS
from tests.process_tree import alive, eventually, read_json

REPOSITORY = Path(__file__).parents[2]


class SmallStack:
    """A running `small_stack.py`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        command = [sys.executable, "-m", "tests.cli.small_stack", str(folder)]
        self.process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        eventually(lambda: (folder / "pids").exists(), what="the small stack runs")

    def pid(self, name: str) -> int:
        return int(read_json(self.folder / "pids")[name])

    def everyone(self) -> list[int]:
        return [self.process.pid, self.pid("server"), self.pid("worker"), self.grandchild()]

    def grandchild(self) -> int:
        return int((self.folder / "grandchild").read_text())

    def ends(self) -> list[str]:
        return (self.folder / "ends").read_text().split()


@pytest.fixture
def small_stack(tmp_path: Path) -> Iterator[SmallStack]:
    stack = SmallStack(tmp_path)
    yield stack
    stack.process.kill()
    stack.process.wait()
    eventually(lambda: not alive(stack.everyone()), what="the orphan reaper is done")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_workers_before_servers_and_leaves_nothing(
    small_stack: SmallStack, number: signal.Signals
) -> None:
    everyone = small_stack.everyone()
    small_stack.process.send_signal(number)
    assert small_stack.process.wait(20) == 0
    assert small_stack.ends() == ["worker", "server"]
    assert alive(everyone) == []


def test_a_kill_of_the_supervisor_leaves_nothing(small_stack: SmallStack) -> None:
    everyone = small_stack.everyone()
    small_stack.process.kill()
    eventually(lambda: not alive(everyone), 20, "all are gone, the stubborn grandchild included")


def test_a_kill_of_supervisor_and_reaper_together_still_ends_the_children(small_stack: SmallStack) -> None:
    children = [small_stack.pid("server"), small_stack.pid("worker")]
    grandchild = small_stack.grandchild()
    try:
        small_stack.process.send_signal(signal.SIGSTOP)
        for pid in _reapers_of(small_stack.process.pid):
            os.kill(pid, signal.SIGKILL)
        small_stack.process.kill()
        eventually(lambda: not alive(children), 10, "the kernel has told the children")
    finally:
        os.kill(grandchild, signal.SIGKILL)  # the work of the reaper that was killed


def _reapers_of(pid: int) -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process(pid).children() if "cli.stack.orphan_reaper" in child.cmdline()]


def test_a_dead_worker_is_started_again(small_stack: SmallStack) -> None:
    first = small_stack.pid("worker")
    os.kill(first, signal.SIGKILL)
    second = eventually(lambda: (pid := small_stack.pid("worker")) != first and pid, what="another worker")
    assert alive([second, small_stack.pid("server")]) == [second, small_stack.pid("server")]


def test_a_worker_that_dies_again_and_again_stops_the_stack(small_stack: SmallStack) -> None:
    killed = set()
    for _ in range(MAX_RESTARTS + 1):
        pid = eventually(lambda: (pid := small_stack.pid("worker")) not in killed and pid, what="a worker")
        os.kill(pid, signal.SIGKILL)
        killed.add(pid)
    assert small_stack.process.wait(20) == 1
    said = small_stack.process.communicate()[0]
    assert f"it did so {MAX_RESTARTS + 1} times within a minute" in said


def test_the_death_of_another_service_stops_the_stack_and_names_it_and_its_log(small_stack: SmallStack) -> None:
    everyone = small_stack.everyone()
    os.kill(small_stack.pid("server"), signal.SIGKILL)
    assert small_stack.process.wait(20) == 1
    said = small_stack.process.communicate()[0]
    assert f"server was killed by SIGKILL (log: {small_stack.folder / 'logs' / 'server.log'}" in said
    assert alive(everyone) == []
