"""Studies by REST: pages, CSV and NDJSON, who sees them; files of several frames become several results."""

import csv
import io
import json
import uuid
from base64 import b64encode
from dataclasses import replace
from typing import Any

import pytest
from flask.testing import FlaskClient
from sqlalchemy import select

from api.resources import legacy
from jobs.db import Sessions
from jobs.queue import lifecycle
from jobs.tables import Job, Json, ModelVersion, Scan, ScanResult
from tests import builders
from tests.api.conftest import Finish, file, png, zipped
from tests.api.test_errors import assert_problem
from tests.ml.raw_dicom import raw_dicom
from tests.ml.test_nifti import hounsfield, nifti

pytestmark = pytest.mark.usefixtures("champion")


def identity(study: int, number: int) -> Json:
    """As a worker reads it."""
    return {
        "study_uid": f"1.{study}", "series_uid": f"1.{study}.1", "sop_uid": f"1.{study}.1.{number}",
        "instance_number": number, "accession": f"ACC{study}", "patient_hash": f"hash{study}",
        "position_mm": -5.0 * number,
    }  # fmt: skip


def submitted(client: FlaskClient, files: dict[str, bytes], **data: Any) -> Json:
    """The job of a zip of these files."""
    body = {"files": [file(zipped(files), "a.zip")], **data}
    answer = client.post("/v1/jobs/predict/batch", data=body)
    assert answer.status_code == 202, answer.text
    return answer.get_json()


def ended(client: FlaskClient, sessions: Sessions, identities: list[Json]) -> str:
    """The path of a batch whose results have these identities."""
    job = submitted(client, {f"{number}.png": png(shade=number) for number in range(len(identities))})
    with sessions.begin() as session:
        (unit,) = builders.units_of(session, session.get_one(Job, uuid.UUID(job["id"])))
        held = builders.claim(session, unit)
        good = builders.outcomes_of(session, held)
        outcomes = [replace(one, identity=own) for one, own in zip(good, identities, strict=True)]
        lifecycle.succeed(session, held, outcomes=outcomes)
    return f"/v1/jobs/{job['id']}"


TWO_STUDIES = [identity(1, 2), identity(2, 1), identity(1, 1), identity(2, 2)]


def test_results_say_whose_they_are(client: FlaskClient, sessions: Sessions) -> None:
    row = client.get(f"{ended(client, sessions, TWO_STUDIES)}/results").get_json()["data"][0]
    known = {name: value for name, value in identity(1, 2).items() if name != "patient_hash"}
    assert {name: row[name] for name in known} == known
    assert row["patient"] == "hash1"
    assert "patient_hash" not in row


def test_there_is_one_answer_for_each_study(client: FlaskClient, sessions: Sessions) -> None:
    page = client.get(f"{ended(client, sessions, TWO_STUDIES)}/studies").get_json()
    assert (page["has_more"], page["next"]) == (False, None)
    assert [(one["study_uid"], one["ordinals"]) for one in page["data"]] == [("1.1", [0, 2]), ("1.2", [3, 1])]
    first = page["data"][0]
    assert (first["label"], first["disposition"], first["confidence"]) == ("Tumor", "tumor", pytest.approx(0.9))
    assert (first["accession"], first["patient"], first["series_uids"]) == ("ACC1", "hash1", ["1.1.1"])
    assert (first["slices"], first["used"], first["rejected"], first["failed"]) == (2, 2, 0, 0)
    assert {one["sop_uid"] for one in first["deciding"]} == {"1.1.1.1", "1.1.1.2"}
    assert first["pooling"]["chosen"] is False
    assert "names no pooling" in first["pooling"]["reason"]


def test_pages_streams_and_tables_say_the_same(client: FlaskClient, sessions: Sessions) -> None:
    path = f"{ended(client, sessions, TWO_STUDIES)}/studies"
    whole = client.get(path).get_json()["data"]
    one = client.get(f"{path}?limit=1").get_json()
    rest = client.get(f"{path}?limit=1&after={one['next']}").get_json()
    assert one["data"] + rest["data"] == whole
    lines = client.get(path, headers={"Accept": "application/x-ndjson"}).get_data(as_text=True)
    assert [json.loads(line) for line in lines.splitlines()] == whole
    table = client.get(path, headers={"Accept": "text/csv"}).get_data(as_text=True)
    rows = list(csv.DictReader(io.StringIO(table)))
    assert [row["study_uid"] for row in rows] == ["1.1", "1.2"]
    assert [float(row["probability_Tumor"]) for row in rows] == pytest.approx([0.9, 0.9])
    assert (rows[0]["pooling"], rows[0]["deciding"]) == ("top", "0 2")


def test_by_patient(client: FlaskClient, sessions: Sessions) -> None:
    same = [one | {"patient_hash": "p"} for one in TWO_STUDIES]
    (found,) = client.get(f"{ended(client, sessions, same)}/studies?by=patient").get_json()["data"]
    assert (found["study_uid"], found["study_uids"], found["slices"]) == (None, ["1.1", "1.2"], 4)
    assert_problem(client.get("/v1/jobs/x/studies?by=ward"), 422, "INVALID")


