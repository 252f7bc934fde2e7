"""Drift by REST: as JSON, as a picture, and for Prometheus."""

import datetime as dt
import io
import random

import pytest
from flask.testing import FlaskClient
from PIL import Image
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as parsed
from sqlalchemy import update

from api.views import charts, drift_chart
from jobs.db import Sessions
from jobs.models import drift
from jobs.models.drift import DriftPolicy
from jobs.queue import lifecycle
from jobs.queue.outcomes import ScanOutcome
from jobs.states import JobKind
from jobs.tables import ModelVersion, PredictionCount, Truth
from tests import builders
from tests.api.conftest import Door
from tests.api.test_errors import assert_problem
from tests.builders import TENANT

PNG = {"Accept": "image/png"}
BRIGHT = {"edges": [0.25, 0.5, 0.75], "counts": [25, 25, 25, 25]}


@pytest.fixture
def drifted(sessions: Sessions, champion: ModelVersion) -> ModelVersion:
    """A champion that was given 200 bright scans today, of which 20 were rejected, and knows the truth of two."""
    chance = random.Random(1)
    with sessions.begin() as session:
        mine = session.get_one(ModelVersion, champion.id)
        mine.reference = {"scans": 100, "statistics": {"brightness": BRIGHT}, "classes": {"Normal": 50, "Tumor": 50}}
        mine.metrics = {**mine.metrics, "positive": "Tumor"}
        job = builders.make_job(session, JobKind.PREDICT_BATCH, scans=200, chunk=500, model_id=champion.id)
        held = builders.claim(session, builders.units_of(session, job)[0])
        outcomes = [
            ScanOutcome(
                number,
                ("Normal", "Tumor")[number % 2],
                0.9,
                {"Tumor": 0.9},
                "torch-fp32",
                disposition="rejected" if number < 20 else "tumor",
                statistics={"brightness": chance.uniform(0.6, 1)},
            )
            for number in range(200)
        ]
        lifecycle.succeed(session, held, outcomes=outcomes)
        for predicted in ("Tumor", "Normal"):
            told = {"label": "Tumor", "predicted": predicted, "confidence": 0.9}
            scan_id, now = builders.make_scan(session).id, dt.datetime.now(dt.UTC)
            session.add(Truth(tenant_id=TENANT, scan_id=scan_id, model_id=champion.id, predicted_at=now, **told))
    return mine


def test_drift_is_shown_day_by_day(client: FlaskClient, drifted: ModelVersion) -> None:
    today = str(dt.datetime.now(dt.UTC).date())
    found = client.get("/models/champion/drift").get_json()
    assert client.get("/models/1/drift?days=1").get_json() == found
    assert (found["version"], found["reference_scans"], found["bound"]) == ("1", 100, 0.25)
    assert (found["reference_studies"], found["days"][0]["studies"]) == (100, 200)
    assert (found["drifted"], found["latest"]) == (True, today)
    (day,) = found["days"]
    assert (day["day"], day["since"], day["scans"], day["drifted"]) == (today, today, 200, ["brightness"])
    assert (day["classes"], day["rejected_share"]) == ({"Normal": 100, "Tumor": 100}, 0.1)
    assert day["dispositions"] == {"rejected": 20, "tumor": 180}
    assert day["psi"]["brightness"] > day["limits"]["brightness"] >= 0.25 > day["psi"]["class"]
    judged = {"known": 2, "right": 1, "accuracy": 0.5, "sensitivity": 0.5, "specificity": None}
    assert day["truths"] == found["truths"] == judged


