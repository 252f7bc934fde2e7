"""Keys: expiry, last use, rotation, pages, the operator's scope, and the command."""

import datetime as dt
import subprocess
import sys
import time

import pytest
from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy import func, select, update

from jobs import keys
from jobs.db import Sessions
from jobs.settings import Settings
from jobs.tables import ApiKey
from tests import builders
from tests.api.conftest import ALL_SCOPES, Door
from tests.api.test_errors import assert_problem

SOON = dt.timedelta(seconds=0.5)


def now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


def make(client: FlaskClient, **fields: object) -> dict:
    answer = client.post("/keys", json={"name": "bridge", "scopes": ["jobs:read"], **fields})
    assert answer.status_code == 201, answer.get_json()
    return answer.get_json()


def status(app: Flask, secret: str) -> int:
    return app.test_client().get("/jobs", headers={"Authorization": f"Bearer {secret}"}).status_code


def test_a_key_is_valid_until_it_expires(app: Flask, client: FlaskClient) -> None:
    made = make(client, expires_at=(now() + SOON).isoformat())
    assert (status(app, made["secret"]), made["expires_at"] is None) == (200, False)
    time.sleep(SOON.total_seconds())
    assert status(app, made["secret"]) == 401
    assert_problem(client.post(f"/keys/{made['id']}/rotate", json={}), 409, "KEY_ENDED")


@pytest.mark.parametrize("when", ["2020-01-01T00:00:00Z", "9999-12-31T23:59:59Z"])
def test_a_key_expires_in_the_future_that_somebody_will_see(client: FlaskClient, when: str) -> None:
    body = {"name": "bridge", "scopes": ["jobs:read"], "expires_at": when}
    problem = assert_problem(client.post("/keys", json=body), 422)
    assert problem["errors"][0]["pointer"] == "/expires_at"


def test_the_last_use_is_written_once_an_hour(app: Flask, client: FlaskClient, sessions: Sessions) -> None:
    made = make(client)
    assert made["last_used_at"] is None

    def used() -> str:
        assert status(app, made["secret"]) == 200
        return client.get(f"/keys/{made['id']}").get_json()["last_used_at"]

    first = used()
    assert used() == first
    with sessions.begin() as session:
        past = func.clock_timestamp() - dt.timedelta(hours=1.1)
        session.execute(update(ApiKey).where(ApiKey.hint == made["hint"]).values(last_used_at=past))
    assert used() > first


def test_no_request_waits_for_the_row_of_its_key(app: Flask, client: FlaskClient, sessions: Sessions) -> None:
    made = make(client)
    with sessions.begin() as session:
        session.execute(select(ApiKey).where(ApiKey.hint == made["hint"]).with_for_update())
        assert status(app, made["secret"]) == 200


def test_a_rotated_key_and_its_successor_are_both_valid_for_the_overlap(app: Flask, client: FlaskClient) -> None:
    old = make(client, expires_at=(now() + dt.timedelta(days=30)).isoformat())
    answer = client.post(f"/keys/{old['id']}/rotate", json={"overlap_hours": SOON.total_seconds() / 3600})
    new = answer.get_json()
    assert (answer.status_code, answer.headers["Location"]) == (201, f"/keys/{new['id']}")
    assert (new["name"], new["scopes"], new["replaces"]) == ("bridge", ["jobs:read"], old["id"])
    lifetime = dt.datetime.fromisoformat(new["expires_at"]) - now()
    assert dt.timedelta(days=29.9) < lifetime <= dt.timedelta(days=30), "as long as the old one was meant to live"
    assert (status(app, old["secret"]), status(app, new["secret"])) == (200, 200)
    time.sleep(SOON.total_seconds())
    assert (status(app, old["secret"]), status(app, new["secret"])) == (401, 200)


def test_the_overlap_makes_no_key_live_longer(client: FlaskClient) -> None:
    old = make(client, expires_at=(now() + dt.timedelta(hours=1)).isoformat())
    client.post(f"/keys/{old['id']}/rotate", json={"overlap_hours": 48})
    assert client.get(f"/keys/{old['id']}").get_json()["expires_at"] == old["expires_at"]


def test_a_revoked_key_has_no_successor(client: FlaskClient) -> None:
    made = make(client)
    client.delete(f"/keys/{made['id']}")
    assert_problem(client.post(f"/keys/{made['id']}/rotate", json={}), 409, "KEY_ENDED")


def test_an_administrator_of_a_tenant_makes_no_operator(client: FlaskClient, sessions: Sessions, door: Door) -> None:
    with sessions.begin() as session:
        theirs = str(keys.create(session, "theirs", ["operator", "jobs:read"], builders.TENANT).key.id)
    body = {"name": "mine", "scopes": ["jobs:read", "operator"]}
    assert "operator" in assert_problem(client.post("/keys", json=body), 403, "SCOPE_MISSING")["detail"]
    assert_problem(client.post(f"/keys/{theirs}/rotate", json={}), 403, "SCOPE_MISSING")
    operator = door.client(*ALL_SCOPES, "operator")
    assert operator.post("/keys", json=body).status_code == 201
    assert operator.post(f"/keys/{theirs}/rotate", json={}).status_code == 201


@pytest.mark.parametrize("path", ["/keys", "/webhooks"])
def test_keys_and_webhooks_come_in_pages_oldest_first(client: FlaskClient, path: str) -> None:
    bodies = {
        "/keys": {"name": "one", "scopes": ["jobs:read"]},
        "/webhooks": {"url": "https://example.org/hook"},
    }
    made = [client.post(path, json=bodies[path]).get_json()["id"] for _ in range(5)]
    found, after = [], ""
    while after is not None:
        page = client.get(f"{path}?limit=2{after and f'&after={after}'}").get_json()
        assert len(page["data"]) <= 2
        found += [one["id"] for one in page["data"]]
        after = page["next"]
    assert [one for one in found if one in made] == made
    assert len(found) == len(set(found))


# --- the command ---


def run(settings: Settings, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environ = {"RENALQ_DATABASE_URL": settings.database_url, "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-m", "jobs.keys", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environ)


@pytest.mark.parametrize(
    "arguments",
    [("--help",), ("-h",), (), ("name", "root"), ("--version",), ("name", "admin", "--days", "-1"), ("",)],
    ids=" ".join,
)
def test_only_a_name_and_known_scopes_make_a_key(
    settings: Settings, sessions: Sessions, arguments: tuple[str, ...]
) -> None:
    done = run(settings, *arguments)
    assert "rq_" not in done.stdout
    assert "usage" in done.stdout + done.stderr
    assert done.returncode == (0 if "-h" in " ".join(arguments) else 2)
    with sessions.begin() as session:
        assert session.scalar(select(func.count()).select_from(ApiKey)) == 0


def test_the_command_makes_a_key_of_a_tenant_that_expires(settings: Settings, sessions: Sessions) -> None:
    done = run(settings, "prometheus", "jobs:read", "operator", "--tenant", "radiology", "--days", "90")
    with sessions.begin() as session:
        found = keys.authenticate(session, done.stdout.strip())
        assert found is not None
        assert (found.tenant_id, found.scopes) == ("radiology", {"jobs:read", "operator"})
        lifetime = session.get_one(ApiKey, found.key_id).expires_at - now()
    assert dt.timedelta(days=89) < lifetime < dt.timedelta(days=91)
