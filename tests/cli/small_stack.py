"""A program for the tests: a `Supervisor` over a few tiny processes, in place of the whole house.

    python -m tests.cli.small_stack FOLDER

`server` notes its end; `worker` starts a stubborn grandchild in a session of its own and notes its end; both notes go
to FOLDER/ends. `monitor` is not essential, and answers once FOLDER/monitor-answers exists. `pids` and `statuses` (JSON)
appear in FOLDER.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from cli.stack import supervisor
from cli.stack.launch import with_pdeathsig
from cli.stack.orphan_reaper import Stage
from cli.stack.supervisor import Service, ServiceDiedError, StopRequestedError, Supervisor

LOG_BYTES = 100_000

_NOTES_ITS_END = """
import os, signal, sys, time
def end(number, frame):
    with open("ends", "a") as stream:
        stream.write(sys.argv[1] + "\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
open("up-" + sys.argv[1], "w").close()
print(sys.argv[1], "is up, it is process", os.getpid(), flush=True)
while True:
    time.sleep(0.05)
"""

_STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_IGN)
time.sleep(600)
"""

_HAS_A_STUBBORN_CHILD = (
    f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", '''{_STUBBORN}'''], start_new_session=True)
open("grandchild", "w").write(str(child.pid))
"""
    + _NOTES_ITS_END
)

_SLEEPS = "import time; time.sleep(600)"


def python(code: str, name: str) -> list[str]:
    """A child that runs this code."""
    return with_pdeathsig([sys.executable, "-c", code, name])


def main(folder: Path) -> int:
    """Run it until a signal (0) or a death (1)."""
    supervisor.FIRST_WAIT_SECONDS = 0.05  # restarts follow each other fast
    lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR)
    stack = Supervisor(folder / "logs", folder, lock, LOG_BYTES)
    stack.on_change = lambda: publish(folder, stack)
    try:
        with stack:
            stack.start(Service("server", python(_NOTES_ITS_END, "server"), Stage.SERVERS))
            stack.start(Service("worker", python(_HAS_A_STUBBORN_CHILD, "worker"), Stage.WORKERS))
            answers = (folder / "monitor-answers").exists
            monitor = python(_SLEEPS, "monitor")
            stack.start(Service("monitor", monitor, Stage.WORKERS, essential=False, answers=answers))
            stack.wait_for(lambda: len(list(folder.glob("up-*"))) == 2, "both", 20)
            write(folder / "ready", True)
            stack.watch()
    except StopRequestedError:
        return 0
    except ServiceDiedError as death:
        print(death)
    return 1


def publish(folder: Path, stack: Supervisor) -> None:
    """What the tests look at."""
    write(folder / "statuses", {each.name: each.model_dump(mode="json") for each in stack.statuses()})
    write(folder / "pids", stack.pids())


def write(file: Path, content: Any) -> None:
    """Written whole or not at all: the test reads it at any time."""
    draft = file.with_suffix(".new")
    draft.write_text(json.dumps(content))
    draft.replace(file)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
