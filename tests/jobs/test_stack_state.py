"""What `renalq up` says of its processes is read whole, and only while it lives."""

import subprocess
from pathlib import Path

import pytest

from jobs import stack_state
from jobs.stack_state import ServiceState
from tests.builders import service, stack


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert stack_state.read(tmp_path) is None
    written = stack(service("api", ServiceState.RUNNING, essential=True))
    stack_state.write(tmp_path, written)
    assert stack_state.read(tmp_path) == written


def test_of_a_dead_stack_nothing_is_known(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    stack_state.write(tmp_path, stack(pid=ended.pid))
    assert stack_state.read(tmp_path) is None


@pytest.mark.parametrize("content", ["", "{}", "[1]"])
def test_a_damaged_file_is_as_none(tmp_path: Path, content: str) -> None:
    (tmp_path / stack_state.FILE).write_text(content)
    assert stack_state.read(tmp_path) is None


def test_each_process_that_does_not_run_has_a_sentence() -> None:
    died = service("mlflow", ServiceState.RESTARTING, last_death="was killed by SIGKILL")
    api = service("api", ServiceState.STARTING, essential=True, last_death="ended with status 1")
    assert stack_state.impairments(stack(died, api, service("flower", ServiceState.RUNNING))) == [
        "mlflow: restarting, since it was killed by SIGKILL. Jobs go on without it.",
        "api: starting, since it ended with status 1.",
    ]
    assert stack_state.impairments(stack(died, ready=False)) == [], "a stack that starts is not impaired"
