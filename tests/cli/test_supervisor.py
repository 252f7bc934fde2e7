"""The supervisor over tiny real processes (`small_stack.py`): order, deaths, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
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
        eventually(lambda: (folder / "ready").exists(), what="the small stack runs")

    def pid(self, name: str) -> int:
        return int(read_json(self.folder / "pids")[name])

    def everyone(self) -> list[int]:
        """All its processes, its orphan reaper and its log writer too."""
        children = [child.pid for child in psutil.Process(self.process.pid).children()]
        return [self.process.pid, *children, self.grandchild()]

    def status(self, name: str) -> dict[str, Any]:
        return dict(read_json(self.folder / "statuses")[name])

    def kill(self, name: str) -> int:
        """kill -9 of a service; the id of the process that follows it."""
        killed = self.pid(name)
        os.kill(killed, signal.SIGKILL)
        return int(eventually(lambda: (pid := self.pid(name)) != killed and pid, what=f"another {name}"))

    def said(self) -> str:
        """All that it printed, once it has ended."""
        return self.process.communicate(timeout=20)[0]

    def grandchild(self) -> int:
        return int((self.folder / "grandchild").read_text())

    def ends(self) -> list[str]:
        return (self.folder / "ends").read_text().split()


@pytest.fixture
def small_stack(tmp_path: Path) -> Iterator[SmallStack]:
    stack = SmallStack(tmp_path)
    everyone = stack.everyone()
    yield stack
    stack.process.terminate()
    stack.process.wait(20)
    eventually(lambda: not alive(everyone), what="the orphan reaper is done")


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
    return [child.pid for child in psutil.Process(pid).children() if "cli.stack.orphan_reaper" in child.cmdline()]


@pytest.mark.parametrize("name", ["server", "worker", "monitor"])
def test_a_dead_service_is_started_again_while_the_others_go_on(small_stack: SmallStack, name: str) -> None:
    others = {other: small_stack.pid(other) for other in ("server", "worker", "monitor") if other != name}
    following = small_stack.kill(name)
    assert alive([following, *others.values()]) == [following, *others.values()]
    assert {other: small_stack.pid(other) for other in others} == others
    status = small_stack.status(name)
    assert (status["restarts"], status["last_death"]) == (1, "was killed by SIGKILL")
    small_stack.process.terminate()
    assert f"{name} was killed by SIGKILL (log: {small_stack.folder / 'logs' / name}.log" in small_stack.said()


def test_what_a_dead_service_leaves_is_gone_before_it_is_started_again(small_stack: SmallStack) -> None:
    left = small_stack.grandchild()
    small_stack.kill("worker")
    assert alive([left]) == []


def test_an_essential_service_that_dies_again_and_again_ends_the_stack(small_stack: SmallStack) -> None:
    everyone = small_stack.everyone()
    for _ in range(MAX_RESTARTS):
        small_stack.kill("server")
    os.kill(small_stack.pid("server"), signal.SIGKILL)
    assert small_stack.process.wait(20) == 1
    said, log = small_stack.said(), small_stack.folder / "logs" / "server.log"
    assert f"server was killed by SIGKILL (log: {log}, which ends: server is up, it is process" in said
    assert f"it died {MAX_RESTARTS + 1} times in succession" in said
    assert [f"again in {wait:g} s" in said for wait in (0.05, 0.1, 0.2, 0.4, 0.8)] == [True] * MAX_RESTARTS
    assert alive(everyone) == []


def test_one_that_is_not_essential_never_ends_the_stack(small_stack: SmallStack) -> None:
    others = small_stack.pid("server"), small_stack.pid("worker")
    for _ in range(MAX_RESTARTS + 1):
        small_stack.kill("monitor")
    assert (small_stack.pid("server"), small_stack.pid("worker")) == others


def test_a_service_is_starting_until_it_answers(small_stack: SmallStack) -> None:
    assert small_stack.status("monitor")["state"] == "starting"
    (small_stack.folder / "monitor-answers").touch()
    eventually(lambda: small_stack.status("monitor")["state"] == "running", what="the answer is seen")


def test_a_killed_log_writer_and_a_killed_orphan_reaper_are_replaced(small_stack: SmallStack) -> None:
    services = {small_stack.pid(name) for name in ("server", "worker", "monitor")}
    guards = {child.pid for child in psutil.Process(small_stack.process.pid).children()} - services
    assert len(guards) == 2
    for pid in guards:
        os.kill(pid, signal.SIGKILL)
    following = small_stack.kill("server")
    log = small_stack.folder / "logs" / "server.log"
    eventually(lambda: f"process {following}" in log.read_text(), what="it is written into the same file")
    everyone = small_stack.everyone()
    assert len(everyone) == 7
    small_stack.process.kill()
    eventually(lambda: not alive(everyone), 20, "all are gone")
