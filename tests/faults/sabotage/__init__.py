"""What is to go wrong in the processes of a test: built here, done by `sitecustomize.py` beside this file.

    plan = Sabotage(folder)
    death = plan.at("worker.handlers.predict:predict_chunk", "kill", nth=3)
    processes.start("predict", environ=plan.environ())
    eventually(death.happened)

Nothing in the code under test knows of it. An act is done once in all processes together, unless `once=False`.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Act:
    """One thing that goes wrong."""

    what: dict[str, Any]

    def happened(self) -> bool:
        """Whether it has begun."""
        return Path(self.what["flag"]).exists()

    @property
    def pid(self) -> int:
        """The process that it happened in (the first, where there were several)."""
        return int(Path(self.what["flag"]).read_text())

    @property
    def at(self) -> float:
        """When it happened: seconds since 1970."""
        return Path(self.what["flag"]).stat().st_mtime

    def release(self) -> None:
        """Let who pauses go on."""
        Path(self.what["until"]).touch()


@dataclass(frozen=True)
class StubNetwork:
    """The stand-in for the network, and what it has seen."""

    what: dict[str, Any]

    def paused(self) -> bool:
        """Whether it stands at a scan whose word is `pause`."""
        return Path(self.what["reached"]).exists()

    def release(self) -> None:
        """Let it go on, and pass such scans from now on."""
        Path(self.what["until"]).touch()

    def seen(self) -> list[tuple[int, int, str]]:
        """Process, ordinal and first word of each scan that was looked at."""
        path = Path(self.what["seen"])
        lines = path.read_text().splitlines() if path.exists() else []
        return [(int(pid), int(ordinal), word) for pid, ordinal, word in map(str.split, lines)]


class Sabotage:
    """A plan: what goes wrong, and the flags that say what has.

    Args:
        folder: where the flags lie.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "sabotage"
        self._folder.mkdir(exist_ok=True)
        self._acts: list[dict[str, Any]] = []

    def at(
        self,
        place: str,
        do: str,
        *,
        when: str = "before",
        nth: int | None = None,
        given: str | None = None,
        once: bool = True,
        **more: Any,
    ) -> Act:
        """Do it before or after (the n-th call in a process of) the function MODULE:NAME or MODULE:CLASS.NAME.

        `given`: only calls with an argument whose text has this in it.

        `do`: kill, kill_tree (the Celery parent as well), stop (SIGSTOP), hang, pause (until released), slow
        (`seconds`), raise (`error`), enospc, note.
        """
        file = str(self._folder / f"act-{len(list(self._folder.iterdir()))}-{len(self._acts)}")
        act = {"at": place, "do": do, "when": when, "nth": nth, "given": given, "once": once, **more}
        self._acts.append({**act, "flag": file, "until": file + ".go"})
        return Act(self._acts[-1])

    def network(self, seconds: float = 0.0, memory_for: int | None = None) -> StubNetwork:
        """A network that answers by a scan's first word (see stub_network.py), `seconds` a scan; batches larger than
        `memory_for` do not fit into its device."""
        files = {name: str(self._folder / name) for name in ("seen", "reached", "until")}
        self._acts.append({"do": "stub_network", "seconds": seconds, "memory_for": memory_for, **files})
        return StubNetwork(self._acts[-1])

    def training(
        self, seconds: float = 0.2, model_bytes: int = 1000, stubborn: bool = False, refuses: bool = False
    ) -> None:
        """Trainings that take `seconds` an epoch and learn nothing (see stub_training.py)."""
        what = {"seconds": seconds, "model_bytes": model_bytes, "stubborn": stubborn, "refuses": refuses}
        self._acts.append({"do": "stub_training", **what})

    def clock(self, seconds: float) -> None:
        """The process's clock is wrong by so much."""
        self._acts.append({"do": "clock", "seconds": seconds})

    def celery(self, settings: dict[str, Any], transport: dict[str, Any]) -> None:
        """Other settings of Celery and of its transport than `worker/app.py` has."""
        self._acts.append({"do": "celery", "at": "worker.app", "settings": settings, "transport": transport})

    def environ(self) -> dict[str, str]:
        """What a process needs in its environment for this to happen in it."""
        path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH", "")]))
        return {"PYTHONPATH": path, "SABOTAGE": json.dumps(self._acts)}
