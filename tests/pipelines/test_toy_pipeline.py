"""A pipeline of another distribution: trained, predicted, cancelled, killed and resumed through REST."""

import io
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from jobs import keys
from jobs.db import Sessions
from jobs.settings import Settings
from tests.api.conftest import Server
from tests.builders import TENANT
from tests.processes import Stack, eventually, stack

pytestmark = pytest.mark.slow
HERE = Path(__file__).resolve().parents[1] / "toy_pipeline"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the toy's distribution, as pip installs it."""
    folder = tmp_path_factory.mktemp("site")
    options = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet", "--target", str(folder)]
    copy = shutil.copytree(HERE, tmp_path_factory.mktemp("toy") / "source")  # building leaves files beside the source
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(copy)], check=True)
    return folder


class Client:
    """REST calls with a key."""

    def __init__(self, url: str, secret: str) -> None:
        self._url, self._headers = url, {"Authorization": f"Bearer {secret}"}

    def __call__(self, method: str, path: str, **more: Any) -> Any:
        answer = requests.request(method, self._url + path, headers=self._headers, timeout=60, **more)
        assert answer.status_code < 300, answer.text
        return answer.json()

    def ended(self, job_id: str) -> Any:
        """The job, once it has ended."""
        return eventually(lambda: job if (job := self("GET", f"/jobs/{job_id}"))["terminal"] else None, 60)

    def refused(self, method: str, path: str, **more: Any) -> Any:
        answer = requests.request(method, self._url + path, headers=self._headers, timeout=60, **more)
        assert answer.status_code == 422, answer.text
        return answer.json()


@pytest.fixture
def processes(
    settings: Settings, sessions: Sessions, site: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Stack, Client]]:
    """A whole stack in whose environment the toy is installed."""
    monkeypatch.setenv("PYTHONPATH", str(site))
    settings = settings.model_copy(update={"checkpoint_seconds": 0, "cancel_grace_seconds": 0.5})
    server = Server(settings)
    server.start()
    with stack(settings, sessions, "dispatcher", "predict", "train") as started:
        with sessions.begin() as session:
            secret = keys.create(session, "test", ("jobs:read", "jobs:write", "models:write"), TENANT).secret
        yield started, Client(server.url, secret)
    server.kill()


def texts() -> bytes:
    """Three reports of one class, one of another."""
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for number in range(3):
            archive.writestr(f"clear/{number}.txt", f"No mass is seen. {number}")
        archive.writestr("mass/0.txt", "There is a mass.")
    return written.getvalue()


def test_a_pipeline_from_an_entry_point_trains_predicts_is_cancelled_killed_and_resumed(
    processes: tuple[Stack, Client],
) -> None:
    stack, client = processes
    made = client("POST", "/datasets", files={"file": ("t.zip", texts())}, data={"pipeline": "majority"})
    assert client.ended(made["job_id"])["state"] == "succeeded", stack.logs()
    dataset = client("GET", f"/datasets/{made['id']}")
    assert (dataset["pipeline"], dataset["classes"]) == ("majority", {"clear": 3, "mass": 1})
    train = {"dataset_id": dataset["id"], "pipeline": "majority", "task": "mass"}

    # Its own parameters are checked, and its dataset is its own.
    wrong = client.refused("POST", "/jobs/train", json=train | {"params": {"epochs": 0, "network": "x"}})
    assert {error["pointer"] for error in wrong["errors"]} == {"/params/epochs", "/params/network"}
    assert (
        client.refused("POST", "/jobs/train", json={"dataset_id": dataset["id"]})["errors"][0]["pointer"] == "/pipeline"
    )

    # Trained, and promoted by its own gate.
    job = client.ended(client("POST", "/jobs/train", json=train)["id"])
    assert (job["state"], job["pipeline"], job["task"]) == ("succeeded", "majority", "mass"), stack.logs()
    assert [(stage["name"], stage["state"]) for stage in job["stages"]] == [("counting", "succeeded")]
    assert [epoch["share"] for epoch in client("GET", f"/jobs/{job['id']}/metrics")["epochs"]] == [0.5, 1.0]
    champion = client("GET", "/models/champion?pipeline=majority&task=mass")
    assert champion["gate"]["reasons"] == ["There is no champion yet, and Accuracy 0.7500 ≥ the required 0.5000."]
    assert client("GET", "/models?pipeline=image")["data"] == []

    # Predicted: one, and a batch with an item that is computed once.
    one = {"pipeline": "majority", "task": "mass"}
    job = client.ended(client("POST", "/jobs/predict", files={"file": ("a.txt", b"Clear.")}, data=one)["id"])
    (result,) = client("GET", f"/jobs/{job['id']}/results")["data"]
    assert (result["label"], result["confidence"], result["output"]) == ("clear", 0.75, {"length": 6}), stack.logs()
    files = [("files", (f"{name}.txt", name.encode())) for name in ("one", "three", "one")]
    job = client.ended(client("POST", "/jobs/predict/batch", files=files, data=one)["id"])
    found = client("GET", f"/jobs/{job['id']}/results")["data"]
    assert [(each["output"]["length"], each["cached"]) for each in found] == [(3, False), (5, False), (3, True)]

    # Cancelled.
    slow = train | {"params": {"epochs": 20, "seconds": 0.5}}
    job = client("POST", "/jobs/train", json=slow)
    eventually(lambda: client("GET", f"/jobs/{job['id']}")["state"] == "running", 30, stack.logs)
    client("POST", f"/jobs/{job['id']}/cancel")
    assert client.ended(job["id"])["state"] == "cancelled"

    # Killed, and resumed from its checkpoint.
    job = client("POST", "/jobs/train", json=train | {"params": {"epochs": 6, "seconds": 0.5}})
    eventually(lambda: len(client("GET", f"/jobs/{job['id']}/metrics")["epochs"]) >= 3, 30, stack.logs)
    stack.kill("train")
    stack.start("train")
    ended = client.ended(job["id"])
    assert (ended["state"], ended["attempt"]) == ("succeeded", 2), stack.logs()
    types = [event["type"] for event in client("GET", f"/jobs/{job['id']}/events?limit=100")["data"]]
    assert "resumed" in types
    assert [each["epoch"] for each in client("GET", f"/jobs/{job['id']}/metrics")["epochs"]] == [1, 2, 3, 4, 5, 6]


def test_the_toy_is_under_sixty_lines() -> None:
    assert len((HERE / "renalq_toy.py").read_text().splitlines()) < 60
    assert os.sep not in (HERE / "pyproject.toml").read_text().split("py-modules")[1]
