"""A prediction summed up, as JSON and as a picture."""

import datetime as dt
import io
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
from flask.testing import FlaskClient
from PIL import Image
from sqlalchemy import text

from api.views import charts
from jobs.db import Sessions
from jobs.queue import leases, lifecycle
from jobs.queue.lifecycle import ScanOutcome
from jobs.results import queries, summary
from jobs.retention.results import expire
from jobs.states import JobKind, JobState
from jobs.tables import Job, ModelVersion
from tests import builders
from tests.api.test_errors import assert_problem
from tests.processes import ROOT

PNG = {"Accept": "image/png"}
SWATCH = (14 * charts.SCALE) ** 2
"""Pixels of a square of the legend."""
CONFIDENCES = (1.0, 0.96, 0.95, 0.949, 0.5, 0.0)


def outcomes(*confidences: float, label: str = "Tumor", cached: bool = False) -> list[ScanOutcome]:
    return [
        ScanOutcome(number, label, confidence, {label: confidence}, "torch-fp32", cached)
        for number, confidence in enumerate(confidences)
    ]


@pytest.fixture
def batch(sessions: Sessions, champion: ModelVersion) -> leases.Claim:
    """Nine scans of a batch, being worked on."""
    with sessions.begin() as session:
        job = builders.make_job(
            session, JobKind.PREDICT_BATCH, scans=9, model_id=champion.id, model_version=1, name="Ward 3"
        )
        return builders.claim(session, builders.units_of(session, job)[0])


def hand_in(sessions: Sessions, held: leases.Claim, *given: ScanOutcome) -> None:
    with sessions.begin() as session:
        lifecycle.requeue(session, held, "DRAINED", outcomes=given)


def path(held: leases.Claim) -> str:
    return f"/jobs/{held.job_id}/summary"


def test_a_summary_counts_classes_confidences_errors_and_what_was_cached(
    client: FlaskClient, sessions: Sessions, batch: leases.Claim
) -> None:
    good = outcomes(*CONFIDENCES)
    known = [replace(each, ordinal=6 + each.ordinal) for each in outcomes(0.7, label="Normal", cached=True)]
    hand_in(sessions, batch, *good, *known, ScanOutcome(7, error=builders.BROKEN))
    pace = client.get(f"/jobs/{batch.job_id}").get_json()["scans_per_second"]
    found = client.get(path(batch)).get_json()
    assert found["counts"] == {"total": 9, "succeeded": 7, "failed": 1, "cancelled": 0, "pending": 1}
    assert found["classes"] == {"Normal": 1, "Tumor": 6}
    assert found["confidence"]["edges"] == [round(number * 0.05, 2) for number in range(21)]
    tumor = found["confidence"]["counts"]["Tumor"]
    assert {number: scans for number, scans in enumerate(tumor) if scans} == {0: 1, 10: 1, 18: 1, 19: 3}
    assert sum(found["confidence"]["counts"]["Normal"]) == 1
    assert (found["errors"], found["cached"]) == ({"BROKEN": 1}, 1)
    later = client.get(f"/jobs/{batch.job_id}").get_json()["scans_per_second"]
    assert pace >= found["scans_per_second"] >= later > 0, "the same figure, at three times"


def test_a_summary_counts_what_may_be_done_with_the_scans(
    client: FlaskClient, sessions: Sessions, batch: leases.Claim
) -> None:
    words = ("tumor", "tumor", "indeterminate", "rejected", None)
    given = [replace(one, disposition=word) for one, word in zip(outcomes(*CONFIDENCES), words, strict=False)]
    before = client.get(path(batch), headers=PNG).data
    assert client.get(path(batch)).get_json()["dispositions"] == {}
    hand_in(sessions, batch, *given)
    assert client.get(path(batch)).get_json()["dispositions"] == {"indeterminate": 1, "rejected": 1, "tumor": 2}
    assert client.get(path(batch), headers=PNG).data != before


