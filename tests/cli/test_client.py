"""The client's own work: bodies that stream from disk, refusals as one line, where key and address come from."""

from __future__ import annotations

import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import requests
from click import BadParameter
from werkzeug.formparser import parse_form_data

from cli.client import ApiError, Client, MultipartUpload, default_key, default_url
from cli.client.transport import problem_line
from cli.commands.jobs import find_scans, parse_params
from cli.stack.server_plan import free_port


def received(upload: MultipartUpload) -> tuple[dict[str, str], list[tuple[str, str, bytes]]]:
    """What a server reads from the body: fields, and files as (field, name, bytes)."""
    body = b"".join(upload)
    assert len(upload) == len(body), "Content-Length must be the body's"
    environ = {
        "REQUEST_METHOD": "POST",
        "CONTENT_TYPE": upload.content_type,
        "CONTENT_LENGTH": str(len(upload)),
        "wsgi.input": io.BytesIO(body),
    }
    _, form, files = parse_form_data(environ)
    listed = [(field, str(file.filename), file.read()) for field, file in files.items(multi=True)]
    return form.to_dict(), listed


def test_an_upload_carries_fields_and_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\r\n--not a boundary\r\n")
    (tmp_path / "b.dcm").write_bytes(bytes(range(256)) * 9000)
    form, files = received(MultipartUpload("files", [tmp_path / "a.png", tmp_path / "b.dcm"], {"model": "champion"}))
    assert form == {"model": "champion"}
    assert [(field, name) for field, name, _ in files] == [("files", "a.png"), ("files", "b.dcm")]
    assert [len(data) for _, _, data in files] == [20, 256 * 9000]


def test_a_hostile_file_name_cannot_break_out_of_its_header(tmp_path: Path) -> None:
    hostile = tmp_path / 'x"\r\nX-Evil: 1.png'
    hostile.write_bytes(b"1")
    _, files = received(MultipartUpload("file", [hostile]))
    assert [(field, data) for field, _, data in files] == [("file", b"1")]


def test_problem_line_names_the_pointers_of_a_problem() -> None:
    answer = requests.Response()
    answer.status_code, answer.reason = 422, "Unprocessable Content"
    answer._content = (
        b'{"title": "Invalid request", "status": 422, "detail": "One field is wrong.", "request_id": "r1",'
        b' "errors": [{"pointer": "/params/epochs", "detail": "Must be at least 1."}]}'
    )
    assert problem_line(answer) == (
        "422 Invalid request: One field is wrong. [/params/epochs: Must be at least 1.] (request r1)"
    )


def test_problem_line_names_the_reasons_of_a_refusal() -> None:
    answer = requests.Response()
    answer.status_code, answer.reason = 409, "Conflict"
    answer._content = b'{"title": "Conflict", "detail": "Refused.", "reasons": ["F1 0.9 < 0.97.", "Leaks."]}'
    assert problem_line(answer) == "409 Conflict: Refused. [F1 0.9 < 0.97.; Leaks.]"


def test_problem_line_of_a_response_without_json_is_one_line() -> None:
    answer = requests.Response()
    answer.status_code, answer.reason, answer._content = 502, "Bad Gateway", b"<html>"
    assert problem_line(answer) == "502 Bad Gateway: <html>"


def test_connection_error_says_how_to_start_a_server() -> None:
    with pytest.raises(ApiError, match="renalq up"):
        Client(f"http://127.0.0.1:{free_port()}", "rq_x").call("GET", "/jobs")


def test_key_and_address_come_from_the_environment_else_from_the_local_stack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RENALQ_HOME", str(tmp_path))
    monkeypatch.setenv("RENALQ_PORT", "8123")
    monkeypatch.delenv("RENALQ_KEY", raising=False)
    monkeypatch.delenv("RENALQ_URL", raising=False)
    with pytest.raises(ApiError, match="RENALQ_KEY"):
        default_key()
    (tmp_path / "admin.key").write_text("rq_local\n")
    assert (default_key(), default_url()) == ("rq_local", "http://127.0.0.1:8123")
    monkeypatch.setenv("RENALQ_KEY", "rq_given")
    monkeypatch.setenv("RENALQ_URL", "https://renalq.example")
    assert (default_key(), default_url()) == ("rq_given", "https://renalq.example")


def test_params_are_parsed_as_json_or_else_text() -> None:
    pairs = ("epochs=5", "weights=none", "augmentation=false", "image_size=[224,224,3]", "learning_rate=1e-2")
    assert parse_params(pairs) == {
        "epochs": 5,
        "weights": "none",
        "augmentation": False,
        "image_size": [224, 224, 3],
        "learning_rate": 0.01,
    }


def test_a_param_without_a_value_is_refused() -> None:
    with pytest.raises(BadParameter, match="NAME=VALUE"):
        parse_params(("epochs",))


def test_find_scans_of_a_folder_returns_its_images_in_order(tmp_path: Path) -> None:
    for name in ("b.dcm", "a.png", "notes.txt", "IM0001"):
        (tmp_path / name).touch()
    assert [file.name for file in find_scans([tmp_path])] == ["IM0001", "a.png", "b.dcm"]


class Moody(BaseHTTPRequestHandler):
    """Answers 503, then breaks the connection, then is still at it, and at last says yes; notes what it is asked."""

    asked: ClassVar[list[tuple[str, str | None, bytes]]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append((self.path, self.headers["Idempotency-Key"], body))
        if len(self.asked) == 1:
            self._answer(503, {"title": "Unavailable"}, {"Retry-After": "0"})
        elif len(self.asked) == 2:
            self.close_connection = True
        elif len(self.asked) == 3:
            self._answer(409, {"code": "IDEMPOTENCY_IN_FLIGHT"}, {"Retry-After": "0"})
        else:
            self._answer(202, {"id": "42"}, {})

    def _answer(self, status: int, body: dict[str, str], headers: dict[str, str]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def test_a_post_is_sent_again_with_the_same_key_and_body_until_it_is_answered(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"pixels")
    with ThreadingHTTPServer(("127.0.0.1", 0), Moody) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = Client(f"http://127.0.0.1:{server.server_port}", "rq_key")
        assert client.post_files("/scans", MultipartUpload("file", [tmp_path / "a.png"])) == {"id": "42"}
        server.shutdown()
    assert len(Moody.asked) == 4
    assert len(set(Moody.asked)) == 1, "key and body are the same each time"
    assert Moody.asked[0][1]
    assert b"pixels" in Moody.asked[0][2]
