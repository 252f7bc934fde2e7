"""The key at the first page's door: who enters, who is refused, and what stays when it is forgotten."""

import re

import pytest
from playwright.sync_api import Page, Route, expect

from jobs import keys
from jobs.db import Sessions
from jobs.tables import ModelVersion
from tests import builders
from tests.browser.conftest import SCAN, Overlay, Visit, one
from tests.stand_in import worker

pytestmark = pytest.mark.slow

JOBS, CHAMPION, CARD = (re.compile(f"{path}$") for path in (r"/jobs\?limit=20", "/models/champion", "/champion/card"))
SHOWN = "() => ['desk', 'announcement', 'card'].map((id) => document.getElementById(id).outerHTML)"
"""All places in which the page shows what it has read with the key."""


def test_a_key_opens_the_page_and_stays_in_this_tab(visit: Visit) -> None:
    visit.enter()
    expect(visit.page.get_by_role("heading", name="Your key, please")).to_be_hidden()
    kept = visit.page.evaluate("() => [{...sessionStorage}, {...localStorage}, document.cookie]")
    assert kept == [{"renalq.key": visit.key}, {}, ""]
    assert visit.key not in visit.page.url
    visit.page.reload()
    visit.page.get_by_role("heading", name="Jobs").wait_for()

    visit.page.get_by_role("button", name="Forget key").click()
    expect(visit.page.get_by_label("API key")).to_be_focused()
    assert visit.page.evaluate("() => sessionStorage.length") == 0
    expect(visit.page.locator(".job")).to_have_count(0)


def test_a_wrong_key_is_said_to_be_wrong(visit: Visit) -> None:
    visit.page.goto(visit.url)
    visit.page.get_by_label("API key").fill("rq_wrong")
    visit.page.keyboard.press("Enter")
    expect(visit.page.get_by_role("alert")).to_contain_text("unknown or was revoked")
    expect(visit.page.get_by_role("heading", name="Jobs")).to_be_hidden()


def test_the_keyboard_alone_leads_to_the_files(visit: Visit) -> None:
    visit.page.on("filechooser", lambda chooser: None)  # heard from now on: later the key press may overtake it
    visit.page.goto(visit.url)
    for _ in range(8):
        visit.page.keyboard.press("Tab")
        if visit.page.evaluate("() => document.activeElement.id") == "key":
            break
    visit.page.keyboard.type(visit.key)
    visit.page.keyboard.press("Enter")
    visit.page.get_by_role("heading", name="Jobs").wait_for()
    visit.page.keyboard.press("Tab")
    expect(visit.page.get_by_role("button", name="Choose files")).to_be_focused()
    with visit.page.expect_file_chooser() as chooser:
        visit.page.keyboard.press("Enter")
    assert chooser.value.is_multiple()


def test_a_key_that_no_header_can_carry_is_said_to_be_none(visit: Visit) -> None:
    visit.page.goto(visit.url)
    visit.page.get_by_label("API key").fill("rq_10€")
    visit.page.keyboard.press("Enter")
    expect(visit.page.get_by_role("alert")).to_contain_text("This is no key")


def test_where_nothing_may_be_stored_the_page_itself_remembers(visit: Visit) -> None:
    denied = "{ get() { throw new DOMException('denied', 'SecurityError'); } }"
    visit.page.add_init_script(f"Object.defineProperty(window, 'sessionStorage', {denied})")
    visit.enter()
    expect(visit.page.locator("#live")).to_have_text("Live")
    visit.page.reload()
    expect(visit.page.get_by_label("API key")).to_be_visible()


# --- forgotten, or revoked ---


