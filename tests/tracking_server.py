"""An MLflow server of the tests' own."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import requests

from cli.stack.launch import with_pdeathsig
from tests.processes import ROOT, eventually

LOGIN = {"MLFLOW_TRACKING_USERNAME": "renalq", "MLFLOW_TRACKING_PASSWORD": "a password of the tests"}
os.environ.update(LOGIN)  # for all clients of this process, and of those that it starts before the server


@contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[str]:
    """The URL of the server of `renalq up` on a database file. It keeps all it has in a folder, ends with the block, or
    with us, and every client that this process and its children make logs in."""
    own = folder / "mlflow"
    own.mkdir(exist_ok=True)
    command = with_pdeathsig(
        [sys.executable, "-m", "worker.tracking.server", "--port", str(port), "--folder", str(own)]
    )
    told = {
        "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{own}/runs.db",
        "MLFLOW_AUTH_ADMIN_USERNAME": LOGIN["MLFLOW_TRACKING_USERNAME"],
        "MLFLOW_AUTH_ADMIN_PASSWORD": LOGIN["MLFLOW_TRACKING_PASSWORD"],
    }
    path, url = folder / "mlflow.log", f"http://127.0.0.1:{port}"
    with path.open("wb") as log:
        process = subprocess.Popen(
            command, env=os.environ | told, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )
    try:
        eventually(lambda: _healthy(url), 180, path.read_text)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # asked politely, it waits for connections that clients keep open
        process.wait(10)


def _healthy(url: str) -> bool:
    try:
        return requests.get(f"{url}/health", timeout=2).ok
    except requests.RequestException:
        return False
