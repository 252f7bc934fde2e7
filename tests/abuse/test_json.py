"""JSON costs no more than it is worth: counted before it becomes objects, on disk where it is a scan."""

import base64
import gc
import gzip
import hashlib
import io
import json
import re
from typing import Any

import pytest
from flask.testing import FlaskClient
from hypothesis import given
from hypothesis import strategies as st

from api.http.body.json_text import LONG_STRING, MAX_DEPTH, MAX_VALUES, TEXT_BYTES, LongString, parse, parse_file
from api.http.body.large_bodies import MOST_WAITING, OF_ONE_TENANT, LargeBodies, ServerBusy
from api.http.body.multipart import MANY_PARTS
from api.http.body.spool import JSON_BYTES, SMALL_BYTES, TURNS
from jobs import keys
from jobs.db import Sessions
from jobs.errors import Invalid, MalformedBody, TooLarge
from tests.abuse.flood import flood
from tests.api.conftest import Server, png
from tests.api.test_errors import assert_problem
from tests.builders import TENANT
from tests.processes import eventually

SCAN = png(500, 500) + bytes(range(256)) * 400
"""Larger than what stays in memory, and with all letters of base64."""


def whole(value: Any) -> Any:
    """With each long string in place of what stands for it."""
    if isinstance(value, LongString):
        return "".join(value.pieces())
    if isinstance(value, dict):
        return {key: whole(one) for key, one in value.items()}
    return [whole(one) for one in value] if isinstance(value, list) else value


LONGER = "A" * (LONG_STRING + 1)
LETTERS = st.sampled_from(list('"\\/\naéuN'))
LONG = st.builds(lambda text, times: text * times, st.text(LETTERS, min_size=1, max_size=9), st.integers(1, 9000))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | LONG,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(LETTERS, max_size=9), inner, max_size=4),
    max_leaves=8,
)


@given(VALUES)
def test_what_is_read_from_disk_is_what_json_reads(value: Any) -> None:
    text = json.dumps(value).encode()
    assert whole(parse_file(io.BytesIO(text), io.BytesIO)) == value
    assert parse(text) == value


@pytest.mark.parametrize(
    "value", [{"image": LONGER}, {"a": "b", "c": [1, LONGER, LONGER], "d": ""}, [LONGER + "é\\"], LONGER]
)
def test_every_long_string_stays_on_disk(value: Any) -> None:
    found = parse_file(io.BytesIO(json.dumps(value).encode()), io.BytesIO)
    assert not re.search("A{99}", repr(found))
    assert whole(found) == value


@given(st.text(st.sampled_from(list('[]{}",:\\ 1aN')), max_size=40), st.integers(0, 2))
def test_what_json_refuses_is_refused(text: str, long_strings: int) -> None:
    body = text.replace("a", '"' + "a" * (LONG_STRING + 1) + '"', long_strings).encode()
    try:
        expected = json.loads(body, parse_constant=lambda _: pytest.fail("a constant"))
    except (ValueError, pytest.fail.Exception):
        with pytest.raises((MalformedBody, Invalid)):
            parse_file(io.BytesIO(body), io.BytesIO)
    else:
        assert whole(parse_file(io.BytesIO(body), io.BytesIO)) == expected


@pytest.mark.parametrize("read", [parse, lambda text: parse_file(io.BytesIO(text), io.BytesIO)], ids=["text", "file"])
def test_values_and_depth_are_bounded(read: Any) -> None:
    most = b"[" + b"1," * (MAX_VALUES - 1) + b"1]"
    assert len(read(most)) == MAX_VALUES
    deepest = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH
    assert read(deepest)
    quoted = ["[{," * 4000] * 3
    assert read(json.dumps(quoted).encode()) == quoted, "brackets in strings do not count"
    for text in (b"[1," + most[1:], b"[" * MAX_VALUES, b'{"a":' * MAX_VALUES, b'[""' * MAX_VALUES):
        with pytest.raises((TooLarge, Invalid)):
            read(text)
    with pytest.raises((TooLarge, Invalid)):
        read(('["∀",' + "[]," * MAX_VALUES + '"∀"]').encode("utf-16-le"))


