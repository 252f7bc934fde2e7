"""What a client sees of explanations: where they are, for which classes, and why there are none."""

import csv
import io
import json
import uuid
from typing import Any

import pytest
from flask.testing import FlaskClient

from jobs.db import Sessions
from jobs.queue import explanations, lifecycle
from jobs.queue.explanations import BLANK_NOTE, HEATMAP, OVERLAY, artifact_name
from jobs.results import queries
from jobs.retention.results import expire
from jobs.settings import Settings
from jobs.states import JobKind
from jobs.storage.blobs import BlobStore
from jobs.tables import Job, ModelVersion
from tests import builders
from tests.api.conftest import file, png
from tests.api.test_errors import assert_problem


class Batch:
    """Two scans that were found to be tumours, in one unit that is held: whoever asks, sees what is written so far."""

    def __init__(self, sessions: Sessions, settings: Settings, champion: ModelVersion, explain: bool | str) -> None:
        self.sessions, self.store = sessions, BlobStore(settings.artifacts)
        with sessions.begin() as session:
            new: dict[str, Any] = {"model_id": champion.id, "model_version": 1, "params": {"explain": explain}}
            self.job = builders.make_job(session, JobKind.PREDICT_BATCH, scans=2, **new)
            self.held = builders.claim(session, builders.units_of(session, self.job)[0])
            outcomes = builders.outcomes_of(session, self.held)
            lifecycle.succeed(session, self.held, outcomes=outcomes, enqueue_explanations=True)
            self.held = builders.claim(session, builders.units_of(session, self.job)[1])

    def explained(self, *made: tuple[int, str, str | None]) -> None:
        """Write these down: ordinal, part, and the word of a class that was not found."""
        blob = self.store.put(io.BytesIO(png()))
        with self.sessions.begin() as session:
            explanations.save(session, self.held, [(artifact_name(*one), blob) for one in made])

    def cancel(self) -> None:
        """Somebody cancels the job, and the worker stops."""
        with self.sessions.begin() as session:
            lifecycle.cancel(session, self.job.tenant_id, self.job.id)
            lifecycle.confirm_cancel(session, self.held, [])

    def end(self) -> None:
        """Nothing more will be explained."""
        with self.sessions.begin() as session:
            lifecycle.succeed(session, self.held)

    def results(self, client: FlaskClient) -> list[dict]:
        """As the client sees them."""
        return client.get(f"/jobs/{self.job.id}/results").get_json()["data"]


def test_what_failed_without_failing_a_scan_is_a_warning_and_no_error(
    client: FlaskClient, sessions: Sessions, settings: Settings, champion: ModelVersion
) -> None:
    batch = Batch(sessions, settings, champion, True)
    with sessions.begin() as session:
        lifecycle.fail(session, batch.held, builders.BROKEN)
    told = client.get(f"/jobs/{batch.job.id}").get_json()
    assert (told["state"], told["error"], told["warnings"]) == ("succeeded", None, [builders.BROKEN])


