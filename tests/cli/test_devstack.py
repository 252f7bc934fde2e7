"""`renalq up` as a user runs it: real processes from start to end."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from cli.stack.server_plan import LOOPBACK, free_port
from tests.cli.processes import alive, eventually, family, read_json, speaking_of

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
READY_SECONDS = 90


class RunningStack:
    """One `renalq up` in a folder of its own."""

    def __init__(self, home: Path, *options: str, port: int | None = None) -> None:
        self.home, self.port = home, port or free_port()
        self.output = home.with_name(f"{home.name}.out")
        with self.output.open("ab") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cli", "up", *options],
                cwd=REPOSITORY,
                env=self.environ(),
                stdout=stream,
                stderr=stream,
            )

    def environ(self) -> dict[str, str]:
        ours = {"RENALQ_HOME": str(self.home), "RENALQ_PORT": str(self.port), "RENALQ_DEV_FSYNC": "off"}
        strange = ("RENALQ_DATABASE_URL", "RENALQ_REDIS_URL", "RENALQ_URL", "RENALQ_KEY", "RENALQ_MLFLOW_URL")
        return {name: value for name, value in os.environ.items() if name not in strange} | ours

    def ready(self) -> RunningStack:
        eventually(self._is_ready, READY_SECONDS, f"ready; it said: {self.said()}")
        return self

    def _is_ready(self) -> bool:
        assert self.process.poll() is None, self.said()
        state = self.state() or {}  # that of a killed stack may still lie there
        return bool(state.get("ready")) and state["pid"] == self.process.pid

    def state(self) -> Any:
        return read_json(self.home / "stack.json")

    def said(self) -> str:
        return self.output.read_text()

    def get(self, path: str, **headers: str) -> requests.Response:
        return requests.get(f"http://{LOOPBACK}:{self.port}{path}", headers=headers, timeout=10)

    def renalq(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "cli", *command],
            env=self.environ(),
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=False,
        )

    def everyone(self) -> list[int]:
        return family(self.process.pid)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    """Starts stacks, and ends those that the test leaves."""
    started: list[RunningStack] = []

    def begin(home: Path, *options: str, port: int | None = None) -> RunningStack:
        started.append(RunningStack(home, *options, port=port))
        return started[-1]

    yield begin
    for stack in started:
        if stack.process.poll() is None:
            stack.end()


@pytest.fixture(scope="module")
def whole_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    """A stack with all its parts that the reading tests share."""
    stack = RunningStack(tmp_path_factory.mktemp("whole") / "home").ready()
    yield stack
    stack.end()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_first_key_is_valid_and_only_its_owner_may_read_it(whole_stack: RunningStack) -> None:
    file = whole_stack.home / "admin.key"
    assert mode(file) == 0o600
    key = file.read_text().strip()
    assert whole_stack.get("/jobs", Authorization=f"Bearer {key}").status_code == 200
    assert whole_stack.get("/jobs").status_code == 401


def test_flower_is_behind_the_password_of_its_private_file(whole_stack: RunningStack) -> None:
    file = whole_stack.home / "flower.txt"
    assert mode(file) == 0o600
    told = dict(line.split(": ", 1) for line in file.read_text().splitlines())
    assert told["address"].startswith(f"http://{LOOPBACK}:")
    assert requests.get(told["address"], timeout=10).status_code == 401
    assert requests.get(told["address"], auth=(told["user"], told["password"]), timeout=10).status_code == 200


def test_mlflow_answers_where_the_state_says(whole_stack: RunningStack) -> None:
    address = whole_stack.state()["addresses"]["mlflow"]
    assert requests.get(f"{address}/health", timeout=10).status_code == 200


def test_the_state_names_all_processes_and_no_password(whole_stack: RunningStack) -> None:
    state = whole_stack.state()
    names = {"postgres", "redis", "mlflow", "api", "dispatcher", "worker-predict", "worker-train", "flower"}
    assert set(state["pids"]) == names
    assert alive(state["pids"].values()) == list(state["pids"].values())
    secrets = [(whole_stack.home / f"{name}.password").read_text().strip() for name in ("postgres", "redis")]
    assert not [secret for secret in secrets if secret in json.dumps(state)]


def test_no_password_or_key_stands_in_a_command_line(whole_stack: RunningStack) -> None:
    secrets = [(whole_stack.home / f"{name}.password").read_text().strip() for name in ("postgres", "redis")]
    secrets += [(whole_stack.home / "admin.key").read_text().strip()]
    secrets += [(whole_stack.home / "flower.txt").read_text().split()[-1]]
    lines = [" ".join(psutil.Process(pid).cmdline()) for pid in whole_stack.everyone()]
    assert len(lines) > 8
    assert not [line for line in lines for secret in secrets if secret in line]


def test_everything_listens_on_loopback_only(whole_stack: RunningStack) -> None:
    listening = [
        connection.laddr.ip
        for pid in whole_stack.everyone()
        for connection in psutil.Process(pid).net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert set(listening) == {LOOPBACK}


def test_a_second_up_in_the_same_home_says_so(whole_stack: RunningStack) -> None:
    second = whole_stack.renalq("up")
    assert second.returncode == 1
    assert f"Another `renalq up` (process {whole_stack.process.pid}) already uses" in second.stderr


def test_a_taken_port_is_a_clear_error(home: Path, start: Any) -> None:
    with closing(socket.create_server((LOOPBACK, 0))) as taken:
        stack = start(home, port=taken.getsockname()[1])
        assert stack.process.wait(20) == 1
    assert "set RENALQ_PORT to a free port" in stack.said()


def test_keys_are_made_listed_and_revoked_by_the_cli(whole_stack: RunningStack) -> None:
    made = json.loads(whole_stack.renalq("keys", "add", "reader", "--scope", "jobs:read", "--json").stdout)
    assert "reader" in whole_stack.renalq("keys", "list").stdout
    assert whole_stack.renalq("keys", "revoke", made["id"]).returncode == 0


def test_the_cli_lists_and_refuses_in_one_line(whole_stack: RunningStack) -> None:
    assert json.loads(whole_stack.renalq("jobs", "list", "--json").stdout)["data"] == []
    for nothing in (("models",), ("datasets", "list")):
        assert json.loads(whole_stack.renalq(*nothing, "--json").stdout) == []
    refused = whole_stack.renalq("jobs", "show", "01900000-0000-7000-8000-000000000000")
    assert refused.returncode == 1
    assert refused.stderr.startswith("Error: 404 ")
    assert len(refused.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_whole_stack_with_exit_0(home: Path, start: Any, number: signal.Signals) -> None:
    stack = start(home).ready()
    everyone = stack.everyone()
    assert len(everyone) > 9
    assert stack.end(number) == 0, stack.said()
    assert alive(everyone) == []
    assert speaking_of(home) == []
    assert "database system is shut down" in (home / "logs" / "postgres.log").read_text()
    assert not (home / "stack.json").exists()


def test_after_kill_9_nothing_is_left_and_the_next_up_starts_with_the_same_key(home: Path, start: Any) -> None:
    stack = start(home).ready()
    everyone, key = stack.everyone(), (home / "admin.key").read_text()
    stack.process.kill()
    stack.process.wait()
    again = start(home, "--no-flower", "--no-mlflow", port=stack.port)  # at once: it waits for the orphan reaper
    eventually(lambda: not alive(everyone), 20, "every process of the killed stack is gone")
    again.ready()
    assert (home / "admin.key").read_text() == key
    assert again.get("/jobs", Authorization=f"Bearer {key.strip()}").status_code == 200
    assert again.end() == 0
    assert speaking_of(home) == []


def test_a_killed_worker_comes_back_and_a_killed_redis_ends_the_stack(home: Path, start: Any) -> None:
    stack = start(home, "--no-flower", "--no-mlflow").ready()
    pids = stack.state()["pids"]
    os.kill(pids["worker-train"], signal.SIGKILL)
    eventually(lambda: "worker-train was killed by SIGKILL" in stack.said(), what="the death is told")
    eventually(lambda: stack.get("/health/ready").status_code == 200, what="ready again")
    everyone = stack.everyone()
    os.kill(pids["redis"], signal.SIGKILL)
    assert stack.process.wait(60) == 1
    assert f"redis was killed by SIGKILL (log: {home / 'logs' / 'redis.log'}" in stack.said()
    assert alive(everyone) == []


def test_two_stacks_run_side_by_side(tmp_path: Path, start: Any) -> None:
    stacks = [start(tmp_path / name, "--no-flower", "--no-mlflow") for name in ("one", "two")]
    keys = [(stack.ready().home / "admin.key").read_text().strip() for stack in stacks]
    answers = [stack.get("/jobs", Authorization=f"Bearer {key}") for stack in stacks for key in keys]
    assert [answer.status_code for answer in answers] == [200, 401, 401, 200]
    assert stacks[0].end() == 0
    assert stacks[1].get("/health/ready").status_code == 200
