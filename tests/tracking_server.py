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
from tests.processes import eventually

# Without its job runners, nine more processes that nothing here needs.
QUIET = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}


@contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[str]:
    """The URL of a server that answers and keeps all it has in a folder. It ends with the block, or with us."""
    options = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    store = ["--backend-store-uri", f"sqlite:///{folder}/runs.db", "--artifacts-destination", str(folder / "files")]
    command = with_pdeathsig([sys.executable, "-m", "mlflow", "server", *options, *store])
    path, url = folder / "mlflow.log", f"http://127.0.0.1:{port}"
    with path.open("wb") as log:
        process = subprocess.Popen(command, env=os.environ | QUIET, stdout=log, stderr=log, start_new_session=True)
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