def test_each_value_is_in_the_bin_that_the_edges_name(
    client: FlaskClient, sessions: Sessions, champion: ModelVersion
) -> None:
    with sessions.begin() as session:
        job = builders.make_job(session, JobKind.PREDICT_BATCH, scans=20, chunk=20, model_id=champion.id)
        held = builders.claim(session, builders.units_of(session, job)[0])
        lifecycle.succeed(session, held, outcomes=outcomes(*summary.EDGES[:-1]))
    assert client.get(path(held)).get_json()["confidence"]["counts"]["Tumor"] == [1] * 20


def test_before_anything_has_ended_every_class_has_zero(client: FlaskClient, batch: leases.Claim) -> None:
    found = client.get(path(batch)).get_json()
    assert found["classes"] == {"Normal": 0, "Tumor": 0}
    assert found["confidence"]["counts"] == {"Normal": [0] * 20, "Tumor": [0] * 20}
    assert (found["counts"]["pending"], found["errors"], found["cached"]) == (9, {}, 0)
    assert found["scans_per_second"] is None


def test_a_job_that_predicts_nothing_has_no_summary(
    client: FlaskClient, stranger: FlaskClient, sessions: Sessions, batch: leases.Claim
) -> None:
    with sessions.begin() as session:
        job = builders.make_job(session, state=JobState.SUCCEEDED)
    for headers in ({}, PNG):
        assert_problem(client.get(f"/jobs/{job.id}/summary", headers=headers), 409, "NO_RESULTS")
        assert_problem(stranger.get(path(batch), headers=headers), 404)


# --- the pace ---


def test_the_pace_is_that_of_the_time_in_which_work_was_done(
    client: FlaskClient, sessions: Sessions, batch: leases.Claim
) -> None:
    hand_in(sessions, batch, *outcomes(*CONFIDENCES))
    with sessions.begin() as session:
        session.execute(text("UPDATE jobs SET started_at = clock_timestamp() - interval '100 s'"))
    running = client.get(f"/jobs/{batch.job_id}").get_json()
    assert running["scans_per_second"] == pytest.approx(0.06, rel=0.02)
    client.post(f"/jobs/{batch.job_id}/cancel")
    with sessions.begin() as session:
        job = session.get_one(Job, batch.job_id)
        job.started_at = (job.finished_at or job.created_at) - dt.timedelta(seconds=4)
    ended = client.get(f"/jobs/{batch.job_id}").get_json()
    assert (ended["counts"]["cancelled"], ended["scans_per_second"]) == (3, 1.5)  # what was cancelled is no work


def test_a_training_and_a_job_that_never_began_have_no_pace(client: FlaskClient, sessions: Sessions) -> None:
    with sessions.begin() as session:
        training = builders.make_job(session, state=JobState.SUCCEEDED).id
        waiting = builders.make_job(session, JobKind.PREDICT_BATCH, JobState.CANCELLED, scans=2).id
    for job_id in (training, waiting):
        assert client.get(f"/jobs/{job_id}").get_json()["scans_per_second"] is None


# --- the picture ---


def test_the_picture_is_a_png_of_twice_its_size(client: FlaskClient, sessions: Sessions, batch: leases.Claim) -> None:
    hand_in(sessions, batch, *outcomes(*CONFIDENCES))
    answer = client.get(path(batch), headers=PNG)
    assert (answer.status_code, answer.mimetype) == (200, "image/png")
    picture = Image.open(io.BytesIO(answer.data))
    assert picture.width == charts.WIDTH * charts.SCALE
    assert picture.info["dpi"] == pytest.approx((192, 192), abs=0.1)
    assert client.get(path(batch), headers={"Accept": "image/png, application/json;q=0.5"}).mimetype == "image/png"
    assert client.get(path(batch), headers={"Accept": "*/*"}).mimetype == "application/json"


def test_each_class_has_its_colour_and_a_bar_where_it_has_scans(
    client: FlaskClient, sessions: Sessions, batch: leases.Claim
) -> None:
    hand_in(sessions, batch, *outcomes(*CONFIDENCES))
    colours = drawn(client.get(path(batch), headers=PNG).data)
    assert colours[charts.COLOURS[0]] == SWATCH  # Normal: in the legend alone
    assert colours[charts.COLOURS[1]] > 10 * SWATCH


