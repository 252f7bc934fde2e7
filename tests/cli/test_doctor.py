"""`renalq doctor`: one line each, and exit code 1 for problems only."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from cli.stack import doctor
from cli.stack.doctor import Level
from cli.stack.server_plan import LOOPBACK, free_port
from jobs import stack_state
from jobs.settings import Settings
from tests.builders import stack

REPOSITORY = Path(__file__).parents[2]
SUBJECTS = ["Python", "torch", "torchvision", "weights", "disk", "port", "Postgres", "Redis", "MLflow", "Flower"]


def renalq_doctor(home: Path, *options: str, **environ: str) -> subprocess.CompletedProcess[str]:
    given = {"RENALQ_HOME": str(home), "RENALQ_PORT": str(free_port()), **environ}
    command = [sys.executable, "-m", "cli", "doctor", *options]
    return subprocess.run(
        command, env={**os.environ, **given}, cwd=REPOSITORY, capture_output=True, text=True, check=False
    )


def test_doctor_prints_one_line_per_finding_and_finds_no_problem(tmp_path: Path) -> None:
    done = renalq_doctor(tmp_path)
    assert done.returncode == 0, done.stdout
    lines = done.stdout.strip().splitlines()
    assert [line.split()[1] for line in lines] == SUBJECTS
    assert {line.split()[0] for line in lines} <= {"ok", "warning"}


def test_doctor_prints_json_and_exits_1_for_a_problem(tmp_path: Path) -> None:
    nobody = f"redis://:hunter2@{LOOPBACK}:{free_port()}/0"
    done = renalq_doctor(tmp_path, "--json", RENALQ_REDIS_URL=nobody)
    assert done.returncode == 1
    found = {each["subject"]: each for each in json.loads(done.stdout)}
    assert list(found) == SUBJECTS
    assert found["Redis"]["level"] == "problem"
    assert "RENALQ_REDIS_URL" in found["Redis"]["remedy"]
    assert "hunter2" not in done.stdout


def test_torchvision_says_whether_stand_ins_are_declared() -> None:
    probed = {"torch": "2.13.0+cpu", "torchvision": "0.28.0"}
    assert "stand-ins are declared" in doctor.torchvision_found({**probed, "declared": True}).text
    assert "with its compiled operators" in doctor.torchvision_found({**probed, "declared": False}).text


def test_a_missing_torch_is_a_problem_with_a_remedy() -> None:
    found = doctor.torch_found({"torch_error": "ModuleNotFoundError: No module named 'torch'"})
    assert (found.level, "make setup" in found.remedy) == (Level.PROBLEM, True)


def test_weights_are_found_where_the_setting_says(tmp_path: Path) -> None:
    settings = Settings(weights_dir=tmp_path)
    missing = doctor.weights(settings, {})
    assert (missing.level, str(tmp_path) in missing.remedy) == (Level.WARNING, True)
    assert "renalq weights fetch vgg16" in missing.remedy
    (tmp_path / "vgg16-397923af.pth").touch()
    assert doctor.weights(settings, {}).level == Level.OK


def test_a_taken_port_is_a_problem_unless_our_stack_has_it(tmp_path: Path) -> None:
    with closing(socket.create_server((LOOPBACK, 0))) as taken:
        settings = Settings(home=tmp_path, port=taken.getsockname()[1])
        assert doctor.port(settings).level == Level.PROBLEM
        stack_state.write(tmp_path, stack())
        assert doctor.port(settings).level == Level.OK


def test_given_servers_report_their_version(postgres: str, redis_url: str) -> None:
    settings = Settings(database_url=postgres, redis_url=redis_url)
    for found in (doctor.postgres(settings), doctor.redis(settings)):
        assert found.level == Level.OK
        assert "***" in found.text


@pytest.mark.parametrize("package", ["mlflow", "a_package_that_is_not_there"])
def test_a_missing_optional_package_is_never_a_problem(package: str) -> None:
    assert doctor.optional(package, "without it").level != Level.PROBLEM
