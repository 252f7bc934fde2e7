"""Commands against an API that answers what the test says, and notes what it is asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cli.__main__ import main
from cli.commands import reproduction_lines

JOB = {
    "id": "j2", "kind": "train", "state": "succeeded", "terminal": True, "stage": None, "progress": 1.0,
    "eta_seconds": None, "error": None,
}  # fmt: skip
MATCH = {
    "of": "j1",
    "matches": True,
    "differences": {},
    "revision": {"original": "abc", "now": "abc", "same": True},
    "same_environment": True,
    "environment_differences": {},
}
DIFFERENT = {
    **MATCH,
    "matches": False,
    "differences": {"f1": [0.9, 0.91], "roc_auc": [None, 0.99]},
    "revision": {"original": "abc", "now": "abd", "same": False},
    "environment_differences": {"torch": ["2.13", "2.14"]},
}


class Api(ThreadingHTTPServer):
    """Answers each method and path with what it was given."""

    def __init__(self, answers: dict[str, Any]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers, self.asked = answers, dict[str, Any]()


class _Handler(BaseHTTPRequestHandler):
    server: Api

    def _answer(self) -> None:
        asked = f"{self.command} {self.path}"
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked[asked] = json.loads(body) if body else None
        content = json.dumps(self.server.answers[asked]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        pass


Ask = Callable[..., tuple[Result, dict[str, Any]]]


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ask]:
    """Runs a command; gives its result, and the bodies of what it asked."""
    servers: list[Api] = []

    def run(answers: dict[str, Any], *words: str) -> tuple[Result, dict[str, Any]]:
        api = Api(answers)
        servers.append(api)
        threading.Thread(target=api.serve_forever, daemon=True).start()
        monkeypatch.setenv("RENALQ_URL", f"http://127.0.0.1:{api.server_port}")
        monkeypatch.setenv("RENALQ_KEY", "rq_key")
        return CliRunner().invoke(main, list(words)), api.asked

    yield run
    for server in servers:
        server.shutdown()
        server.server_close()


def test_the_short_options_of_a_training_are_parameters(ask: Ask) -> None:
    words = ["--network", "resnet18", "--weights", "version:2", "--epochs", "5", "-p", "folds=5"]
    result, asked = ask({"POST /jobs/train": JOB}, "train", "d1", *words)
    assert result.exit_code == 0, result.output
    params = {"folds": 5, "network": "resnet18", "weights": "version:2", "epochs": 5}
    assert asked == {"POST /jobs/train": {"dataset_id": "d1", "params": params}}


def test_what_is_not_named_is_not_sent(ask: Ask) -> None:
    _, asked = ask({"POST /jobs/train": JOB}, "train", "d1")
    assert asked["POST /jobs/train"]["params"] == {}


@pytest.mark.parametrize(("found", "code"), [(MATCH, 0), (DIFFERENT, 1)])
def test_a_reproduction_is_followed_and_ends_with_its_verdict(ask: Ask, found: dict[str, Any], code: int) -> None:
    ended = {**JOB, "reproduction": found}
    running = {**JOB, "state": "running", "terminal": False}
    answers = {"POST /jobs/j1/reproduce": running, "GET /jobs/j2": ended, "GET /jobs/j2/metrics": {"epochs": []}}
    result, _ = ask(answers, "jobs", "reproduce", "j1")
    assert result.exit_code == code, result.output
    assert result.output.rstrip().endswith("\n".join(reproduction_lines(found)))


def test_a_reproduction_that_is_not_followed_says_only_that_it_was_made(ask: Ask) -> None:
    queued = {**JOB, "state": "queued", "terminal": False, "reproduction": None}
    result, asked = ask({"POST /jobs/j1/reproduce": queued}, "jobs", "reproduce", "j1", "--no-watch")
    assert result.exit_code == 0
    assert "queued" in result.output
    assert list(asked) == ["POST /jobs/j1/reproduce"]


def test_what_differs_is_told_figure_by_figure() -> None:
    lines = [" ".join(line.split()) for line in reproduction_lines(DIFFERENT)]
    assert lines == [
        "reproduction of j1: 2 figures differ",
        "f1 0.9 → 0.91",
        "roc_auc None → 0.99",
        "code abc → abd",
        "torch 2.13 → 2.14",
    ]


def test_a_dataset_shows_its_problems_and_its_warnings(ask: Ask) -> None:
    dataset = {
        "id": "d1",
        "state": "ready",
        "classes": {"Normal": 240, "Tumor": 25},
        "problems": [],
        "warnings": ["Normal has ten times as many scans as Tumor."],
    }
    result, _ = ask({"GET /datasets/d1": dataset}, "datasets", "show", "d1")
    assert result.exit_code == 0, result.output
    assert result.output.splitlines() == [
        "dataset d1 is ready: Normal 240, Tumor 25",
        "  warning  Normal has ten times as many scans as Tumor.",
    ]
