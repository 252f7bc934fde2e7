"""Commands against an API that answers what the test says, and notes what it is asked."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cli.__main__ import main
from cli.commands.jobs import reproduction_lines

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

MODEL = {
    "version": "3", "champion": True, "classes": ["Normal", "Tumor"], "network": "vgg16", "head": "vgg",
    "weights_sha256": hashlib.sha256(b"weights").hexdigest(), "metrics": {"f1": 0.95, "held_out": 93},
    "gate": {"promoted": True, "reasons": ["F1 0.9500 ≥ the champion's 0.9400."]}, "created_at": "2026-01-01T00:00:00Z",
}  # fmt: skip


class Api(ThreadingHTTPServer):
    """Answers each method and path with what it was given: bytes as they are, all else as JSON."""

    def __init__(self, answers: dict[str, Any]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers, self.asked = answers, dict[str, Any]()


class _Handler(BaseHTTPRequestHandler):
    server: Api

    def _answer(self) -> None:
        asked = f"{self.command} {self.path.removeprefix('/v1')}"
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked[asked] = json.loads(body) if body else None
        told = self.server.answers[asked]
        content = told if isinstance(told, bytes) else json.dumps(told).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PATCH(self) -> None:
        self._answer()

    def do_DELETE(self) -> None:
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


def test_options_that_are_not_given_are_not_sent(ask: Ask) -> None:
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


def test_a_reproduction_without_watch_prints_only_the_new_job(ask: Ask) -> None:
    queued = {**JOB, "state": "queued", "terminal": False, "reproduction": None}
    result, asked = ask({"POST /jobs/j1/reproduce": queued}, "jobs", "reproduce", "j1", "--no-watch")
    assert result.exit_code == 0
    assert "queued" in result.output
    assert list(asked) == ["POST /jobs/j1/reproduce"]


def test_a_reproduction_that_differs_lists_each_figure() -> None:
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


# --- models ---


@pytest.mark.parametrize("words", [["models"], ["models", "list"]])
def test_models_without_a_subcommand_lists_versions(ask: Ask, words: list[str]) -> None:
    page = {"data": [MODEL], "has_more": False, "next": None}
    result, _ = ask({"GET /models?limit=100": page}, *words)
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[1].split() == ["3", "champion", "0.950", "2026-01-01T00:00:00Z"]
    result, _ = ask({"GET /models?limit=100": page}, *words, "--json")
    assert json.loads(result.output) == [MODEL]


def test_a_model_shows_its_figures_and_the_gates_verdict(ask: Ask) -> None:
    result, _ = ask({"GET /models/champion": MODEL}, "models", "show", "champion")
    assert result.output.splitlines() == [
        "version 3, the champion: Normal, Tumor",
        "  network  vgg16, head vgg",
        f"  weights  {MODEL['weights_sha256']}",
        "  f1       0.9500",
        "  gate     F1 0.9500 ≥ the champion's 0.9400.",
    ]


SHARE = {"value": 0.96, "low": 0.85, "high": 0.99, "groups": 24}
POINT = {
    "rule": "sensitivity", "wanted": 0.95, "threshold": 0.31, "sensitivity": SHARE, "specificity": SHARE, "scans": 48,
    "chosen_on": "validation", "best_f1": 0.5, "changes": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("words", "operate_at"),
    [
        (["sensitivity", "0.95"], {"sensitivity": 0.95}),
        (["specificity", "1"], {"specificity": 1.0}),
        (["threshold", "0.3"], {"threshold": 0.3}),
        (["f1"], "f1"),
    ],
)
def test_an_operating_point_is_set_by_a_rule_and_shown(ask: Ask, words: list[str], operate_at: Any) -> None:
    command = ["models", "operate", "champion", *words, "--reason", "To see."]
    result, asked = ask({"PATCH /models/champion": {**MODEL, "operating_point": POINT}}, *command)
    assert result.exit_code == 0, result.output
    assert asked == {"PATCH /models/champion": {"operate_at": operate_at, "reason": "To see."}}
    assert "Threshold 0.310, the highest with a sensitivity of 0.95. On 48 validation scans" in result.output


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["sensitivity", "--reason", "x"], "sensitivity needs a number: sensitivity 0.95"),
        (["f1", "0.9", "--reason", "x"], "f1 takes no number."),
        (["recall", "0.9", "--reason", "x"], "'recall' is not one of"),
        (["threshold", "1.2", "--reason", "x"], "not in the range"),
        (["threshold", "0.2"], "Missing option '--reason'"),
    ],
)
def test_an_operating_point_that_is_none_is_not_sent(ask: Ask, words: list[str], told: str) -> None:
    result, asked = ask({}, "models", "operate", "3", *words)
    assert (result.exit_code, asked) == (2, {})
    assert told in result.output


def test_a_promotion_and_a_rollback_say_who_is_champion_now(ask: Ask) -> None:
    words = ["models", "promote", "3", "--force", "--reason", "To see."]
    result, asked = ask({"POST /models/3/promote": MODEL}, *words)
    assert (result.exit_code, result.output) == (0, "version 3 is champion\n")
    assert asked == {"POST /models/3/promote": {"force": True, "reason": "To see."}}
    result, asked = ask({"POST /models/rollback": MODEL}, "models", "rollback")
    assert (result.output, asked) == ("version 3 is champion\n", {"POST /models/rollback": {"reason": None}})


def test_the_changes_of_the_champion_are_a_table(ask: Ask) -> None:
    row = {"at": "2026-01-01T00:00:00Z", "version": "2", "replaced": None, "how": "gate", "reason": None}
    result, _ = ask({"GET /models/promotions?limit=20": {"data": [row]}}, "models", "promotions")
    assert result.output.splitlines()[1].split() == ["2026-01-01T00:00:00Z", "2", "–", "gate", "–"]


def test_two_models_compare_figure_by_figure_and_by_what_differs(ask: Ask) -> None:
    found = {
        "a": MODEL, "b": {**MODEL, "version": "4"}, "note": "On the same 93.", "metrics": {"f1": [0.95, None]},
        "differences": {"params": {"seed": [7, 8]}, "environment": {}, "dataset": ["d1", "d2"]},
    }  # fmt: skip
    result, _ = ask({"GET /models/compare?a=champion&b=4": found}, "models", "compare", "champion", "4")
    assert [line.split() for line in result.output.splitlines()] == [
        ["On", "the", "same", "93."],
        ["version", "3", "version", "4"],
        ["f1", "0.9500", "–"],
        ["seed", "7", "8"],
        ["dataset", "d1", "d2"],
    ]


def test_a_card_is_markdown_and_json_for_machines(ask: Ask) -> None:
    result, _ = ask({"GET /models/3/card": "# Größe\n".encode()}, "models", "card", "3")
    assert result.output == "# Größe\n"
    result, _ = ask({"GET /models/3/card": {"title": "x"}}, "models", "card", "3", "--json")
    assert json.loads(result.output) == {"title": "x"}


def test_weights_are_downloaded_whole_or_not_at_all(ask: Ask, tmp_path: Path) -> None:
    file = tmp_path / "net.safetensors"
    answers = {"GET /models/champion": MODEL, "GET /models/3/weights": b"weights"}
    result, _ = ask(answers, "models", "download", "champion", str(file))
    assert (result.exit_code, file.read_bytes()) == (0, b"weights")
    result, _ = ask({**answers, "GET /models/3/weights": b"other"}, "models", "download", "champion", str(file))
    assert result.exit_code == 1
    assert "SHA-256" in result.output
    assert file.read_bytes() == b"weights"
    assert list(tmp_path.iterdir()) == [file]


def test_the_version_is_that_of_the_package() -> None:
    assert CliRunner().invoke(main, ["--version"]).output == f"renalq, version {version('renalq')}\n"


@pytest.mark.parametrize("command", ["status", "logs", "down"])
def test_without_a_stack_the_commands_say_so(tmp_path: Path, command: str) -> None:
    shown = CliRunner().invoke(main, [command], env={"RENALQ_HOME": str(tmp_path / "none")})
    assert re.search(f"(No stack runs|There are no logs) in {tmp_path}", shown.output)
    assert shown.exit_code == (0 if command == "down" else 1)


def test_down_waits_for_what_a_killed_stack_has_left(tmp_path: Path) -> None:
    lock = tmp_path / "stack.lock"
    code = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print(flush=True); time.sleep(1)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE) as reaper:
        assert reaper.stdout is not None
        reaper.stdout.readline()
        shown = CliRunner().invoke(main, ["down"], env={"RENALQ_HOME": str(tmp_path)})
        assert (shown.exit_code, "has stopped" in shown.output) == (0, True)
        assert reaper.wait(5) == 0, "it was not killed, and has ended"


RECEIPT = {
    "id": "r1", "kind": "job", "target": "j2", "state": "deleting", "counts": {"results": 12, "scans": 3},
    "left": {"files": 3, "mlflow_runs": 0}, "created_at": "2026-01-01T00:00:00Z",
}  # fmt: skip


def test_a_deletion_asks_first(ask: Ask) -> None:
    result, asked = ask({}, "delete", "job", "j2")
    assert (result.exit_code, asked) == (1, {})
    assert "cannot be undone" in result.output


def test_a_deletion_prints_what_went_and_what_is_left(ask: Ask) -> None:
    result, asked = ask({"DELETE /jobs/j2?scans=keep": RECEIPT}, "delete", "job", "j2", "--keep-scans", "--yes")
    assert result.exit_code == 0, result.output
    assert list(asked) == ["DELETE /jobs/j2?scans=keep"]
    lines = [" ".join(line.split()) for line in result.output.splitlines()]
    assert lines == ["job j2 is deleting: receipt r1", "12 results", "3 scans", "3 files left"]


def test_a_deletion_is_waited_for(ask: Ask) -> None:
    done = {**RECEIPT, "state": "deleted", "left": {"files": 0, "mlflow_runs": 0}}
    answers = {"DELETE /models/3": {**RECEIPT, "kind": "model"}, "GET /deletions/r1": done}
    result, _ = ask(answers, "delete", "model", "3", "--yes", "--wait")
    assert "is deleted" in result.output


def test_receipts_are_listed(ask: Ask) -> None:
    result, _ = ask({"GET /deletions?limit=20": {"data": [RECEIPT]}}, "deletions")
    assert result.output.splitlines()[1].split() == ["r1", "job", "j2", "deleting", "2026-01-01T00:00:00Z"]
