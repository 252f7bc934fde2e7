"""Flower as the stack starts it: what it has seen survives its end, and it changes nothing."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from celery import Celery

from cli.stack import services
from cli.stack.server_plan import free_port
from tests.databases import ROOT
from tests.processes import eventually

pytestmark = pytest.mark.slow
AUTH = ("renalq", "secret")
JOB = "01a1faa2-0000-7000-8000-000000000007"


@contextmanager
def flower(history: Path, redis_url: str) -> Iterator[str]:
    """Its address. At the block's end it gets the stack's signal."""
    port = free_port()
    service = services.flower(
        port, AUTH[1], history, {"RENALQ_REDIS_URL": redis_url, "RENALQ_HOME": str(history.parent)}
    )
    with history.with_name("flower.log").open("ab") as log:
        process = subprocess.Popen(
            service.command, cwd=ROOT, env={**os.environ, **service.environ}, stdout=log, stderr=log
        )
    address = f"http://127.0.0.1:{port}"
    try:
        eventually(lambda: asked(address, "/api/workers") is not None, 60)
        yield address
        process.send_signal(service.stop_signal)
        assert process.wait(20) == 0
    finally:
        if process.poll() is None:
            process.kill()


def asked(address: str, path: str) -> Any:
    with suppress(requests.ConnectionError):
        return requests.get(address + path, auth=AUTH, timeout=10)
    return None


def tell(redis_url: str) -> None:
    """What a worker says of a task that fails."""
    app = Celery(broker=redis_url)
    with app.connection() as connection, app.events.Dispatcher(connection, hostname="train@test") as events:
        ids = {"unit_id": "7", "job_id": JOB}
        events.send("task-received", uuid="t-7", name="renalq.train", args="()", kwargs=repr(ids), retries=0)
        events.send("task-started", uuid="t-7")
        events.send("task-failed", uuid="t-7", exception="UnitFailed('BAD_DATASET: …')", traceback="")


def test_its_history_survives_a_restart_and_it_only_shows(redis_url: str, tmp_path: Path) -> None:
    history = tmp_path / "flower.db"

    def seen(address: str) -> Any:
        return asked(address, "/api/tasks").json().get("t-7")

    with flower(history, redis_url) as address:

        def told() -> Any:
            tell(redis_url)
            return seen(address) and seen(address)["state"] == "FAILURE"

        eventually(told, 20)
        refused = requests.post(f"{address}/api/task/revoke/t-7", auth=AUTH, timeout=10)
        assert refused.status_code in (403, 405)
    with flower(history, redis_url) as address:
        task = seen(address)
    assert (task["name"], task["state"]) == ("renalq.train", "FAILURE")
    assert JOB in task["kwargs"]
    assert "BAD_DATASET" in task["exception"]


def test_compose_starts_it_alike() -> None:
    service = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["flower"]
    assert set(services.FLOWER_OPTIONS) <= set(service["command"])
    assert "--db=/var/lib/renalq/flower.db" in service["command"]
