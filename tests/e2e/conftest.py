"""A whole stack, spoken to over HTTP alone, and a training in it for all tests of this folder."""

import json
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from cli.commands import demo
from ml.synthetic import phantom_files
from tests.depth import ALL, depth
from tests.processes import DATA
from tests.whole_stack import RunningStack

PARAMS = {"weights": "none", "epochs": 5, "learning_rate": 0.01, "augmentation": False}
PARAMS |= depth({"image_size": [64, 64, 3]}, {})


@dataclass(frozen=True)
class Client:
    """A client that knows nothing but the address and a key."""

    url: str
    key: str
    home: Path

    def get(self, path: str, **options: Any) -> requests.Response:
        """GET."""
        return requests.get(self.url + path, headers=self._headers(options), timeout=90, **options)

    def post(self, path: str, **options: Any) -> requests.Response:
        """POST."""
        return requests.post(self.url + path, headers=self._headers(options), timeout=120, **options)

    def ended(self, job: dict[str, Any], seconds: float = 600) -> dict[str, Any]:
        """The job once it is terminal."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            seen: dict[str, Any] = self.get(job["links"]["self"]).json()
            if seen["terminal"]:
                return seen
            time.sleep(0.3)
        raise AssertionError(f"The job is still {seen['state']} at {seen['progress']:.0%} of {seen['stage']}.")

    def memory(self, process: str, largest: bool = False) -> int:
        """Resident bytes of a process of the stack with all its children; or of the largest of them."""
        parent = psutil.Process(json.loads((self.home / "stack.json").read_text())["pids"][process])
        sizes = []
        for one in [parent, *parent.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                sizes.append(one.memory_info().rss)
        return max(sizes) if largest else sum(sizes)

    def _headers(self, options: dict[str, Any]) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}", **options.pop("headers", {})}


@pytest.fixture(scope="session")
def client(whole_stack: RunningStack) -> Client:
    """A client of the whole stack."""
    return Client(whole_stack.url, whole_stack.key(), whole_stack.home)


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Synthetic CT. For all tests: the real scans where they are beside the project, or as many as in `renalq demo`."""
    real = DATA / "mri-465.zip"
    if ALL and real.exists():
        return real
    made = tmp_path_factory.mktemp("data") / "phantom.zip"
    patients, slices = depth((demo.PATIENTS, 1), (demo.PATIENTS, demo.SLICES))
    phantom_files.write_zip(made, patients=patients, slices=slices, seed=demo.SEED)
    return made


@pytest.fixture(scope="session")
def trained(client: Client, archive: Path) -> dict[str, Any]:
    """A training that ended well, watched while it ran (`seen`: what /events and /metrics showed meanwhile)."""
    with archive.open("rb") as file:
        answer = client.post("/datasets", files={"file": (archive.name, file)}, data={"name": "first"})
    assert answer.status_code == 202, answer.text
    dataset = answer.json()
    client.ended(client.get(f"/jobs/{dataset['job_id']}").json())
    checked = client.get(f"/datasets/{dataset['id']}").json()
    assert checked["state"] == "ready", checked["problems"]

    answer = client.post(
        "/jobs/train", json={"dataset_id": dataset["id"], "params": PARAMS, "metadata": {"study": "a"}}
    )
    assert answer.status_code == 202, answer.text
    job = answer.json()
    assert answer.headers["Location"].endswith(job["links"]["self"])
    seen: list[dict[str, Any]] = []
    watcher = threading.Thread(target=_watch, args=(client, job, seen))
    watcher.start()
    ended = client.ended(job)
    watcher.join(30)
    return {**ended, "seen": seen}


def _watch(client: Client, job: dict[str, Any], seen: list[dict[str, Any]]) -> None:
    """Follow /events; at each epoch ask /metrics too."""
    headers = {"Accept": "text/event-stream"}
    with client.get(job["links"]["events"], headers=headers, stream=True) as stream:
        kind = ""
        for line in stream.iter_lines(decode_unicode=True):
            if line.startswith("event:"):
                kind = line.removeprefix("event:").strip()
            elif line.startswith("data:"):
                epochs = client.get(job["links"]["metrics"]).json()["epochs"] if kind == "epoch" else []
                state = client.get(job["links"]["self"]).json()["state"] if kind == "epoch" else None
                seen.append(
                    {"event": kind, "epochs": len(epochs), "state": state, "memory": client.memory("worker-train")}
                )