def test_a_study_is_found_by_its_owner(client: FlaskClient, stranger: FlaskClient, sessions: Sessions) -> None:
    path = ended(client, sessions, TWO_STUDIES)
    (found,) = client.get("/v1/studies/1.2").get_json()["data"]
    assert (f"/v1/jobs/{found['job_id']}", found["ordinals"]) == (path, [3, 1])
    assert_problem(stranger.get("/v1/studies/1.2"), 404, "NOT_FOUND")
    assert_problem(stranger.get(f"{path}/studies"), 404, "NOT_FOUND")
    for uid in ("1.3", "1.2%00", "x", "1" * 65):
        assert_problem(client.get(f"/v1/studies/{uid}"), 404, "NOT_FOUND")


def test_while_a_prediction_runs_there_is_nothing_yet(client: FlaskClient) -> None:
    job = submitted(client, {"a.png": png()})
    answer = client.get(f"/v1/jobs/{job['id']}/studies")
    assert answer.get_json() == {"data": [], "has_more": True, "next": "-1"}
    assert answer.headers["Retry-After"] == "1"
    assert job["links"]["studies"] == f"/v1/jobs/{job['id']}/studies"
    again = client.get(f"/v1/jobs/{job['id']}/studies?after={answer.get_json()['next']}")
    assert again.get_json() == answer.get_json()


def test_each_frame_and_each_slice_of_a_volume_has_a_result(client: FlaskClient, sessions: Sessions) -> None:
    values = hounsfield()
    files = {"a.dcm": raw_dicom(values), "b.nii.gz": nifti(values, packed=True), "c.png": png()}
    job = submitted(client, files)
    assert job["counts"]["total"] == 9
    with sessions.begin() as session:
        rows = session.execute(
            select(ScanResult.name, ScanResult.frame)
            .where(ScanResult.job_id == uuid.UUID(job["id"]))
            .order_by(ScanResult.ordinal)
        )
        numbered = [(name, frame) for name in ("a.dcm", "b.nii.gz") for frame in range(4)]
        assert [tuple(row) for row in rows] == [*numbered, ("c.png", None)]
        assert set(session.scalars(select(Scan.media_type))) == {
            "application/dicom", "application/x-nifti", "image/png",
        }  # fmt: skip


def test_stored_scans_and_manifests_have_frames_too(client: FlaskClient) -> None:
    stored = client.post("/v1/scans", data={"file": file(raw_dicom(hounsfield()), "a.dcm")}).get_json()
    by_id = client.post("/v1/jobs/predict/batch", json={"scan_ids": [stored["id"]]})
    assert by_id.get_json()["counts"]["total"] == 4
    rows = f"scan_id,study\n{stored['id']},ct-9\n"
    listed = client.post("/v1/jobs/predict/batch", data=rows, content_type="text/csv")
    assert listed.get_json()["counts"]["total"] == 4
    single = client.post("/v1/jobs/predict", json={"scan_id": stored["id"]})
    assert single.get_json()["counts"]["total"] == 1, "one answer for one scan, as ever"


def test_an_older_client_gets_as_many_answers_as_it_sent_images(
    client: FlaskClient, finish: Finish, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    real = legacy.predict_many

    def predict_many(body: Json) -> uuid.UUID:
        job_id = real(body)
        made.append(client.get(f"/v1/jobs/{job_id}").get_json()["counts"]["total"])
        finish(str(job_id))
        return job_id

    monkeypatch.setattr(legacy, "predict_many", predict_many)
    images = [b64encode(content).decode() for content in (raw_dicom(hounsfield()), png())]
    answer = client.post("/batch_predict", json={"images": images})
    assert (len(answer.get_json()), made) == (2, [2])


def test_jobs_are_found_by_the_clients_id_of_a_scan(client: FlaskClient, stranger: FlaskClient) -> None:
    job = client.post("/v1/jobs/predict", data={"file": file(png()), "custom_id": "acc-1"}).get_json()
    client.post("/v1/jobs/predict", data={"file": file(png()), "custom_id": "acc-2"})
    found = client.get("/v1/jobs?custom_id=acc-1").get_json()["data"]
    assert [one["id"] for one in found] == [job["id"]]
    assert stranger.get("/v1/jobs?custom_id=acc-1").get_json()["data"] == []
    assert client.get("/v1/jobs?custom_id=%00").status_code == client.get("/v1/jobs?metadata[a]=%00").status_code


def test_the_models_own_pooling_answers(client: FlaskClient, sessions: Sessions, champion: ModelVersion) -> None:
    pooling = {"method": "max", "k": 1, "threshold": 0.95, "chosen": True, "reason": "Chosen."}
    with sessions.begin() as session:
        model = session.get_one(ModelVersion, champion.id)
        model.metrics = {**model.metrics, "positive": "Tumor", "pooling": pooling}
    (first, _) = client.get(f"{ended(client, sessions, TWO_STUDIES)}/studies").get_json()["data"]
    assert (first["pooling"], first["label"], first["disposition"]) == (pooling, "Normal", "indeterminate")
    assert [one["ordinal"] for one in first["deciding"]] == [0]