def test_beside_scans_little_is_held_in_memory() -> None:
    with pytest.raises(TooLarge):
        parse_file(io.BytesIO(b'{"images":[' + b'"%b",' % (b"A" * 9000) * 300), io.BytesIO)
    with pytest.raises(TooLarge):
        parse_file(io.BytesIO(b" " * (TEXT_BYTES + LONG_STRING)), io.BytesIO)


WRITTEN = {
    "as it is": lambda text: text,
    "as PHP writes it": lambda text: text.replace("/", "\\/"),
    "with all letters escaped": lambda text: "".join(f"\\u{ord(letter):04x}" for letter in text),
    "in lines": lambda text: "\\r\\n".join(text[at : at + 76] for at in range(0, len(text), 76)),
    "as a data URL": lambda text: "data:image/png;base64," + text.replace("+", "%2B").replace("=", "%3D"),
    "without padding, between spaces": lambda text: (
        f" {text.rstrip('=')} \\n" if len(text.rstrip("=")) % 4 == 0 else text
    ),
}
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-32-be")


@pytest.mark.parametrize("form", WRITTEN)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_large_scan_in_json_is_stored_as_it_was(client: FlaskClient, form: str, encoding: str) -> None:
    text = '{"image": "' + WRITTEN[form](base64.b64encode(SCAN).decode()) + '", "pipeline": "image"}'
    answer = client.post("/v1/scans", data=text.encode(encoding), content_type="application/json")
    assert answer.get_json()["sha256"] == hashlib.sha256(SCAN).hexdigest(), answer.get_data()


def test_a_long_text_where_no_scan_belongs_is_refused(client: FlaskClient) -> None:
    body = {"pipeline": "A" * (SMALL_BYTES + LONG_STRING), "image": base64.b64encode(SCAN).decode()}
    (error,) = assert_problem(client.post("/v1/scans", json=body), 422)["errors"]
    assert error["pointer"] == "/pipeline"


def test_a_mebibyte_is_enough_where_no_scans_come(client: FlaskClient) -> None:
    for path in ("/v1/jobs/train", "/v1/scans/known", "/v1/jobs/predict/batch", "/v1/webhooks", "/v1/keys"):
        answer = client.post(path, data=b" " * (JSON_BYTES + 1), content_type="application/json")
        assert str(JSON_BYTES) in assert_problem(answer, 413, "TOO_LARGE")["detail"], path
    ids = ["01a1fa6e-f03d-7721-8a01-cea4209be2a8"] * 10_000
    body = {"scan_ids": ids, "custom_ids": [f"{number:050}" for number in range(10_000)]}
    assert_problem(client.post("/v1/jobs/predict/batch", json=body), 409, "NO_CHAMPION")


def test_an_answer_has_twenty_errors_of_bounded_size(client: FlaskClient) -> None:
    fields = {f"{'k' * 3000}{number}": 1 for number in range(200)}
    labels = {"metadata": {"k" * 300_000: [float("inf")] * 9000}}
    for body, least in ((fields, 20), (labels, 20), ({"metadata": {str(n): [] for n in range(51)}}, 1)):
        text = json.dumps(body).replace("Infinity", "1e999")
        answer = client.post("/v1/jobs/train", data=text, content_type="application/json")
        problem = assert_problem(answer, 422)
        assert least <= len(problem["errors"]) <= 20
        assert len(answer.get_data()) < 20_000
        assert ("more" in problem["detail"]) == (least == 20)


