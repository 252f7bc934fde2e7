"""One whole stack by `renalq up` for all tests of this folder, spoken to over HTTP alone."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from cli.commands import demo
from cli.stack.server_plan import free_port
from ml.synthetic import phantom_files

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
PARAMS = {"weights": "none", "epochs": 5, "learning_rate": 0.01, "augmentation": False}


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
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client of a stack of this session's own."""
    home, port = tmp_path_factory.mktemp("stack"), free_port()
    environ = {**os.environ, "RENALQ_HOME": str(home), "RENALQ_PORT": str(port)}
    command = [sys.executable, "-m", "cli", "up"]
    with (home / "up.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(url, process, home)
        yield Client(url, (home / "admin.key").read_text().strip(), home)
    finally:
        process.terminate()
        assert process.wait(60) == 0, (home / "up.log").read_text()[-2000:]


def _wait_until_ready(url: str, process: "subprocess.Popen[bytes]", home: Path) -> None:
    deadline = time.monotonic() + 90
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if requests.get(f"{url}/health/ready", timeout=3).ok:
                return
        except requests.RequestException:
            pass
        time.sleep(0.2)
    raise AssertionError((home / "up.log").read_text()[-3000:])


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real scans where they lie beside the project; else the synthetic CT of `renalq demo`."""
    real = SHARED / "mri-465.zip"
    if real.exists():
        return real
    made = tmp_path_factory.mktemp("data") / "phantom.zip"
    phantom_files.write_zip(made, patients=demo.PATIENTS, slices=demo.SLICES, seed=demo.SEED)
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