def test_a_truth_is_shown_also_on_a_day_without_counted_predictions(
    client: FlaskClient, sessions: Sessions, drifted: ModelVersion
) -> None:
    """As where a result was taken over from an equal one: nothing is counted on its day."""
    today = dt.datetime.now(dt.UTC).date()
    yesterday = today - dt.timedelta(days=1)
    with sessions.begin() as session:
        session.execute(update(PredictionCount).values(day=yesterday))
    found = client.get("/models/champion/drift").get_json()
    assert [(day["day"], day["scans"], day["truths"]["known"]) for day in found["days"]] == [
        (str(yesterday), 200, 0),
        (str(today), 0, 2),
    ]
    assert (found["days"][1]["rejected_share"], found["days"][1]["since"], found["days"][1]["psi"]) == (None, None, {})
    assert (found["latest"], found["drifted"], found["truths"]["accuracy"]) == (str(yesterday), True, 0.5)
    shown = gauges(client)
    assert (shown["renalq_model_accuracy", "1"], shown["renalq_rejected_share", "1"]) == (0.5, 0.1)
    assert shown["renalq_drift_psi", "brightness", "1"] > shown["renalq_drift_limit", "brightness", "1"]


def test_the_picture_reaches_as_far_as_the_latest_truth(
    client: FlaskClient, sessions: Sessions, drifted: ModelVersion
) -> None:
    last_of_three = (charts.WIDTH - charts.LEFT - charts.RIGHT) / 3
    right = charts.WIDTH - charts.RIGHT

    def accuracy_is_seen() -> bool:
        picture = Image.open(io.BytesIO(client.get("/models/champion/drift?days=3", headers=PNG).data)).convert("RGB")
        bottom = picture.height / charts.SCALE - drift_chart.FOOT
        today = (right - last_of_three, bottom - drift_chart.PANEL, right, bottom)
        shown = picture.crop([round(at * charts.SCALE) for at in today]).getcolors(2**24)
        return bytes.fromhex(charts.COLOURS[0][1:]) in {bytes(colour) for _, colour in shown}

    assert accuracy_is_seen()
    with sessions.begin() as session:
        session.execute(update(PredictionCount).values(day=PredictionCount.day - 2))
    assert accuracy_is_seen()


def test_without_predictions_or_a_reference_there_is_nothing_to_say(
    client: FlaskClient, champion: ModelVersion
) -> None:
    found = client.get("/models/champion/drift").get_json()
    assert (found["days"], found["drifted"], found["latest"], found["reference_scans"]) == ([], False, None, None)
    assert found["truths"]["accuracy"] is None


def test_drift_of_what_is_not_there_or_is_anothers_is_404(
    client: FlaskClient, stranger: FlaskClient, champion: ModelVersion
) -> None:
    for path in ("/models/2/drift", "/models/none/drift"):
        assert_problem(client.get(path), 404)
    for path in ("/models/1/drift", "/models/champion/drift"):
        assert_problem(stranger.get(path), 404)
    for days in ("0", "366", "x"):
        assert_problem(client.get(f"/models/1/drift?days={days}"), 422)


def test_the_picture_shows_the_figures_and_marks_what_has_drifted(
    client: FlaskClient, champion: ModelVersion, drifted: ModelVersion
) -> None:
    answer = client.get("/models/champion/drift", headers=PNG)
    assert (answer.status_code, answer.mimetype) == (200, "image/png")
    picture = Image.open(io.BytesIO(answer.data))
    assert picture.width == charts.WIDTH * charts.SCALE
    colours = {colour for _, colour in picture.convert("RGB").getcolors(2**24)}
    assert {bytes.fromhex(colour[1:]) for colour in charts.COLOURS[:2]} <= set(map(bytes, colours))
    for days in (1, 7, 365):
        assert client.get(f"/models/champion/drift?days={days}", headers=PNG).status_code == 200


def test_there_is_a_picture_also_of_nothing(client: FlaskClient, champion: ModelVersion) -> None:
    assert client.get("/models/champion/drift", headers=PNG).mimetype == "image/png"


@pytest.mark.parametrize(("most", "step"), [(0.5, 0.1), (1.0, 0.2), (0.53, 0.2), (7.0, 2.0), (26.0, 10.0)])
def test_a_scale_has_few_round_steps(most: float, step: float) -> None:
    assert drift_chart._step(most) == pytest.approx(step)


