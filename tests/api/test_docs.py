"""The documentation lists the codes of errors, event types and scopes that the code has, and no others."""

import re
from pathlib import Path

from api.http.problems import HTTP_CODES
from jobs.error_codes import ERROR_CODES, documentation
from jobs.errors import RenalQError
from jobs.events.webhooks import EventType
from jobs.keys import Scope
from jobs.states import JobState

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "api.md").read_text()
SOURCES = "\n".join(
    path.read_text() for package in ("api", "jobs", "worker", "ml") for path in sorted((ROOT / package).rglob("*.py"))
)
CODE = r'"([A-Z]+(?:_[A-Z]+)*)"'
DEFINITIONS = [
    rf"^    (?:status, )?code = (?:\d+, )?{CODE}",  # an exception's
    rf"problem\(\d+, {CODE}",
    rf"(?:WorkFailed|ScanUnavailable)\({CODE}",
    rf'"code": {CODE}',
    rf"Refusal\(\s*HTTPStatus\.\w+,\s*{CODE}",
    rf"refusal_code(?:: str)? ?= ?{CODE}",
    rf"^REFUSED, FAILED, UNREACHABLE = {CODE}, {CODE}, {CODE}",
]
INTERNAL_ONLY = {
    "LEASE_LOST",  # ends a worker's unit; the unit goes on elsewhere
    "BAD_CHECKPOINT",  # the training starts from an older one instead
}


def defined_codes() -> set[str]:
    found = [match for pattern in DEFINITIONS for match in re.findall(pattern, SOURCES, re.MULTILINE)]
    codes = {code for match in found for code in ([match] if isinstance(match, str) else match)}
    return codes | set(HTTP_CODES.values())


def first_words(heading: str, column: int = 0) -> set[str]:
    """The words in backticks in a column of every table below a heading."""
    section = PAGE.split(f"\n{heading}\n", 1)[1]
    section = re.split(r"^#{1,3} ", section, maxsplit=1, flags=re.MULTILINE)[0]
    cells = [line.split("|")[column + 1] for line in section.splitlines() if line.startswith("|")]
    return {word for cell in cells for word in re.findall(r"`([^`]+)`", cell)}


def test_every_error_code_is_listed_and_back() -> None:
    assert set(ERROR_CODES) == defined_codes() - INTERNAL_ONLY


def test_the_list_of_error_codes_is_the_page_of_the_documentation() -> None:
    assert (ROOT / "docs" / "errors.md").read_text() == documentation(), "python -m jobs.error_codes > docs/errors.md"


def test_the_status_of_a_code_is_that_of_its_exception() -> None:
    def all_of(kind: type[RenalQError]) -> list[type[RenalQError]]:
        return [kind, *(one for below in kind.__subclasses__() for one in all_of(below))]

    raised = {kind.code: kind.status for kind in all_of(RenalQError) if kind.code not in INTERNAL_ONLY}
    assert {code: ERROR_CODES[code].status for code in raised} == raised
    assert {ERROR_CODES[code].status: code for code in HTTP_CODES.values()} == HTTP_CODES


def test_every_event_type_of_a_job_stands_in_the_guide_and_back() -> None:
    told = first_words("## Follow a job", 1) & set(
        re.findall(r"`(\w+)`", PAGE.split("| event types |")[1].split("\n\n")[0])
    )
    written = set(re.findall(r'record\(\s*session, [\w.]+, [\w.]+, "(\w+)"', SOURCES))
    written |= set(re.findall(r'event ?= ?\(?"(\w+)"', SOURCES))
    assert written <= told
    assert told - written <= {"claimed", "results_expired"}, "written by SQL"
    assert {"claimed", "results_expired"} <= told
    assert not told & {state.value for state in JobState}


def test_every_webhook_event_stands_in_the_guide_and_back() -> None:
    told = {word for word in first_words("## Webhooks") if re.fullmatch(r"\w+\.\w+", word)}
    assert told == {event.value for event in EventType}


def test_every_scope_stands_in_the_guide_and_back() -> None:
    assert first_words("## Keys") == {scope.value for scope in Scope}
