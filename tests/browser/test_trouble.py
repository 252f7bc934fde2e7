"""The first page while the server is slow, busy, away for a moment or gone, and when the page itself fails."""

import re
from collections.abc import Callable

import pytest
from playwright.sync_api import Route, expect
from sqlalchemy import func, select

from jobs.db import Sessions
from jobs.states import JobKind
from jobs.tables import Job, ModelVersion
from tests.api.conftest import png
from tests.browser.conftest import SCAN, Overlay, Visit, one
from tests.processes import eventually
from tests.stand_in import worker

pytestmark = pytest.mark.slow

JOBS = re.compile(r"/jobs\?limit=20$")
ID = "[0-9a-f-]{36}"
FASTER = "const slow = AbortSignal.timeout; AbortSignal.timeout = (wait) => slow.call(AbortSignal, wait / 30)"
"""What the page gives up after 45 s it gives up after 1.5 s."""


def busy(status: int) -> Callable[[Route], None]:
    """Answers with this status."""
    return lambda route: route.fulfill(status=status, json={"detail": "Try again shortly."})


def cut(route: Route) -> None:
    """No answer at all."""
    route.abort()


def wait_briefly(route: Route) -> None:
    """Hands a scan in, but waits for its job a second only."""
    route.continue_(headers={**route.request.headers, "prefer": "wait=1"})


def test_a_cleared_list_makes_room_for_what_comes_next(
    visit: Visit, sessions: Sessions, champion: ModelVersion
) -> None:
    def submitted() -> int:
        with sessions() as session:
            return session.scalar(select(func.count()).where(Job.kind == JobKind.PREDICT)) or 0

    visit.enter()
    visit.drop(*[(f"{shade}.png", "image/png", png(64, 64, shade)) for shade in (1, 2, 3)])
    eventually(lambda: submitted() == 3, 15)
    visit.page.get_by_role("button", name="Clear list").click()
    visit.drop(SCAN)
    eventually(lambda: submitted() == 4, 15)
    with worker(sessions, one()):
        expect(visit.page.locator(".scan")).to_have_attribute("data-state", "done")
    expect(visit.page.locator(".file-name")).to_have_text(SCAN[0])


def test_a_cleared_list_is_told_of_no_more(visit: Visit, sessions: Sessions, champion: ModelVersion) -> None:
    visit.page.route("**/jobs/predict", wait_briefly)
    visit.enter()
    visit.drop(SCAN)
    expect(visit.page.locator(".status-text")).to_have_text("Classifying …")
    visit.page.get_by_role("button", name="Clear list").click()
    with worker(sessions, one()):
        pass
    visit.page.wait_for_timeout(1500)  # the next look
    expect(visit.page.locator("#announcement")).to_be_empty()


def test_looks_that_fail_end_no_scan(
    visit: Visit, sessions: Sessions, champion: ModelVersion, overlay: Overlay
) -> None:
    visit.page.route("**/jobs/predict", wait_briefly)
    for trouble in (busy(429), busy(503), cut):
        visit.page.route(re.compile(f"/jobs/{ID}$"), trouble, times=1)
    visit.page.route(re.compile(f"/jobs/{ID}/results$"), cut, times=1)
    visit.page.route(re.compile(f"/jobs/{ID}/artifacts/"), cut, times=1)
    visit.enter()
    visit.drop(SCAN)
    expect(visit.page.locator(".status-text")).to_contain_text("Looking again")
    expect(visit.page.locator(".status-text")).to_have_text("Classifying …")
    with worker(sessions, one(), overlay):
        expect(visit.page.locator(".scan")).to_have_attribute("data-state", "done")
    expect(visit.page.get_by_role("img", name="with a heatmap")).to_be_visible()
    assert [complaint[:3] for complaint in visit.complaints] == ["503"]
    visit.complaints.clear()


def test_a_server_that_falls_silent_is_told_and_so_is_its_return(visit: Visit) -> None:
    visit.page.add_init_script(FASTER)
    visit.page.route(JOBS, lambda route: None)
    visit.enter()
    expect(visit.page.locator("#live")).to_have_text("Not connected")
    visit.page.unroute(JOBS)
    expect(visit.page.locator("#live")).to_have_text("Live")


def test_what_answers_in_the_servers_place_is_no_server(visit: Visit) -> None:
    visit.page.route(JOBS, lambda route: route.fulfill(content_type="text/html", body="<h1>Hotel Wi-Fi</h1>"))
    visit.enter()
    expect(visit.page.locator("#live")).to_have_text("Not connected")


def test_a_defect_of_the_page_is_told_and_not_taken_for_the_networks(visit: Visit) -> None:
    visit.page.route(JOBS, lambda route: route.fulfill(json={"data": [None]}))
    visit.enter()
    expect(visit.page.locator("#live")).to_contain_text("This page has failed")
    for _ in range(100):  # the browser tells of the error beside what it draws
        if not visit.complaints:
            visit.page.wait_for_timeout(50)
    assert len(visit.complaints) == 1
    visit.complaints.clear()
