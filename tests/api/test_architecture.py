"""The house rules of the API, as tests."""

import mimetypes
import subprocess
import sys
import uuid
from itertools import product
from pathlib import Path

from flask import Flask
from flask.testing import FlaskClient
from schemathesis.specs.openapi.definitions import OPENAPI_31_VALIDATOR

from api import create_app
from api.http import auth
from api.http.context import EXTENSION
from jobs.db import Sessions
from jobs.keys import Scope
from jobs.settings import Settings
from tests.api.conftest import Door
from tests.applications import bind

HEAVY = ("torch", "torchvision", "celery", "redis", "mlflow", "numpy", "openvino", "pydicom", "nibabel", "pandas")
OPEN_TO_ALL = {
    "health.live", "health.ready", "older.health", "pages.first_page", "problems.get_problem_type", "static",
    "api-docs.openapi_json", "docs.page", "docs.file",
}  # fmt: skip

OPEN_OBJECTS = {
    "Job.params", "Job.metrics", "Metrics.final", "Result.output", "Event.data", "CheckedDataset.report",
    "Model.params", "Model.metrics", "Model.environment", "Comparison.differences",
}  # fmt: skip
"""What a pipeline defines, or an event of its kind."""


def test_importing_the_api_pulls_in_nothing_heavy() -> None:
    script = (
        "import sys; from api import create_app; assert 'flask' not in sys.modules; create_app();"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_endpoint_declares_who_may_use_it(app: Flask) -> None:
    declared = {endpoint: auth.access_of(app, endpoint) for endpoint in app.view_functions}
    assert {endpoint for endpoint, access in declared.items() if access == auth.PUBLIC} == OPEN_TO_ALL
    assert {access for endpoint, access in declared.items() if endpoint not in OPEN_TO_ALL} <= set(map(str, Scope))


def test_a_view_that_declares_nothing_is_refused_even_to_an_administrator(
    settings: Settings, sessions: Sessions
) -> None:
    app = create_app(settings)
    door = Door(app, sessions)
    app.add_url_rule("/forgotten", "forgotten", lambda: "secret")
    assert app.test_client().get("/forgotten").status_code == 401
    assert door.client().get("/forgotten").status_code == 403


def test_every_route_but_the_open_ones_refuses_a_request_without_a_key(app: Flask) -> None:
    stranger = app.test_client()
    for rule in app.url_map.iter_rules():
        if rule.endpoint in OPEN_TO_ALL:
            continue
        path = rule.rule
        for argument in rule.arguments:
            path = path.replace(next(part for part in path.split("/") if f":{argument}>" in part), str(uuid.uuid4()))
        for method, prefix in product((rule.methods or set()) - {"OPTIONS", "HEAD"}, ("", "/v1")):
            answer = stranger.open(prefix + path, method=method)
            assert (answer.status_code, answer.mimetype) == (401, "application/problem+json"), (method, prefix, path)
            assert answer.headers["WWW-Authenticate"].startswith("Bearer")


def test_the_openapi_document_is_valid_and_names_every_operation_once(client: FlaskClient) -> None:
    document = client.get("/openapi.json").get_json()
    OPENAPI_31_VALIDATOR.validate(document)
    assert document["openapi"].startswith("3.1")
    names = [
        operation["operationId"]
        for path in document["paths"].values()
        for operation in path.values()
        if isinstance(operation, dict) and "responses" in operation
    ]
    assert len(names) == len(set(names)) > 20
    assert document["security"] == [{"key": []}]
    assert document["servers"][0]["url"] == "/v1"
    root_only = [path for path, found in document["paths"].items() if any("servers" in one for one in found.values())]
    assert set(root_only) == {"/train", "/predict", "/batch_predict", "/explain", "/model-status", "/health"}
    assert set(document["paths"]["/jobs/predict"]["post"]["requestBody"]["content"]) == {
        "multipart/form-data",
        "application/json",
    }


def test_every_operation_with_a_body_says_what_it_refuses(client: FlaskClient) -> None:
    paths = client.get("/openapi.json").get_json()["paths"]
    with_body = [one for path in paths.values() for one in path.values() if "requestBody" in one]
    assert len(with_body) > 15
    for operation in with_body:
        assert "Accept-Encoding" in operation["responses"]["415"]["headers"]


def test_no_object_in_an_answer_is_without_fields(client: FlaskClient) -> None:
    schemas = client.get("/openapi.json").get_json()["components"]["schemas"]
    bare = {
        f"{name}.{field}"
        for name, schema in schemas.items()
        for field, found in schema.get("properties", {}).items()
        if "object" in found.get("type", ()) and not found.get("properties") and not found.get("additionalProperties")
    }
    assert bare == OPEN_OBJECTS
    assert set(schemas["Job"]["required"]) == set(schemas["Job"]["properties"]) > {"counts", "links", "warnings"}
    assert set(schemas["JobLinks"]["properties"]) == {
        "self", "events", "artifacts", "cancel", "retry", "metrics", "results", "studies", "summary", "reproduce",
        "mlflow",
    }  # fmt: skip


def test_artifacts_declare_what_they_are(client: FlaskClient) -> None:
    paths = client.get("/openapi.json").get_json()["paths"]
    content = paths["/jobs/{job_id}/artifacts/{name}"]["get"]["responses"]["200"]["content"]
    named = {mimetypes.guess_type(name)[0] for name in ("a.html", "a.pdf", "a.png", "a.json", "a.csv")}
    assert named | {"application/octet-stream", "*/*"} <= set(content)


def test_the_documentation_page_asks_no_other_host_for_anything(client: FlaskClient) -> None:
    page = client.get("/docs/").get_data(as_text=True)
    assert "http://" not in page.replace("http://localhost", "")
    assert "https://" not in page
    assert client.get("/docs/swagger-ui-bundle.js").status_code == 200


def test_an_application_that_is_bound_to_other_settings_is_as_one_that_is_made_with_them(
    settings: Settings, sessions: Sessions, tmp_path: Path
) -> None:
    """What lets all tests share one application (`tests/applications.py`)."""
    other = settings.model_copy(update={"home": tmp_path / "other", "max_upload_bytes": 77, "wait_slots": 3})
    made, bound = create_app(other), create_app(settings)
    bind(bound, other, sessions)
    assert bound.config == made.config
    one, another = made.extensions.pop(EXTENSION), bound.extensions.pop(EXTENSION)
    assert one.settings == another.settings
    assert vars(one.blobs) == vars(another.blobs)
    assert one.listener._slots == another.listener._slots
    assert made.extensions.keys() == bound.extensions.keys()
