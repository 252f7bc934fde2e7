"""The OpenAPI document against the application: no generated request finds an answer that it does not name."""

from collections import Counter
from contextlib import suppress

import pytest
import schemathesis
from flask import Flask
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi.checks import (
    allow_header_conformance,
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from api.http import waiting
from tests.api.conftest import Door
from tests.depth import depth

pytestmark = [pytest.mark.slow, pytest.mark.scaled]
schemathesis.serializer.alias("application/offset+octet-stream", "application/octet-stream")
CHECKS = [
    allow_header_conformance,
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
]


def servers(operation: APIOperation) -> list[str]:
    """The prefixes of the operation's path: its own, or those of the whole document."""
    declared = operation.definition.raw.get("servers") or operation.schema.raw_schema["servers"]
    return [server["url"].rstrip("/") for server in declared]


@pytest.fixture(autouse=True)
def _short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The words of the code hold a valid picture, and no worker runs here."""
    monkeypatch.setattr(waiting, "MAX_WAIT", 0.1)


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_no_generated_request_finds_an_answer_that_the_document_does_not_name(
    app: Flask, door: Door, champion: object, mode: GenerationMode
) -> None:
    fuzzed(app, door, mode, depth(8, 100))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_nor_do_twenty_thousand(app: Flask, door: Door, champion: object) -> None:
    tried = sum((fuzzed(app, door, mode, 160) for mode in GenerationMode), Counter())
    print(dict(tried))
    assert tried.total() >= 20_000


def fuzzed(app: Flask, door: Door, mode: GenerationMode, examples: int) -> Counter[int]:
    """How many requests were answered with each status.

    Args:
        examples: most requests of each operation.
    """
    schema = schemathesis.openapi.from_wsgi("/openapi.json", app)
    key = {"Authorization": door.client().environ_base["HTTP_AUTHORIZATION"]}
    tried: Counter[int] = Counter()
    for operation in schema.get_all_operations():
        found = operation.ok()

        @settings(
            max_examples=examples,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=found.as_strategy(generation_mode=mode), server=st.sampled_from(servers(found)))
        def ask(case: Case, server: str) -> None:
            answer = case.call(headers=key, base_url=f"http://localhost{server}")
            tried[answer.status_code] += 1
            waits = answer.status_code == 503 and answer.json()["code"] in ("NOT_READY", "NOT_DONE_YET")
            assert answer.status_code < 500 or waits, (server, case.as_curl_command(), answer.text)
            case.validate_response(answer, checks=CHECKS)
            if answer.status_code >= 400 and case.method != "HEAD":  # what answers HEAD has no body
                assert answer.json()["code"], case.as_curl_command()

        with suppress(Unsatisfiable):  # some operations take nothing that could be wrong
            ask()
    assert {200, 422} <= set(tried)
    return tried