# --- where it is told without being asked ---


def test_the_champion_and_the_jobs_that_it_predicts_say_that_it_has_drifted(
    client: FlaskClient, sessions: Sessions, champion: ModelVersion, drifted: ModelVersion
) -> None:
    with sessions.begin() as session:
        job_id = builders.make_job(session, JobKind.PREDICT, scans=1, model_id=champion.id).id
        training_id = builders.make_job(session).id
    before = client.get(f"/jobs/{job_id}")
    assert (before.get_json()["model_drift"], client.get("/models/champion").get_json()["drift"]) == (None, None)
    with sessions.begin() as session:
        drift.check_drift(session, DriftPolicy(0.25, 30))
    told = {"day": str(dt.datetime.now(dt.UTC).date()), "figures": ["brightness"]}
    after = client.get(f"/jobs/{job_id}", headers={"If-None-Match": before.headers["ETag"]})
    assert after.status_code == 200, "a client that polls with the tag hears of it"
    assert (after.get_json()["model_drift"], client.get("/models/champion").get_json()["drift"]) == (told, told)
    listed = {job["id"]: job["model_drift"] for job in client.get("/jobs").get_json()["data"]}
    assert (listed[str(job_id)], listed[str(training_id)]) == (told, None)
    with sessions.begin() as session:
        session.get_one(ModelVersion, champion.id).champion = False
    assert client.get(f"/jobs/{job_id}").get_json()["model_drift"] is None, "of the champion only"
    assert client.get("/models/1").get_json()["drift"] is None


# --- Prometheus ---


def gauges(client: FlaskClient) -> dict[tuple[str, ...], float]:
    """What Prometheus would read: name and labels → value."""
    text = client.get("/metrics").get_data(as_text=True)
    return {
        (sample.name, *sample.labels.values()): sample.value for family in parsed(text) for sample in family.samples
    }


def test_prometheus_reads_the_tenants_own_figures(
    client: FlaskClient, stranger: FlaskClient, sessions: Sessions, drifted: ModelVersion
) -> None:
    with sessions.begin() as session:
        builders.make_job(session, JobKind.PREDICT_BATCH, scans=3, chunk=1, tenant_id=TENANT)
        builders.make_job(session, JobKind.PREDICT_BATCH, scans=3, tenant_id="a third")
    found = gauges(client)
    assert found["renalq_champion_version",] == 1
    assert found["renalq_drift_psi", "brightness", "1"] > found["renalq_drift_limit", "brightness", "1"]
    assert (found["renalq_rejected_share", "1"], found["renalq_model_accuracy", "1"]) == (0.1, 0.5)
    assert (found["renalq_jobs", "queued"], found["renalq_jobs", "running"]) == (1, 0)
    assert found["renalq_units", "queued"] == 3
    theirs = gauges(stranger)
    assert (theirs["renalq_jobs", "queued"], "renalq_champion_version" in str(theirs)) == (0, False)


def test_prometheus_gets_the_format_that_it_asks_for(client: FlaskClient, drifted: ModelVersion) -> None:
    assert client.get("/metrics").mimetype == "text/plain"
    newer = client.get("/metrics", headers={"Accept": "application/openmetrics-text;version=1.0.0"})
    assert newer.mimetype == "application/openmetrics-text"
    names = {family.name for family in openmetrics(newer.get_data(as_text=True))}
    assert {"renalq_drift_psi", "renalq_rejected_share", "renalq_model_accuracy"} <= names


def test_prometheus_needs_a_key(client: FlaskClient, door: Door) -> None:
    assert_problem(client.application.test_client().get("/metrics"), 401)
    assert_problem(door.client("models:write").get("/metrics"), 403)
    assert door.client("jobs:read").get("/metrics").status_code == 200
