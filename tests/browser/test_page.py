"""The first page, by mouse, keyboard and thumb."""

from typing import Any

import pytest
from playwright.sync_api import expect
from sqlalchemy import select

from jobs.db import Sessions
from jobs.models import promotion
from jobs.models.gate import GatePolicy
from jobs.queue.outcomes import ScanOutcome
from jobs.states import JobKind, JobState
from jobs.tables import Deletion, ModelVersion, ScanResult
from tests import builders
from tests.browser.conftest import SCAN, Overlay, Visit, one
from tests.stand_in import worker

pytestmark = pytest.mark.slow

WAYS = {
    "light": {"color_scheme": "light"},
    "dark": {"color_scheme": "dark"},
    "phone": {"viewport": {"width": 360, "height": 740}},
}


# --- scans ---


def test_a_dropped_scan_shows_class_confidence_disposition_and_heatmap(
    visit: Visit, sessions: Sessions, champion: ModelVersion, overlay: Overlay
) -> None:
    visit.enter()
    with worker(sessions, one(disposition="tumor", ood_score=0.41), overlay):
        visit.drop(SCAN)
        card = visit.page.locator(".scan")
        expect(card.get_by_role("heading")).to_have_text(SCAN[0])
        expect(card).to_have_attribute("data-state", "done")
    expect(card.locator(".disposition")).to_have_text("Tumor")
    expect(card.locator(".found")).to_have_text("Tumor94.6 %")
    expect(card.get_by_role("progressbar", name="Tumor")).to_have_attribute("value", "0.9456")
    expect(card.get_by_role("img", name="with a heatmap")).to_be_visible()
    expect(visit.page.get_by_role("status").filter(has_text="Tumor, 94.6 %")).to_have_count(1)

    card.get_by_role("slider").fill("0")
    expect(card.get_by_role("img", name="with a heatmap")).to_have_css("opacity", "0")
    card.get_by_role("button", name="Enlarge").click()
    assert (card.locator(".viewer").bounding_box() or {})["width"] > 400

    visit.page.get_by_role("button", name="Clear list").click()
    expect(card).to_have_count(0)


def test_names_of_files_stay_in_the_browser(visit: Visit, sessions: Sessions, champion: ModelVersion) -> None:
    visit.enter()
    with worker(sessions, one()):
        visit.drop(SCAN)
        expect(visit.page.locator(".scan")).to_have_attribute("data-state", "done")
    with sessions() as session:
        assert session.scalars(select(ScanResult.name)).all() == ["scan"]


@pytest.mark.parametrize(
    ("found", "word"),
    [
        ({"disposition": "indeterminate", "reason": "0.57 lies between 0.35 and 0.65."}, "Indeterminate"),
        ({"disposition": "rejected", "reason": "Unlike what it has learnt from.", "ood_score": 1.8}, "Rejected"),
    ],
    ids=["indeterminate", "rejected"],
)
def test_a_doubtful_answer_gives_its_reason(
    visit: Visit, sessions: Sessions, champion: ModelVersion, found: dict[str, Any], word: str
) -> None:
    visit.enter()
    with worker(sessions, one(**found)):
        visit.drop(SCAN)
        card = visit.page.locator(".scan")
        expect(card.locator(".disposition")).to_have_text(word)
    expect(card.locator(".reason")).to_have_text(found["reason"])
    expect(card.locator(".found")).to_have_count(int(word != "Rejected"))


def test_what_goes_wrong_is_said_beside_its_file(visit: Visit, sessions: Sessions, champion: ModelVersion) -> None:
    visit.enter()
    visit.drop(("letter.txt", "text/plain", b"Dear colleague"))
    letter = visit.page.locator(".scan")
    expect(letter.locator(".error")).to_contain_text("not an image that can be read")
    cut = {"code": "BAD_IMAGE", "detail": "The picture is cut off.", "retryable": False}
    with worker(sessions, lambda ordinals: [ScanOutcome(ordinal, error=cut) for ordinal in ordinals]):
        visit.drop(SCAN)
        expect(visit.page.locator(".scan").first.locator(".error")).to_have_text("The picture is cut off.")


