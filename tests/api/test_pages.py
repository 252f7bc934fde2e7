"""The first page and its files, as a client without a browser sees them."""

import pytest
from flask import Flask
from flask.testing import FlaskClient

from api.resources import docs
from tests.api.test_errors import assert_problem

FILES = ["page.css", "page.js", "client.js", "scans.js", "card.js", "icon.svg"]


@pytest.fixture
def anybody(app: Flask) -> FlaskClient:
    """A client without a key."""
    return app.test_client()


@pytest.mark.parametrize("accept", ["text/html,application/xhtml+xml,*/*;q=0.8", "*/*", ""])
def test_the_first_page_is_html_for_browsers(anybody: FlaskClient, accept: str) -> None:
    answer = anybody.get("/", headers={"Accept": accept})
    assert (answer.status_code, answer.mimetype) == (200, "text/html")
    page = answer.get_data(as_text=True)
    assert "Not for diagnosis" in page
    assert "http://" not in page
    assert "https://" not in page
    assert not any(inline in page for inline in ("<style", "style=", "onclick", "javascript:"))
    policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'self'; img-src 'self' blob: data:;")
    assert "unsafe" not in policy


@pytest.mark.parametrize("path", ["/docs/", "/v1/docs/", "/problems/INVALID"])
def test_every_page_has_the_policy_of_the_first(anybody: FlaskClient, path: str) -> None:
    first, other = (anybody.get(one, headers={"Accept": "text/html"}) for one in ("/", path))
    assert other.mimetype == "text/html"
    names = ("Content-Security-Policy", "Referrer-Policy", "X-Frame-Options")
    assert [other.headers[name] for name in names] == [first.headers[name] for name in names]
    assert "<script>" not in other.get_data(as_text=True)


@pytest.mark.parametrize("path", ["/", "/docs", "/v1/docs", "/docs/", "/openapi.json", "/nothing"])
def test_no_answer_repeats_the_host_that_was_asked_for(anybody: FlaskClient, path: str) -> None:
    answer = anybody.get(path, headers={"Host": "evil.example"})
    assert "evil" not in answer.get_data(as_text=True) + str(answer.headers)


def test_the_documents_files_are_those_of_the_page_alone(anybody: FlaskClient) -> None:
    page = anybody.get("/docs/").get_data(as_text=True)
    assert all(name in page and anybody.get(f"/docs/{name}").status_code == 200 for name in docs.FILES)
    assert_problem(anybody.get("/docs/oauth2-redirect.html"), 404)


def test_who_prefers_json_is_told_what_this_is(anybody: FlaskClient) -> None:
    answer = anybody.get("/", headers={"Accept": "application/json"})
    told = answer.get_json()
    assert (told["name"], told["notice"]) == ("RenalQ", "Not for diagnosis.")
    assert {"POST /predict", "GET /health", "GET /jobs/{job_id}", "GET /"} <= set(told["endpoints"])
    assert "Accept" in answer.headers["Vary"]


@pytest.mark.parametrize("path", ["/", *(f"/static/{name}" for name in FILES)])
def test_page_and_files_come_once_and_are_asked_for_by_their_tag(anybody: FlaskClient, path: str) -> None:
    first = anybody.get(path)
    assert (first.status_code, first.headers["Cache-Control"]) == (200, "no-cache")
    again = anybody.get(path, headers={"If-None-Match": first.headers["ETag"]})
    assert (again.status_code, again.data) == (304, b"")


def test_every_file_that_the_page_names_is_here(anybody: FlaskClient) -> None:
    page = anybody.get("/").get_data(as_text=True)
    script = anybody.get("/static/page.js").get_data(as_text=True)
    assert all(f"/static/{name}" in page for name in ("page.css", "page.js", "icon.svg"))
    assert all(f'"./{name}"' in script for name in ("client.js", "scans.js", "card.js"))


@pytest.mark.parametrize("path", ["/static/nothing.js", "/static/../templates/page.html", "/static/%2e%2e/auth.py"])
def test_nothing_else_is_served(anybody: FlaskClient, path: str) -> None:
    assert_problem(anybody.get(path), 404)


def test_a_list_of_jobs_that_has_not_changed_is_304(client: FlaskClient) -> None:
    first = client.get("/jobs")
    assert client.get("/jobs", headers={"If-None-Match": first.headers["ETag"]}).status_code == 304
    client.post("/jobs/train", json={"source_url": "https://example.org/a.zip"})
    assert client.get("/jobs", headers={"If-None-Match": first.headers["ETag"]}).status_code == 200
