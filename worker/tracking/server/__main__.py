"""`python -m worker.tracking.server --folder FOLDER`: MLflow's server, whose files all lie in FOLDER.

It is told by MLflow's own variables where its database is (MLFLOW_BACKEND_STORE_URI) and who may log in
(MLFLOW_AUTH_ADMIN_USERNAME, MLFLOW_AUTH_ADMIN_PASSWORD). Nothing of ours stays in its environment.
"""

import argparse
import configparser
import os
import secrets
import sys
from pathlib import Path

from worker.tracking.server.confinement import confine

AUTHORIZATION = "renalq_login:authenticate"
"""Beside this file, which MLflow's server finds by PYTHONPATH: it can read no other part of RenalQ."""
KEPT = "RENALQ_STACK_MARK"
"""What `cli.stack.orphan_reaper` finds a stack's processes by."""


def main() -> None:
    """Become MLflow's server."""
    parser = argparse.ArgumentParser(prog="python -m worker.tracking.server", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=5000)
    parser.add_argument("--folder", type=Path, required=True, help="where MLflow keeps its files")
    options = parser.parse_args()
    os.umask(0o077)
    folder = options.folder.resolve()
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    environ = server_environ(folder)
    if not confine(folder):
        print("This kernel has no Landlock: MLflow could read more than its own folder, but for its login.", flush=True)
    arguments = ["--app-name", "basic-auth", "--workers", "1", "--artifacts-destination", str(folder / "artifacts")]
    address = ["--host", options.host, "--port", str(options.port)]
    os.chdir(folder)
    command = [sys.executable, "-m", "mlflow", "server", *arguments, *address]
    os.execve(sys.executable, command, environ)  # noqa: S606  (the same process, so that signals reach it)


def server_environ(folder: Path) -> dict[str, str]:
    """The server's environment. What it needs of RenalQ's is none, so that it can tell nobody."""
    inherited = {name: value for name, value in os.environ.items() if name == KEPT or not name.startswith("RENALQ_")}
    own = str(Path(__file__).resolve().parent)
    return inherited | {
        "HOME": str(folder),
        "TMPDIR": str(folder / "tmp"),
        "PYTHONPATH": os.pathsep.join(filter(None, (own, os.environ.get("PYTHONPATH")))),
        "MLFLOW_AUTH_CONFIG_PATH": str(_write_config(folder, os.environ["MLFLOW_BACKEND_STORE_URI"])),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),  # of forms, none of which outlives a restart
        "MLFLOW_BASIC_AUTH_FAIL_CLOSED": "true",  # otherwise a route without a rule of its own needs no login
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # otherwise it runs task queues that are not used here
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
    }


def _write_config(folder: Path, store: str) -> Path:
    """Users and runs are in one database."""
    config = configparser.ConfigParser()
    config["mlflow"] = {
        "default_permission": "NO_PERMISSIONS",
        "database_uri": store.replace("%", "%%"),
        "authorization_function": AUTHORIZATION,
    }
    path = folder / "auth.ini"
    with path.open("w") as stream:
        config.write(stream)
    return path


if __name__ == "__main__":
    main()