def test_without_a_model_the_page_says_what_to_do(visit: Visit) -> None:
    visit.enter()
    expect(visit.page.locator("#champion-none")).to_contain_text("No model is champion yet")
    expect(visit.page.locator("#jobs-none")).to_contain_text("No jobs yet")
    visit.drop(SCAN)
    expect(visit.page.locator(".scan .error")).to_contain_text("Train one")


def test_names_are_text_whatever_they_hold(
    visit: Visit, sessions: Sessions, champion: ModelVersion, overlay: Overlay
) -> None:
    evil = "<img src=x onerror=\"document.title='taken'\">"
    with sessions.begin() as session:
        builders.make_job(session, JobKind.TRAIN, JobState.CANCELLED, name=evil)
    visit.enter()
    found = one(label=evil, probabilities={evil: 0.9456, "Normal": 0.0544}, disposition=evil, reason=evil)
    with worker(sessions, found, overlay):
        visit.drop((f"{evil}.png", *SCAN[1:]))
        card = visit.page.locator(".scan")
        expect(card.locator(".disposition")).to_have_text(evil)
    for place, text in {".file-name": f"{evil}.png", ".reason": evil, ".found .class-name": evil}.items():
        expect(card.locator(place)).to_have_text(text)
    expect(visit.page.locator(".job-kind").filter(has_text=evil)).to_have_count(1)
    assert visit.page.title().startswith("RenalQ")


# --- jobs, and the champion ---


def test_jobs_come_move_and_end_by_themselves(visit: Visit, sessions: Sessions) -> None:
    visit.enter()
    with sessions.begin() as session:
        job = builders.make_job(session, JobKind.PREDICT_BATCH, scans=3, chunk=1)
    row = visit.page.locator(".job")
    expect(row.locator(".job-kind")).to_have_text("Batch of 3")
    expect(row.locator(".job-state")).to_have_text("queued")
    with sessions.begin() as session:
        builders.claim(session, builders.units_of(session, job)[0])
    expect(row.locator(".job-state")).to_have_text("running")
    row.get_by_role("button", name="Cancel Batch of 3").click()
    expect(row.locator(".job-state")).to_have_text("stopping")
    expect(row.get_by_role("button")).to_be_hidden()


def test_a_list_that_does_not_change_is_not_sent_again(visit: Visit) -> None:
    visit.enter()
    with visit.page.expect_response(lambda answer: "/jobs?limit=20" in answer.url and answer.status == 304):
        pass


def test_the_champion_is_shown_with_the_gates_reasons_and_its_card(visit: Visit, champion: ModelVersion) -> None:
    visit.enter()
    expect(visit.page.locator("#champion-version")).to_have_text("version 1")
    expect(visit.page.locator("#champion-f1")).to_have_text("0.970")
    visit.page.get_by_text("Why the gate promoted it").click()
    expect(visit.page.locator("#champion-reasons li", has_text="0.97")).to_be_visible()
    expect(visit.page.locator("#champion-warning")).to_be_hidden()
    visit.page.get_by_role("button", name="Model card").click()
    expect(visit.page.get_by_role("dialog").get_by_role("heading", name="Intended use")).to_be_visible()
    visit.page.keyboard.press("Escape")
    expect(visit.page.get_by_role("dialog")).to_be_hidden()


def test_a_champion_that_has_drifted_says_so(visit: Visit, sessions: Sessions, champion: ModelVersion) -> None:
    visit.enter()
    expect(visit.page.locator("#champion-version")).to_have_text("version 1")
    expect(visit.page.locator("#champion-drift")).to_be_hidden()
    with sessions.begin() as session:
        session.get_one(ModelVersion, champion.id).drift = {"day": "2026-11-30", "figures": ["brightness", "class"]}
    visit.page.reload()
    expect(visit.page.locator("#champion-drift")).to_contain_text("2026-11-30")
    expect(visit.page.locator("#champion-drift")).to_contain_text("brightness, class")


