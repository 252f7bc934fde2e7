"""`/v1` and the paths without it: the same operations, and addresses that begin as the request's path did."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from jobs.db import Sessions
from jobs.settings import Settings
from jobs.tables import ModelVersion
from tests.api.conftest import file, png, zipped
from tests.api.test_errors import assert_problem
from tests.api.test_explanations import HEATMAP, OVERLAY, Batch

TRAIN = {"source_url": "https://example.org/ct.zip"}
ADDRESS = re.compile(r"(/v1)?/(jobs|models|datasets|scans|uploads|keys|webhooks|docs|openapi)\b")
OLDER = [
    ("POST", "/train"), ("POST", "/predict"), ("POST", "/batch_predict"), ("POST", "/explain"),
    ("GET", "/model-status"), ("GET", "/health"),
]  # fmt: skip
TUS = {"Tus-Resumable": "1.0.0", "Upload-Length": "5"}


def strings(value: Any) -> Iterator[str]:
    """All strings in a JSON value."""
    if isinstance(value, dict | list):
        for below in value.values() if isinstance(value, dict) else value:
            yield from strings(below)
    elif isinstance(value, str):
        yield value


def addresses(answer: TestResponse) -> list[str]:
    """All addresses of resources in an answer."""
    assert answer.status_code < 300, answer.get_data(as_text=True)
    found = [answer.headers.get("Location", ""), *strings(answer.get_json(silent=True))]
    found += re.findall(r'"(/[^"]+)"', answer.get_data(as_text=True))  # NDJSON
    return [text for text in found if ADDRESS.match(text)]


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_every_address_in_an_answer_begins_as_the_path_of_the_request(
    client: FlaskClient, sessions: Sessions, settings: Settings, champion: ModelVersion, prefix: str
) -> None:
    batch = Batch(sessions, settings, champion, True)
    batch.explained((0, OVERLAY, None), (0, HEATMAP, None))
    batch.end()
    job = f"{prefix}/jobs/{batch.job.id}"
    answers = [
        client.post(f"{prefix}/jobs", json={"kind": "train", **TRAIN}),
        client.post(f"{prefix}/jobs/train", json=TRAIN),
        client.post(f"{prefix}/jobs/predict", data={"file": file(png())}),
        client.get(job),
        client.get(f"{prefix}/jobs"),
        client.get(f"{job}/results"),
        client.get(f"{job}/results", headers={"Accept": "application/x-ndjson"}),
        client.get(f"{job}/artifacts"),
        client.post(f"{prefix}/datasets", data={"file": file(zipped({"Normal/a.png": png()}), "a.zip")}),
        client.post(f"{prefix}/scans", data={"file": file(png(9))}),
        client.post(f"{prefix}/uploads", headers=TUS),
        client.get(f"{prefix}/models"),
        client.get(f"{prefix}/models/promotions"),
        client.post(f"{prefix}/keys", json={"name": "a", "scopes": ["jobs:read"]}),
        client.post(f"{prefix}/webhooks", json={"url": "https://example.org/hook"}),
        client.get(f"{prefix}/", headers={"Accept": "application/json"}),
    ]
    for answer in answers:
        found = addresses(answer)
        assert found, answer.request.path
        assert {bool(ADDRESS.match(address)[1]) for address in found} == {bool(prefix)}, found  # type: ignore[index]
        if location := answer.headers.get("Location"):
            method = "HEAD" if "uploads" in location else "GET"
            assert client.open(location, method=method, headers=TUS).status_code == 200, "Location leads somewhere"


def test_a_key_means_the_same_request_by_either_path(client: FlaskClient) -> None:
    key = {"Idempotency-Key": "one"}
    first = client.post("/jobs/train", json=TRAIN, headers=key)
    again = client.post("/v1/jobs/train", json=TRAIN, headers=key)
    assert (again.data, again.headers["Location"]) == (first.data, first.headers["Location"])
    assert again.headers["Idempotent-Replayed"] == again.headers["Idempotency-Replayed"] == "true"


@pytest.mark.parametrize(("method", "path"), OLDER)
def test_calls_of_older_clients_are_at_the_root_alone_and_deprecated(
    client: FlaskClient, method: str, path: str
) -> None:
    assert_problem(client.open(f"/v1{path}", method=method, json={}), 404)
    answer = client.open(path, method=method, json={})
    assert re.fullmatch(r"@\d{10}", answer.headers["Deprecation"])
    assert 'rel="deprecation"' in answer.headers["Link"]


def test_only_whole_steps_of_a_path_are_a_prefix(client: FlaskClient) -> None:
    for path in ("/v1jobs", "/v2/jobs", "/v1/v1/jobs"):
        assert_problem(client.get(path), 404)
    assert client.get("/v1").headers["Location"].endswith("/v1/")


def test_the_index_under_the_prefix_names_no_call_of_older_clients(app: Flask) -> None:
    told = app.test_client().get("/v1/", headers={"Accept": "application/json"}).get_json()["endpoints"]
    assert "POST /v1/jobs" in told
    assert not {f"{method} /v1{path}" for method, path in OLDER} & set(told)
