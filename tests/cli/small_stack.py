"""A program for the tests: a `Supervisor` over a few tiny processes, in place of the whole house.

    python -m tests.cli.small_stack FOLDER

`server` notes its end; `worker` starts a stubborn grandchild in a session of its own and notes its end; both notes go
to FOLDER/ends. `pids` (JSON) appears in FOLDER when all run.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from cli.stack.launch import with_pdeathsig
from cli.stack.orphan_reaper import Stage
from cli.stack.supervisor import Service, ServiceDiedError, StopRequestedError, Supervisor

_NOTES_ITS_END = """
import os, signal, sys, time
def end(number, frame):
    with open("ends", "a") as stream:
        stream.write(sys.argv[1] + "\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
open("up-" + sys.argv[1], "w").close()
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


def python(code: str, name: str) -> list[str]:
    """A child that runs this code."""
    return with_pdeathsig([sys.executable, "-c", code, name])


def main(folder: Path) -> int:
    """Run it until a signal (0) or a death (1)."""
    lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR)
    server = Service("server", python(_NOTES_ITS_END, "server"), Stage.SERVERS)
    worker = Service("worker", python(_HAS_A_STUBBORN_CHILD, "worker"), Stage.WORKERS, restarts=True)
    try:
        with Supervisor(folder / "logs", folder, lock, print) as supervisor:
            for service in (server, worker):
                supervisor.start(service)
            supervisor.wait_for(lambda: len(list(folder.glob("up-*"))) == 2, "both", 20)
            while True:
                publish(folder / "pids", supervisor.pids())
                supervisor.tick()
    except StopRequestedError:
        return 0
    except ServiceDiedError as death:
        print(death)
        return 1


def publish(file: Path, pids: dict[str, int]) -> None:
    """Written whole or not at all: the test reads it at any time."""
    draft = file.with_suffix(".new")
    draft.write_text(json.dumps(pids))
    draft.replace(file)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