def test_a_champion_by_force_is_not_said_to_be_the_gates(
    visit: Visit, sessions: Sessions, champion: ModelVersion
) -> None:
    with sessions.begin() as session:
        worse = str(builders.make_model(session, {"f1": 0.5}).version)
        promotion.promote(session, builders.TENANT, worse, GatePolicy(), force=True, reason="The ward asked for it.")
    visit.enter()
    expect(visit.page.locator("#champion-version")).to_have_text(f"version {worse}")
    visit.page.get_by_text("Why the gate did not promote it").click()
    expect(visit.page.locator("#champion-reasons li").first).to_be_visible()


# --- for everybody ---


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS, indirect=True)
def test_everything_has_a_name_contrast_and_room(
    visit: Visit, sessions: Sessions, champion: ModelVersion, overlay: Overlay
) -> None:
    with sessions.begin() as session:
        for state in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED):
            builders.make_job(session, JobKind.TRAIN, state, name="x" * 80)
        builders.claim(session, builders.units_of(session, builders.make_job(session))[0])
    visit.page.goto(visit.url)
    _check(visit)
    visit.enter()
    long = "the-same-patients-very-long-series-description-" * 4
    with worker(sessions, one(disposition="indeterminate", reason="A person must look."), overlay):
        visit.drop((f"{long}.png", *SCAN[1:]), ("a.txt", "text/plain", b"no"))
        expect(visit.page.locator(".scan[data-state=done], .scan[data-state=failed]")).to_have_count(2)
    visit.page.locator(".job").first.wait_for()
    visit.page.wait_for_timeout(400)  # transitions end
    _check(visit)


def _check(visit: Visit) -> None:
    assert visit.page.evaluate(NAMELESS) == []
    assert visit.page.evaluate(PALE) == []
    assert visit.page.evaluate("() => document.documentElement.scrollWidth - innerWidth") <= 0


NAMELESS = """() => [...document.querySelectorAll("button, input, a, img, progress, dialog")]
  .filter((element) => element.checkVisibility() && !(
    element.ariaLabel || element.labels?.length || element.textContent.trim() || element.hasAttribute("alt")
    || element.hasAttribute("aria-labelledby")))
  .map((element) => element.outerHTML)"""

PALE = """() => {
  const parts = (colour) => (colour.match(/[\\d.]+/g) ?? []).map(Number);
  const shine = (rgb) => rgb.slice(0, 3)
    .map((value) => value / 255)
    .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
    .reduce((sum, value, place) => sum + value * [0.2126, 0.7152, 0.0722][place], 0);
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const [red, green, blue, alpha = 1] = parts(getComputedStyle(at).backgroundColor);
      if (alpha > 0.7) return [red, green, blue];
    }
    return [255, 255, 255];
  };
  const own = (element) => [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  return [...document.body.querySelectorAll("*")].filter((element) => element.checkVisibility() && own(element))
    .map((element) => {
      const style = getComputedStyle(element);
      const [dark, light] = [shine(parts(style.color)), shine(ground(element))].sort((a, b) => a - b);
      const size = parseFloat(style.fontSize);
      const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
      return [(light + 0.05) / (dark + 0.05), large ? 3 : 4.5, element.className || element.tagName];
    })
    .filter(([ratio, least]) => ratio < least);
}"""


def test_an_ended_job_is_deleted_from_the_list_after_a_question(visit: Visit, sessions: Sessions) -> None:
    with sessions.begin() as session:
        job_id = builders.make_job(session, state=JobState.FAILED).id
        builders.make_job(session)
    visit.enter()
    row = visit.page.locator(f'.job[data-id="{job_id}"]')
    visit.page.once("dialog", lambda dialog: dialog.dismiss())
    row.get_by_role("button", name="Delete Training").click()
    expect(row).to_have_count(1)
    visit.page.once("dialog", lambda dialog: dialog.accept())
    row.get_by_role("button", name="Delete Training").click()
    expect(row).to_have_count(0)
    expect(visit.page.locator(".job")).to_have_count(1)
    expect(visit.page.get_by_role("button", name="Delete")).to_have_count(0)
    with sessions() as session:
        assert [deletion.target for deletion in session.scalars(select(Deletion))] == [str(job_id)]