def test_explanations_that_are_deleted_while_they_are_read_are_no_half_an_answer(
    client: FlaskClient, sessions: Sessions, settings: Settings, champion: ModelVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = Batch(sessions, settings, champion, True)
    batch.explained((0, OVERLAY, None), (1, OVERLAY, None))
    batch.end()
    read = queries.results

    def read_and_expire(*of: Any, **more: Any) -> Any:
        found = read(*of, **more)
        with sessions.begin() as session:
            expire(session, 1e-9, rows=3)  # both results, and one explanation
        return found

    monkeypatch.setattr(queries, "results", read_and_expire)
    assert_problem(client.get(f"/jobs/{batch.job.id}/results"), 410, "RESULTS_EXPIRED")


def shown(result: dict) -> dict:
    """What a result says of explanations."""
    return {name: value for name, value in result.items() if name.startswith(("explanation", "heatmap"))}


def test_a_result_says_where_overlay_and_heatmap_are_once_they_are_made(
    client: FlaskClient, stranger: FlaskClient, sessions: Sessions, settings: Settings, champion: ModelVersion
) -> None:
    batch = Batch(sessions, settings, champion, explain=True)
    assert [shown(result) for result in batch.results(client)] == [{}, {}]
    batch.explained((0, OVERLAY, None), (0, HEATMAP, None))
    first, second = batch.results(client)
    folder = f"/jobs/{batch.job.id}/artifacts/explanations"
    assert shown(first) == {"explanation": f"{folder}/000000.png", "heatmap": f"{folder}/000000.heatmap.png"}
    assert shown(second) == {}
    answer = client.get(first["heatmap"])
    assert (answer.status_code, answer.mimetype, answer.data) == (200, "image/png", png())
    assert_problem(stranger.get(first["heatmap"]), 404)
    batch.end()
    text = client.get(f"/jobs/{batch.job.id}/results", headers={"Accept": "text/csv"}).text
    row, other = csv.DictReader(io.StringIO(text))
    assert (row["explanation"], row["heatmap"], row["explanation_note"]) == (*shown(first).values(), "")
    assert other["explanation_note"].startswith("It could not be explained")
    lines = client.get(f"/jobs/{batch.job.id}/results", headers={"Accept": "application/x-ndjson"}).text.splitlines()
    assert shown(json.loads(lines[0])) == shown(first)


def test_all_tells_overlay_and_heatmap_of_each_class(
    client: FlaskClient, sessions: Sessions, settings: Settings, champion: ModelVersion
) -> None:
    batch = Batch(sessions, settings, champion, explain="all")
    batch.explained(*((0, part, word) for part in (OVERLAY, HEATMAP) for word in (None, "Normal")))
    first, second = batch.results(client)
    folder = f"/jobs/{batch.job.id}/artifacts/explanations"
    assert first["label"] == "Tumor"
    assert first["explanations"] == {
        "Normal": {"overlay": f"{folder}/000000.Normal.png", "heatmap": f"{folder}/000000.Normal.heatmap.png"},
        "Tumor": {"overlay": first["explanation"], "heatmap": first["heatmap"]},
    }
    assert client.get(first["explanations"]["Normal"]["overlay"]).data == png()
    assert shown(second) == {}


def test_where_nothing_speaks_for_a_class_the_result_says_so(
    client: FlaskClient, sessions: Sessions, settings: Settings, champion: ModelVersion
) -> None:
    batch = Batch(sessions, settings, champion, explain="all")
    batch.explained(
        *((0, part, None) for part in (OVERLAY, HEATMAP, BLANK_NOTE)),
        *((0, part, "Normal") for part in (OVERLAY, HEATMAP)),
        *((1, part, "Normal") for part in (OVERLAY, HEATMAP, BLANK_NOTE)),
        *((1, part, None) for part in (OVERLAY, HEATMAP)),
    )
    first, second = batch.results(client)
    assert first["explanation_note"] == first["explanations"]["Tumor"]["note"]
    assert "0 everywhere" in first["explanation_note"]
    assert "note" not in first["explanations"]["Normal"]
    assert "explanation_note" not in second
    assert "0 everywhere" in second["explanations"]["Normal"]["note"]


def test_what_will_not_be_explained_any_more_says_so(
    client: FlaskClient, sessions: Sessions, settings: Settings, champion: ModelVersion
) -> None:
    batch = Batch(sessions, settings, champion, explain=True)
    batch.explained((1, OVERLAY, None))  # as an earlier version wrote it
    batch.end()
    first, second = batch.results(client)
    assert set(shown(first)) == {"explanation_note"}
    assert "Submit it again" in first["explanation_note"]
    assert set(shown(second)) == {"explanation"}


def test_what_was_not_explained_since_the_job_was_cancelled_says_so(
    client: FlaskClient, sessions: Sessions, settings: Settings, champion: ModelVersion
) -> None:
    batch = Batch(sessions, settings, champion, explain=True)
    batch.explained((0, OVERLAY, None))
    batch.cancel()
    first, second = batch.results(client)
    assert set(shown(first)) == {"explanation"}
    assert "the job was cancelled" in second["explanation_note"]


@pytest.mark.parametrize("size", [(65_536, 1), (1, 65_536)])
def test_a_scan_longer_than_any_scanner_makes_is_refused_like_one_of_too_many_pixels(
    client: FlaskClient, size: tuple[int, int]
) -> None:
    """Its explanation would take memory for each row and column."""
    refused = (client.post("/scans", data={"file": file(png(declared=each))}) for each in (size, (8_000, 7_000)))
    long, large = (assert_problem(answer, 422) for answer in refused)
    assert long["code"] == large["code"]
    assert "at most 65535" in long["detail"]


def test_without_being_asked_for_explanations_nothing_is_said_of_them(
    client: FlaskClient, sessions: Sessions, settings: Settings, champion: ModelVersion
) -> None:
    batch = Batch(sessions, settings, champion, explain=False)
    batch.end()
    assert [shown(result) for result in batch.results(client)] == [{}, {}]


@pytest.mark.usefixtures("champion")
@pytest.mark.parametrize(
    ("sent", "kept"), [("true", True), ("all", "all"), ("false", None), (True, True), (False, None)]
)
def test_explain_is_true_false_or_all(client: FlaskClient, sessions: Sessions, sent: object, kept: object) -> None:
    scan_id = client.post("/scans", data={"file": file(png())}).get_json()["id"]
    answers = [client.post("/jobs/predict", json={"scan_id": scan_id, "explain": sent})]
    answers.append(client.post("/jobs/predict/batch", json={"scan_ids": [scan_id], "explain": sent}))
    if isinstance(sent, str):
        answers.append(client.post("/jobs/predict", data={"file": file(png()), "explain": sent}))
        row = json.dumps({"scan_id": scan_id})
        query = f"/jobs/predict/batch?explain={sent}"
        answers.append(client.post(query, data=row, content_type="application/x-ndjson"))
    for answer in answers:
        assert answer.status_code == 202, answer.get_json()
        with sessions() as session:
            assert session.get_one(Job, uuid.UUID(answer.get_json()["id"])).params.get("explain") == kept


@pytest.mark.usefixtures("champion")
@pytest.mark.parametrize("wrong", ["ALL", "perhaps", ["all"], 7, {}])
def test_any_other_word_is_422_with_its_pointer(client: FlaskClient, wrong: object) -> None:
    body = {"scan_id": str(uuid.uuid4()), "explain": wrong}
    problem = assert_problem(client.post("/jobs/predict", json=body), 422)
    assert problem["errors"][0]["pointer"] == "/explain"


@pytest.mark.usefixtures("champion")
def test_the_same_request_again_is_the_same_job_and_another_explanation_is_another_request(
    client: FlaskClient,
) -> None:
    scan_id, key = client.post("/scans", data={"file": file(png())}).get_json()["id"], {"Idempotency-Key": "k1"}
    first, again = (
        client.post("/jobs/predict", json={"scan_id": scan_id, "explain": "all"}, headers=key) for _ in range(2)
    )
    assert first.get_json()["id"] == again.get_json()["id"]
    other = client.post("/jobs/predict", json={"scan_id": scan_id, "explain": True}, headers=key)
    assert_problem(other, 422, "IDEMPOTENCY_KEY_REUSED")
