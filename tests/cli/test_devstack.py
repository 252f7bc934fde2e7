"""`renalq up` as a user runs it: real processes from start to end."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import stat
import zipfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from cli.stack.server_plan import LOOPBACK
from tests.process_tree import alive, eventually, speaking_of
from tests.whole_stack import RunningStack

pytestmark = pytest.mark.slow

SMALL = ("--no-flower", "--no-mlflow")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    """Starts stacks, and ends those that the test leaves."""
    started: list[RunningStack] = []

    def begin(home: Path, *options: str, port: int | None = None, **settings: str) -> RunningStack:
        started.append(RunningStack(home, *options, port=port, **settings))
        return started[-1]

    yield begin
    for stack in started:
        if stack.process.poll() is None:
            stack.end()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_first_key_is_valid_and_only_its_owner_may_read_it(whole_stack: RunningStack) -> None:
    file = whole_stack.home / "admin.key"
    assert mode(file) == 0o600
    assert whole_stack.get("/jobs", Authorization=f"Bearer {whole_stack.key()}").status_code == 200
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


def test_status_and_logs_show_the_stack(whole_stack: RunningStack) -> None:
    state, shown = whole_stack.state(), json.loads(whole_stack.renalq("status", "--json").stdout)
    assert (shown["pids"], shown["reasons"]) == (state["pids"], [])
    assert {service["state"] for service in shown["services"]} == {"running"}
    assert "database system is ready to accept connections" in whole_stack.renalq("logs", "postgres").stdout
    assert all(f"/{name}.log <==" in whole_stack.renalq("logs", "-n", "1").stdout for name in state["pids"])
    refused = whole_stack.renalq("logs", "postgre")
    assert (refused.returncode, "there are logs of: api, dispatcher, flower" in refused.stderr) == (1, True)


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
    secrets += [(whole_stack.home / name).read_text().split()[-1] for name in ("flower.txt", "mlflow.txt")]
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
    key = {"Authorization": f"Bearer {whole_stack.key()}"}
    jobs = json.loads(whole_stack.renalq("jobs", "list", "--json").stdout)["data"]
    assert [job["id"] for job in jobs] == [job["id"] for job in whole_stack.get("/jobs?limit=20", **key).json()["data"]]
    for command, path in ((("models",), "/models"), (("datasets", "list"), "/datasets")):
        listed = json.loads(whole_stack.renalq(*command, "--json").stdout)
        assert listed == whole_stack.get(f"/v1{path}", **key).json()["data"]
    refused = whole_stack.renalq("jobs", "show", "01900000-0000-7000-8000-000000000000")
    assert refused.returncode == 1
    assert refused.stderr.startswith("Error: 404 ")
    assert len(refused.stderr.strip().splitlines()) == 1


def test_two_stacks_run_side_by_side_end_apart_and_come_back(tmp_path: Path, start: Any) -> None:
    one, other = (start(tmp_path / name, *SMALL) for name in ("one", "two"))
    keys = [stack.ready().key() for stack in (one, other)]
    answers = [stack.get("/jobs", Authorization=f"Bearer {key}") for stack in (one, other) for key in keys]
    assert [answer.status_code for answer in answers] == [200, 401, 401, 200]

    assert len(one.everyone()) > 7
    one.ends_without_a_trace(signal.SIGINT)
    assert other.get("/health/ready").status_code == 200
    _after_kill_9_the_next_up_starts_with_the_same_key_and_addresses(other, start)


def _after_kill_9_the_next_up_starts_with_the_same_key_and_addresses(stack: RunningStack, start: Any) -> None:
    everyone, key, addresses = stack.everyone(), stack.key(), stack.state()["addresses"]
    assert set(addresses) == {"api", "postgres", "redis"}
    stack.process.kill()
    stack.process.wait()
    again: RunningStack = start(stack.home, *SMALL, port=stack.port)  # at once: it waits for the orphan reaper
    eventually(lambda: not alive(everyone), 20, "every process of the killed stack is gone")
    again.ready()
    assert again.key() == key
    assert again.get("/jobs", Authorization=f"Bearer {key}").status_code == 200
    assert again.state()["addresses"] == addresses


KILLED = ("mlflow", "flower", "api", "redis", "dispatcher", "postgres", "worker-predict", "worker-train")


@pytest.mark.full
@pytest.mark.timeout(600)
def test_jobs_go_on_while_one_process_after_another_is_killed(home: Path, start: Any) -> None:
    stack = start(home, RENALQ_DEV_FSYNC="on").ready()  # without, a killed Postgres loses its last commits
    assert set(KILLED) == set(stack.state()["pids"])
    jobs = [_upload(stack)]
    for name in KILLED:
        os.kill(stack.state()["pids"][name], signal.SIGKILL)
        if name in ("mlflow", "flower"):
            eventually(lambda at=name: _is_told(stack, at), what=f"/health tells that {name} is missing")  # type: ignore[misc]
        jobs.append(_accepted(stack))
        eventually(lambda at=name: _runs_again(stack, at), 90, f"{name} runs again")  # type: ignore[misc]
        jobs.append(_accepted(stack))
    eventually(lambda: all(_has_ended(stack, job) for job in jobs), 90, "all jobs have ended")
    assert stack.process.poll() is None
    shown = stack.renalq("status")
    assert shown.returncode == 0, shown.stdout
    assert all(re.search(rf"^{name} +running .* 1 ", shown.stdout, re.MULTILINE) for name in KILLED), shown.stdout
    assert all(f"last death: {name} was killed by SIGKILL" in shown.stdout for name in KILLED)
    _down_leaves_nothing(stack)


def _accepted(stack: RunningStack) -> str:
    return str(eventually(lambda: _upload(stack), 60, "a job is accepted"))


def _upload(stack: RunningStack) -> str:
    """The id of a job that checks a dataset; empty if the stack does not accept it now."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("Normal/one.png", b"no image")
    try:
        files, key = {"file": ("scans.zip", packed.getvalue())}, {"Authorization": f"Bearer {stack.key()}"}
        answer = requests.post(f"{stack.url}/v1/datasets", files=files, headers=key, timeout=10)
    except requests.RequestException:
        return ""
    return str(answer.json()["job_id"]) if answer.status_code == 202 else ""


def _is_told(stack: RunningStack, name: str) -> bool:
    """Whether the stack is ready, and says that this process does not run."""
    answer = stack.get("/v1/health/ready")
    return answer.status_code == 200 and any(each.startswith(f"{name}: ") for each in answer.json()["degraded"])


def _runs_again(stack: RunningStack, name: str) -> bool:
    service = next(each for each in stack.state()["services"] if each["name"] == name)
    return bool(service["restarts"] and service["state"] == "running")


def _has_ended(stack: RunningStack, job: str) -> bool:
    return bool(stack.get(f"/v1/jobs/{job}", Authorization=f"Bearer {stack.key()}").json().get("terminal"))


def _down_leaves_nothing(stack: RunningStack) -> None:
    everyone = stack.everyone()
    down = stack.renalq("down")
    assert (down.returncode, "has stopped" in down.stdout) == (0, True)
    assert alive(everyone) == []
    assert speaking_of(stack.home) == []
    assert stack.process.wait(5) == 0
    assert "No stack runs" in stack.renalq("down").stdout
    assert "No stack runs" in stack.renalq("status").stderr
