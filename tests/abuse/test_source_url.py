"""`source_url` reaches no host that the operator has not named, keeps no password, and tells nothing of the network."""

import json
import socket

import pytest
from flask.testing import FlaskClient
from sqlalchemy import select

from jobs.db import Sessions
from jobs.settings import Settings
from jobs.tables import Job
from tests.api.test_errors import assert_problem

TRAININGS = ("/v1/jobs/train", "/v1/jobs", "/train")
INSIDE = (
    "http://127.0.0.1:{open}/", "http://127.0.0.1:{closed}/", "http://localhost:{open}/", "http://[::1]:{open}/",
    "http://169.254.169.254/latest/meta-data/", "http://10.0.0.1/", "http://example.org.evil.example/", "http://2130706433/",
    "https://example.org:6379/", "http://example.org:{open}/",
)  # fmt: skip


def refusal(client: FlaskClient, path: str, url: str) -> dict[str, object]:
    """The answer to a training on this address, without what differs each time."""
    kind = {"kind": "train"} if path.endswith("/jobs") else {}
    problem = assert_problem(client.post(path, json={"source_url": url, **kind}), 422, "INVALID")
    return {name: value for name, value in problem.items() if name not in ("instance", "request_id")}


@pytest.mark.parametrize("path", TRAININGS)
def test_hosts_that_are_not_named_get_one_answer_and_no_visit(
    client: FlaskClient, sessions: Sessions, settings: Settings, path: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("127.0.0.1", 0)) as gone:
        ports = {"open": server.getsockname()[1], "closed": gone.getsockname()[1]}
        gone.close()
        told = [json.dumps(refusal(client, path, url.format(**ports))) for url in INSIDE]
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert len(set(told)) == 1
    assert "RENALQ_FETCH_HOSTS" in told[0]
    with sessions.begin() as session:
        assert session.scalar(select(Job)) is None


@pytest.mark.parametrize("url", ["https://erika:Canary@example.org/ct.zip", "https://Canary@example.org/ct.zip"])
def test_a_password_in_an_address_is_neither_kept_nor_shown(client: FlaskClient, sessions: Sessions, url: str) -> None:
    for path in TRAININGS:
        assert "Canary" not in json.dumps(refusal(client, path, url))
    with sessions.begin() as session:
        assert session.scalar(select(Job)) is None


def test_an_address_is_in_no_answer(client: FlaskClient) -> None:
    """It may hold a token, such as that of a signed address."""
    url = "https://example.org/ct.zip?signature=Canary"
    answer = client.post("/v1/jobs/train", json={"source_url": url})
    assert answer.status_code == 202
    shown = [answer, client.get(answer.headers["Location"]), client.get("/v1/jobs"),
             client.get(f"{answer.headers['Location']}/events?follow=false")]  # fmt: skip
    assert [one for one in shown if b"Canary" in one.data] == []