def test_the_title_is_the_name_or_else_the_id(sessions: Sessions, batch: leases.Claim) -> None:
    with sessions() as session:
        view = queries.job(session, builders.TENANT, batch.job_id)
        found = summary.summary(session, view)
        named = charts.draw_summary(view, found)
        view.job.name = None
        unnamed = charts.draw_summary(view, found)
        view.job.name = "\n"
        unreadable = charts.draw_summary(view, found)
        view.job.name = "Wàrd 3"
        accented = charts.draw_summary(view, found)
        view.job.name = "腎臓"  # the built-in font has no such letters
        spelled = charts.draw_summary(view, found)
    assert unnamed == unreadable != named == accented
    assert spelled not in (unnamed, named)


@pytest.mark.parametrize("number", [0, 1, 7, 8, 40])
def test_a_picture_has_a_panel_for_each_class_and_one_for_the_rest_of_many(
    sessions: Sessions, batch: leases.Claim, number: int
) -> None:
    bins = {f"class {each} {'of a long name ' * each}": [each] * 20 for each in range(number)}
    confidence = summary.Confidence(summary.EDGES, bins)
    with sessions() as session:
        view = queries.job(session, builders.TENANT, batch.job_id)
        found = replace(summary.summary(session, view), confidence=confidence)
    colours = drawn(charts.draw_summary(view, found))
    assert (colours[charts.OTHERS] > SWATCH) == (number > len(charts.COLOURS))
    assert sum(colours[colour] >= SWATCH for colour in charts.COLOURS) == {0: 0, 1: 1, 7: 7, 8: 6, 40: 6}[number]


def drawn(png: bytes) -> Counter[str]:
    """How many pixels have each colour."""
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    return Counter({f"#{bytes(colour).hex().upper()}": count for count, colour in picture.getcolors(2**24)})


# --- results that have expired ---


def test_results_that_have_expired_are_410_in_every_form(
    client: FlaskClient, sessions: Sessions, champion: ModelVersion
) -> None:
    with sessions.begin() as session:
        job = builders.make_job(session, JobKind.PREDICT_BATCH, scans=2, model_id=champion.id)
        held = builders.claim(session, builders.units_of(session, job)[0])
        lifecycle.succeed(session, held, outcomes=builders.outcomes_of(session, held, failed=1))
    assert client.get(f"/jobs/{job.id}").get_json()["results_expired_at"] is None
    with sessions.begin() as session:
        expire(session, 1e-9)
    for accept in ("application/json", "application/x-ndjson", "text/csv"):
        answer = client.get(f"/jobs/{job.id}/results", headers={"Accept": accept})
        assert "RENALQ_RESULTS_DAYS" in assert_problem(answer, 410, "RESULTS_EXPIRED")["detail"]
    for headers in ({}, PNG):
        assert_problem(client.get(f"/jobs/{job.id}/summary", headers=headers), 410, "RESULTS_EXPIRED")
    assert "expired" in assert_problem(client.post(f"/jobs/{job.id}/retry"), 409, "WRONG_STATE")["detail"]
    shown = client.get(f"/jobs/{job.id}").get_json()
    assert (shown["state"], shown["counts"]["succeeded"]) == ("partially_succeeded", 1)
    assert shown["results_expired_at"].endswith("Z")
    events = client.get(f"/jobs/{job.id}/events").get_json()["data"]
    assert events[-1]["type"] == "results_expired"


def test_who_draws_no_picture_imports_nothing_to_draw_with() -> None:
    """Every API process would hold it."""
    code = "import sys, api.application; print(*{'PIL.ImageDraw', 'PIL.ImageFont'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_chart_spells_names_of_other_scripts() -> None:
    names = {"Ärzte": "Arzte", "肿瘤": "ZhongLiu", "Опухоль": "Opukhol'", "a\nb": "a?b", "plain": "plain"}
    assert {name: charts.printable(name) for name in names} == names