def test_a_forgotten_key_leaves_nothing_behind(
    visit: Visit, sessions: Sessions, champion: ModelVersion, overlay: Overlay
) -> None:
    visit.page.goto(visit.url)
    before = visit.page.evaluate(SHOWN)
    visit.open(visit.key)
    with worker(sessions, one(disposition="tumor"), overlay):
        visit.drop(SCAN)
        expect(visit.page.locator(".scan")).to_have_attribute("data-state", "done")
    expect(visit.page.locator("#announcement")).to_contain_text(SCAN[0])
    visit.page.get_by_role("button", name="Model card").click()
    visit.page.get_by_role("dialog").get_by_role("heading", name="Intended use").wait_for()
    visit.page.get_by_role("button", name="Close").click()
    visit.page.get_by_role("button", name="Forget key").click()
    assert visit.page.evaluate(SHOWN) == before


def test_a_key_that_is_revoked_meanwhile_closes_everything(
    visit: Visit, sessions: Sessions, champion: ModelVersion
) -> None:
    visit.page.goto(visit.url)
    before = visit.page.evaluate(SHOWN)
    visit.open(visit.key)
    visit.page.get_by_role("button", name="Model card").click()
    visit.page.get_by_role("dialog").get_by_role("heading", name="Intended use").wait_for()
    with sessions.begin() as session:
        for key in keys.list_keys(session, builders.TENANT).data:
            keys.revoke(session, builders.TENANT, key.id)
    expect(visit.page.get_by_role("alert")).to_contain_text("unknown or was revoked")
    expect(visit.page.get_by_label("API key")).to_be_focused()
    assert visit.page.evaluate(SHOWN) == before


def held(page: Page, *which: re.Pattern[str]) -> list[Route]:
    """The next request of each of these, kept from the server."""
    routes: list[Route] = []

    def hold(route: Route) -> None:
        if route.request.url in [known.request.url for known in routes]:
            route.continue_()
        else:
            routes.append(route)

    for address in which:
        page.route(address, hold)
    return routes


def came(page: Page, routes: list[Route], number: int) -> None:
    """Wait until so many have come."""
    for _ in range(150):
        if len(routes) == number:
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"Only {len(routes)} requests came.")


def test_answers_to_a_forgotten_key_are_not_shown(visit: Visit, champion: ModelVersion) -> None:
    visit.page.goto(visit.url)
    before = visit.page.evaluate(SHOWN)
    routes = held(visit.page, JOBS, CHAMPION, CARD)
    visit.open(visit.key)
    visit.page.locator("#show-card").dispatch_event("click")
    came(visit.page, routes, 3)
    visit.page.locator("#forget-key").dispatch_event("click")
    for route in routes:
        with visit.page.expect_response(route.request.url) as answer:
            route.continue_()
        answer.value.finished()
    visit.page.wait_for_timeout(300)
    assert visit.page.evaluate(SHOWN) == before


def test_a_late_401_says_nothing_of_a_key_that_was_merely_forgotten(visit: Visit) -> None:
    routes = held(visit.page, JOBS)
    visit.enter()
    came(visit.page, routes, 1)
    visit.page.get_by_role("button", name="Forget key").click()
    routes[0].fulfill(status=401, json={"detail": "This key is unknown or was revoked."})
    visit.page.wait_for_timeout(300)
    expect(visit.page.get_by_role("alert")).to_be_empty()


def test_a_late_401_of_one_key_throws_no_other_away(visit: Visit, sessions: Sessions) -> None:
    with sessions.begin() as session:
        second = keys.create(session, "second", ["jobs:read", "jobs:write"]).secret
    routes = held(visit.page, JOBS)
    visit.enter()
    came(visit.page, routes, 1)
    visit.page.get_by_role("button", name="Forget key").click()
    visit.open(second)
    expect(visit.page.locator("#live")).to_have_text("Live")
    routes[0].fulfill(status=401, json={"detail": "This key is unknown or was revoked."})
    visit.page.wait_for_timeout(300)
    expect(visit.page.locator("#live")).to_have_text("Live")
    assert visit.page.evaluate("() => sessionStorage['renalq.key']") == second
