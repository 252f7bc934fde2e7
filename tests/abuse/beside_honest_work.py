"""Honest work while slow clients and worst bodies go on: `python -m tests.abuse.beside_honest_work --minutes 60`.

Starts a whole stack of its own. Honest clients train, predict batches and single scans, and poll; meanwhile each way of
`tests.abuse.slow_clients` has its turn, and one key sends the bodies of `tests.abuse.bodies` without a pause. All come
from one address. Prints a line a minute (what honest clients did, what failed, the API's memory), then the sum; the
exit code is 0 where no honest request failed and no job was lost.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import sys
import tempfile
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any

import requests

from ml.synthetic import phantom_files
from tests.abuse.bodies import MAKERS
from tests.abuse.flood import attack_all, memory
from tests.abuse.slow_clients import ATTACKS, Target, attack, raise_descriptors
from tests.whole_stack import RunningStack, running_stack

PARAMS = {"weights": "none", "epochs": 3, "learning_rate": 0.01, "augmentation": False, "image_size": [64, 64, 3]}
MODEL = {"model": "1"}  # whether it may be promoted is not asked here
PATIENTS, SCANS_A_BATCH = 120, 64
PATIENCE_SECONDS = 30.0
"""How long an honest client waits for an answer."""
JOB_SECONDS = 900.0


class Failed(Exception):
    """An honest request that was not answered as it should be, or a job that did not end well."""


@dataclass
class Honest:
    """Clients with one key, and what they saw: requests, failures and jobs by what they did, times of polls (s)."""

    url: str
    key: str
    until: float
    requests: int = 0
    polls: list[float] = field(default_factory=list)
    jobs: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)

    def ask(self, method: str, path: str, *expected: int, **options: Any) -> Any:
        """One request, never repeated. Raises Failed."""
        self.requests += 1
        headers = {"Authorization": f"Bearer {self.key}"}
        try:
            answer = requests.request(method, self.url + path, headers=headers, timeout=PATIENCE_SECONDS, **options)
        except requests.RequestException as error:
            raise Failed(f"{method} {path.split('/')[1]}: {type(error).__name__}") from None
        if answer.status_code not in expected:
            raise Failed(f"{method} {path.split('/')[1]}: {answer.status_code} {answer.text[:200]}")
        return answer.json() if "json" in answer.headers.get("Content-Type", "") else answer.content

    def ended(self, path: str) -> dict[str, Any]:
        """A job that succeeded. Raises Failed."""
        deadline = time.monotonic() + JOB_SECONDS
        while time.monotonic() < deadline:
            job: dict[str, Any] = self.ask("GET", path, 200)
            if job["terminal"]:
                if job["state"] != "succeeded":
                    raise Failed(f"a {job['kind']} job is {job['state']}: {job['error']}")
                return job
            time.sleep(0.5)
        raise Failed("a job did not end")

    def again_and_again(self, what: str, do: Callable[[], None], pause: float) -> None:
        """Until the time is over; a failure is counted and told, and the next goes on."""
        while time.monotonic() < self.until:
            try:
                do()
                self.jobs[what] += 1
            except Failed as error:
                self.failures[f"{what}: {error}"] += 1
                print(f"FAILED {what}: {error}", flush=True)
            time.sleep(pause)

    def poll(self) -> None:
        """A list of jobs, on a connection of its own."""
        began = time.monotonic()
        self.ask("GET", "/jobs?limit=1", 200)
        self.polls.append(time.monotonic() - began)
        self.ask("GET", "/health/live", 200)


def _uploaded(honest: Honest, archive: Path) -> str:
    with archive.open("rb") as file:
        made = honest.ask("POST", "/datasets", 202, files={"file": (archive.name, file)}, data={"name": "honest"})
    honest.ended(f"/jobs/{made['job_id']}")
    return str(made["id"])


def _train(honest: Honest, dataset: str) -> Callable[[], None]:
    def do() -> None:
        body = {"dataset_id": dataset, "params": PARAMS}
        honest.ended(honest.ask("POST", "/jobs/train", 202, json=body)["links"]["self"])

    return do


def _batch(honest: Honest, scans: Sequence[bytes]) -> Callable[[], None]:
    def do() -> None:
        files = [("files", (f"{number}.png", scan, "image/png")) for number, scan in enumerate(scans)]
        links = honest.ended(honest.ask("POST", "/jobs/predict/batch", 202, files=files, data=MODEL)["links"]["self"])[
            "links"
        ]
        found = honest.ask("GET", f"{links['results']}?limit={len(scans)}", 200)["data"]
        if [each["state"] for each in found] != ["succeeded"] * len(scans):
            raise Failed(f"a batch of {len(scans)} scans has {len(found)} results")

    return do


def _single(honest: Honest, scan: bytes) -> Callable[[], None]:
    def do() -> None:
        made = honest.ask("POST", "/jobs/predict", 202, files={"file": ("scan.png", scan, "image/png")}, data=MODEL)
        honest.ended(made["links"]["self"])

    return do


def _slow_clients(url: str, key: str, seconds: float, turn: float, told: Any) -> None:
    """Each way in turn."""
    raise_descriptors()
    where = url.removeprefix("http://").split(":")
    end = time.monotonic() + seconds
    for name in itertools.cycle(ATTACKS):
        if time.monotonic() >= end:
            return
        told.put(asyncio.run(attack(Target(where[0], int(where[1]), key), name, turn)))


def rage(stack: RunningStack, minutes: float, turn: float) -> int:
    """All at once for so long; the number of failures."""
    admin = Honest(stack.url, stack.key(), time.monotonic() + 60 * minutes)
    scans, archive = _data(stack.home.parent)
    dataset = _uploaded(admin, archive)
    _train(admin, dataset)()
    keys = {
        name: admin.ask("POST", "/keys", 201, json={"name": name, "scopes": ["jobs:read", "jobs:write"]})["secret"]
        for name in ("honest", "attacker")
    }
    honest = Honest(stack.url, keys["honest"], time.monotonic() + 60 * minutes)
    apart = multiprocessing.get_context("spawn")
    told, slow = apart.Queue(), apart.Queue()
    attackers = [
        apart.Process(
            target=attack_all, args=(stack.url, keys["attacker"], 60 * minutes, 4, list(MAKERS), told), daemon=True
        ),
        apart.Process(target=_slow_clients, args=(stack.url, keys["attacker"], 60 * minutes, turn, slow), daemon=True),
    ]
    work = [
        ("training", _train(honest, dataset), 5.0),
        ("batch", _batch(honest, scans), 1.0),
        ("single", _single(honest, scans[0]), 1.0),
        ("poll", honest.poll, 0.25),
    ]
    threads = [threading.Thread(target=honest.again_and_again, args=each) for each in work]
    api = json.loads((stack.home / "stack.json").read_text())["pids"]["api"]
    for each in [*attackers, *threads]:
        each.start()
    answers: Counter[str] = Counter()
    memories = [memory(api)]
    while any(each.is_alive() for each in threads):
        until = time.monotonic() + 60
        while time.monotonic() < until and any(each.is_alive() for each in threads):
            time.sleep(1)
            memories.append(memory(api))
            while not told.empty():
                answers[str(told.get()[1])] += 1
            while not slow.empty():
                print("attack", json.dumps(slow.get()), flush=True)
        _tell(honest, answers, memories[-60:])
    print(f"API at the start {memories[0] / 1e6:.0f} MB, at most {max(memories) / 1e6:.0f} MB, at the end "
          f"{memories[-1] / 1e6:.0f} MB; failures: {dict(honest.failures) or 'none'}")  # fmt: skip
    for each in attackers:
        each.join(90)
        each.kill()
    return sum(honest.failures.values())


def _tell(honest: Honest, answers: Counter[str], memories: Sequence[int]) -> None:
    p95 = quantiles(honest.polls, n=20)[-1] if len(honest.polls) > 1 else 0.0
    done = f"{honest.requests} requests, {dict(honest.jobs)}, {sum(honest.failures.values())} failed"
    sizes = f"{min(memories) / 1e6:.0f} to {max(memories) / 1e6:.0f} MB"
    print(f"{time.strftime('%H:%M')} honest: {done}; poll p95 {p95 * 1000:.0f} ms; API {sizes}; "
          f"attackers' bodies by status {dict(answers)}", flush=True)  # fmt: skip


def _data(folder: Path) -> tuple[list[bytes], Path]:
    archive = folder / "phantom.zip"
    phantom_files.write_zip(archive, patients=PATIENTS, slices=1, seed=3)
    with zipfile.ZipFile(archive) as opened:
        names = [name for name in opened.namelist() if name.endswith((".png", ".jpg"))]
        return [opened.read(name) for name in names[:SCANS_A_BATCH]], archive


def main(argv: Sequence[str] | None = None) -> int:
    """Rage, and tell."""
    parser = argparse.ArgumentParser(prog="python -m tests.abuse.beside_honest_work")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--turn", type=float, default=45, help="seconds that each way of slow clients goes on")
    parsed = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="renalq-abuse-") as folder, running_stack(Path(folder) / "home") as stack:
        return int(rage(stack, parsed.minutes, parsed.turn) > 0)


if __name__ == "__main__":
    sys.exit(main())