@pytest.mark.parametrize(("path", "field"), [("/v1/jobs/predict/batch", "scan_ids"), ("/v1/scans/known", "sha256")])
def test_the_length_of_a_list_is_checked_before_its_elements(client: FlaskClient, path: str, field: str) -> None:
    (error,) = assert_problem(client.post(path, json={field: ["x"] * 10_001}), 422)["errors"]
    assert error["pointer"] == f"/{field}"


def test_json_inside_a_form_has_the_same_bounds(client: FlaskClient) -> None:
    form = {"file": (io.BytesIO(png()), "a.png"), "metadata": "[" * 400_000}
    (error,) = assert_problem(client.post("/v1/jobs/predict", data=form), 422)["errors"]
    assert error["pointer"] == "/metadata"
    form = {"file": (io.BytesIO(png()), "a.png"), "metadata": "[" + "[]," * MAX_VALUES + "1]"}
    assert_problem(client.post("/v1/jobs/predict", data=form), 413, "TOO_LARGE")


def test_no_tenant_takes_all_turns_and_each_is_given_back(
    client: FlaskClient, stranger: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.http.body.large_bodies.WAIT_SECONDS", 0.1)
    large = {"data": b'{"sha256": [' + b" " * SMALL_BYTES + b"]}", "content_type": "application/json"}
    for _ in range(OF_ONE_TENANT):
        TURNS.enter(TENANT)
    answer = client.post("/v1/scans/known", **large)
    assert int(answer.headers["Retry-After"]) > 0
    assert_problem(answer, 503, "SERVER_BUSY")
    assert client.post("/v1/scans/known", json={"sha256": []}).status_code == 200, "small ones need no turn"
    assert stranger.post("/v1/scans/known", **large).status_code == 200
    for _ in range(OF_ONE_TENANT):
        TURNS.leave(TENANT)
    for _ in range(2 * OF_ONE_TENANT):
        assert client.post("/v1/scans/known", **large).status_code == 200


def test_few_wait_for_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = LargeBodies()
    turns._waiting[TENANT] = MOST_WAITING
    with pytest.raises(ServerBusy):
        turns.enter(TENANT)
    turns.enter("elsewhere")


@pytest.mark.full
def test_the_worst_bodies_take_no_memory_and_little_time_of_others(server: Server, sessions: Sessions) -> None:
    """For some seconds; `python -m tests.abuse.flood` does it for as long as one likes."""
    with sessions.begin() as session:
        attacker, other = (keys.create(session, "test", ["admin"], tenant).secret for tenant in (TENANT, "elsewhere"))
    found = flood(server.url, attacker, other, server.pid, 15, 4)
    print(found.text())
    statuses = {status for answers in found.answers.values() for status in answers}
    assert statuses <= {200, 400, 404, 413, 422, 503}, found.text()
    assert found.rise < 100, found.text()
    assert found.longest_answer < 20_000
    assert found.failed_polls == 0
    assert found.poll_ms(0.5) < 500, "measured: 30 ms on a quiet machine"


def test_packed_bodies_are_counted_unpacked(client: FlaskClient) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    packed = gzip.compress(b"[" * 31_000_000)
    assert_problem(client.post("/v1/scans", data=packed, headers=headers), 413, "TOO_LARGE")
    eventually(lambda: TURNS._held.total() == 0, 5)


def test_forms_of_many_parts_wait_for_their_turn(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.http.body.large_bodies.WAIT_SECONDS", 0.1)
    gc.collect()  # a request of a test before may hold a turn until its answer is collected
    eventually(lambda: TURNS._held.total() == 0, 5)
    for _ in range(OF_ONE_TENANT):
        TURNS.enter(TENANT)
    try:
        for number, status in ((MANY_PARTS - 1, 422), (MANY_PARTS, 503)):
            form = {"files": [(io.BytesIO(b"x"), "x") for _ in range(number - 1)], "colour": "red"}
            assert client.post("/v1/jobs/predict/batch", data=form).status_code == status
    finally:
        for _ in range(OF_ONE_TENANT):
            TURNS.leave(TENANT)
