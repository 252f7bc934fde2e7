"""Predictions by REST: one scan, many, a zip, a dataset; broken ones among them."""

import base64
import csv
import io
import json
import uuid
from collections.abc import Iterator

import pytest
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from jobs.db import Sessions
from jobs.queue import lifecycle
from jobs.queue.leases import Claim
from jobs.settings import Settings
from jobs.states import JobKind, JobState
from jobs.storage.blobs import BlobStore
from jobs.tables import Dataset, Job, ModelVersion
from tests import builders
from tests.api.conftest import Finish, dicom, file, png, zipped
from tests.api.test_errors import assert_problem

pytestmark = pytest.mark.usefixtures("champion")

CSV_COLUMNS = [
    "scan_id", "name", "custom_id", "patient", "study", "state", "label", "confidence", "model_version", "engine",
    "cached", "explanation", "ordinal",
    "disposition", "reason", "ood_score", "truth", "heatmap", "explanation_note",
    "study_uid", "series_uid", "sop_uid", "instance_number", "accession", "position_mm", "frame",
    "probability_Normal", "probability_Tumor", "error_code", "error_detail",
]  # fmt: skip
"""The first line is what the first version had, in its order: some read them by position."""


def every_page(client: FlaskClient, path: str) -> Iterator[TestResponse]:
    """What any client does that knows `next` and `has_more` alone."""
    answer = client.get(path)
    yield answer
    while (page := answer.get_json())["has_more"]:
        answer = client.get(f"{path}&after={page['next']}")
        yield answer


def results(client: FlaskClient, job: dict, query: str = "") -> list[dict]:
    return client.get(f"{job['links']['results']}{query}").get_json()["data"]


def test_a_prediction_is_pinned_to_the_champion_of_its_submission(
    client: FlaskClient, champion: ModelVersion, finish: Finish
) -> None:
    more = {"custom_id": "case-7", "metadata": '{"ward": "3"}', "model": "champion"}
    answer = client.post("/jobs/predict", data={"file": file(png(), "Kidney 7.png"), **more})
    job = answer.get_json()
    assert answer.status_code == 202, job
    assert (job["kind"], job["model_version"], job["metadata"]) == ("predict", "1", {"ward": "3"})
    assert results(client, job) == []
    finish(job["id"])
    (result,) = results(client, job)
    assert result == {
        "ordinal": 0,
        "scan_id": result["scan_id"],
        "name": "Kidney 7.png",
        "custom_id": "case-7",
        "state": "succeeded",
        "label": "Tumor",
        "confidence": 0.9,
        "probabilities": {"Normal": 0.1, "Tumor": 0.9},
        "disposition": "tumor",
        "reason": None,
        "ood_score": 0.4,
        "model_version": "1",
        "engine": "torch-fp32",
        "cached": False,
    }
    assert client.get(job["links"]["self"]).get_json()["engines"] == ["torch-fp32"]


def test_base64_a_stored_scan_and_a_file_are_the_same_scan(client: FlaskClient, finish: Finish) -> None:
    stored = client.post("/scans", data={"file": file(png())}).get_json()["id"]
    text = base64.b64encode(png()).decode()
    bodies = [{"image": text}, {"image": f"data:image/png;base64,{text}"}, {"image": stored}, {"scan_id": stored}]
    jobs = [client.post("/jobs/predict", json=body).get_json() for body in bodies]
    jobs.append(client.post("/jobs/predict", data={"file": file(png())}).get_json())
    for job in jobs:
        finish(job["id"])
        assert results(client, job)[0]["scan_id"] == stored


def test_without_a_champion_the_answer_is_409(stranger: FlaskClient) -> None:
    assert_problem(stranger.post("/jobs/predict", data={"file": file(png())}), 409, "NO_CHAMPION")
    assert_problem(stranger.post("/jobs/predict", data={"file": file(b"text")}), 422, "NOT_AN_IMAGE")
    assert_problem(stranger.post("/jobs/predict", data={"file": file(png()), "model": "9"}), 404)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        b"GIF89a" + bytes(50),
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff\xe0" + bytes(30),
        bytes(128) + b"DICM",
        bytes(128) + b"DICM" + b"\xff" * 300,
        b"\x80\x04\x95" + bytes(60),
        b"%PDF-1.7",
        b"PK\x03\x04" + bytes(40),
        png(declared=(50_000, 50_000)),
        png(declared=(0, 10)),
        dicom(rows=60_000, columns=60_000),
    ],
    ids=["empty", "text", "gif", "png-cut", "jpeg-cut", "dicom-cut", "dicom-noise", "pickle", "pdf", "zip", "bomb",
         "no-width", "dicom-bomb"],
)  # fmt: skip
def test_what_is_no_image_is_422_with_its_pointer(client: FlaskClient, content: bytes) -> None:
    problem = assert_problem(client.post("/jobs/predict", data={"file": file(content)}), 422, "NOT_AN_IMAGE")
    assert problem["errors"][0]["pointer"] == "/file"
    body = {"image": base64.b64encode(content).decode()}
    problem = assert_problem(client.post("/jobs/predict", json=body), 422, "NOT_AN_IMAGE")
    assert problem["errors"][0]["pointer"] == "/image"


@pytest.mark.parametrize("text", ["!!", "abc", "ab=c", "\u00e9"])
def test_bad_base64_is_422_with_its_pointer(client: FlaskClient, text: str) -> None:
    problem = assert_problem(client.post("/jobs/predict", json={"image": text}), 422)
    assert problem["errors"][0]["pointer"] == "/image"


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"image": "aGk=", "scan_id": str(uuid.uuid4())},
        {"scan_id": "7"},
        {"scan_id": str(uuid.uuid4()), "model": "best"},
        {"scan_id": str(uuid.uuid4()), "model": "1\n"},
        {"scan_id": str(uuid.uuid4()), "explain": "perhaps"},
        {"scan_id": str(uuid.uuid4()), "lane": "train"},
        {"scan_id": str(uuid.uuid4()), "colour": "red"},
    ],
)
def test_an_ill_typed_prediction_is_422(client: FlaskClient, body: dict) -> None:
    assert assert_problem(client.post("/jobs/predict", json=body), 422)["errors"]


def test_a_file_that_is_sent_as_text_is_422(client: FlaskClient) -> None:
    problem = assert_problem(
        client.post("/jobs/predict", data={"file": "text"}, content_type="multipart/form-data"), 422
    )
    assert problem["errors"][0]["pointer"] == "/file"


def test_one_broken_scan_of_a_batch_fails_alone(client: FlaskClient, finish: Finish) -> None:
    files = [file(png(), "a.png"), file(b"broken", "b.png"), file(dicom(), "c.dcm"), file(png(shade=9), "d.png")]
    answer = client.post("/jobs/predict/batch", data={"files": files, "custom_ids": ["1", "2", "3", "4"]})
    job = answer.get_json()
    assert answer.status_code == 202, job
    assert job["counts"] == {"total": 4, "succeeded": 0, "failed": 1, "cancelled": 0, "pending": 3}
    finish(job["id"])
    assert client.get(f"/jobs/{job['id']}").get_json()["state"] == "partially_succeeded"
    found = results(client, job)
    assert [(one["name"], one["custom_id"], one["state"]) for one in found] == [
        ("a.png", "1", "succeeded"),
        ("b.png", "2", "failed"),
        ("c.dcm", "3", "succeeded"),
        ("d.png", "4", "succeeded"),
    ]
    assert found[1]["error"]["code"] == "NOT_AN_IMAGE"
    assert [one["name"] for one in results(client, job, "?state=failed")] == ["b.png"]


def test_a_batch_of_broken_scans_alone_has_failed_at_once(client: FlaskClient) -> None:
    job = client.post("/jobs/predict/batch", data={"files": [file(b"1"), file(b"2")]}).get_json()
    assert (job["state"], job["error"]["code"]) == ("failed", "ALL_SCANS_FAILED")


def test_a_zip_is_a_batch_of_its_files(client: FlaskClient) -> None:
    archive = zipped({"a/1.png": png(), "a/2.png": b"no", "__MACOSX/1.png": b"", "a/.DS_Store": b"", "b/": b""})
    answer = client.post("/jobs/predict/batch", data={"files": file(archive, "all.zip")})
    assert answer.get_json()["counts"]["total"] == 2
    assert [one["name"] for one in results(client, answer.get_json(), "?state=pending")] == ["a/1.png"]


def test_a_dataset_can_be_predicted_whole(client: FlaskClient, sessions: Sessions, settings: Settings) -> None:
    blob = BlobStore(settings.artifacts).put(io.BytesIO(zipped({"Normal/1.png": png(), "Tumor/2.png": png(shade=3)})))
    with sessions.begin() as session:
        dataset_id = builders.make_dataset(session).id
        session.get_one(Dataset, dataset_id).archive_sha256 = blob.sha256
    job = client.post("/jobs/predict/batch", json={"dataset_id": str(dataset_id)}).get_json()
    assert (job["counts"]["total"], job["dataset_id"]) == (2, str(dataset_id))


def test_stored_scans_are_predicted_in_the_given_order(client: FlaskClient, finish: Finish) -> None:
    ids = [client.post("/scans", data={"file": file(png(shade=shade))}).get_json()["id"] for shade in (1, 2, 3)]
    job = client.post("/jobs/predict/batch", json={"scan_ids": ids[::-1], "custom_ids": ["c", "b", "a"]}).get_json()
    finish(job["id"])
    assert [(one["scan_id"], one["custom_id"]) for one in results(client, job)] == list(
        zip(ids[::-1], "cba", strict=True)
    )
    unknown = str(builders.unknown_id())
    assert_problem(client.post("/jobs/predict/batch", json={"scan_ids": [*ids, unknown]}), 404)


@pytest.mark.parametrize(
    "body",
    [
        {"data": {}},
        {"data": {"colour": "red"}, "content_type": "multipart/form-data"},
        {"json": {}},
        {"json": {"scan_ids": []}},
        {"json": {"scan_ids": ["x"]}},
        {"json": {"scan_ids": [str(uuid.uuid4())], "custom_ids": ["1", "2"]}},
    ],
)
def test_a_batch_without_a_scan_is_422(client: FlaskClient, body: dict) -> None:
    if "data" in body:
        body = {"content_type": "multipart/form-data; boundary=x", "data": b"--x--\r\n"} | {"data": b"--x--\r\n"}
    assert_problem(client.post("/jobs/predict/batch", **body), 422)
    assert_problem(client.post("/jobs/predict/batch", data={"files": file(zipped({}), "empty.zip")}), 422)


def test_results_are_paged_and_streamed_alike(client: FlaskClient, sessions: Sessions, champion: ModelVersion) -> None:
    with sessions.begin() as session:
        job = builders.make_job(session, JobKind.PREDICT_BATCH, scans=5, model_id=champion.id, model_version=1)
        held = builders.claim(session, builders.units_of(session, job)[0])
        lifecycle.succeed(session, held, outcomes=builders.outcomes_of(session, held, failed=1))
    path = f"/jobs/{job.id}/results"
    first = client.get(f"{path}?limit=3").get_json()
    rest = client.get(f"{path}?limit=3&after={first['next']}").get_json()
    paged = first["data"] + rest["data"]
    assert [one["name"] for one in paged] == [f"{number}.png" for number in range(5)]
    assert (first["has_more"], rest["has_more"], rest["next"]) == (True, False, None)

    lines = client.get(path, headers={"Accept": "application/x-ndjson"})
    assert [json.loads(line) for line in lines.get_data(as_text=True).splitlines()] == paged
    table = client.get(path, headers={"Accept": "text/csv"}).get_data(as_text=True)
    assert table.splitlines()[0].split(",") == CSV_COLUMNS
    rows = list(csv.DictReader(io.StringIO(table)))
    assert [row["probability_Tumor"] for row in rows] == ["", "0.9", "0.9", "0.9", "0.9"]
    assert rows[0]["error_code"] == "BROKEN"


def test_who_follows_next_while_a_batch_runs_sees_each_result_once(
    client: FlaskClient, sessions: Sessions, champion: ModelVersion
) -> None:
    with sessions.begin() as session:
        job = builders.make_job(session, JobKind.PREDICT_BATCH, scans=9, chunk=3, model_id=champion.id, model_version=1)
        first, second, third = (builders.claim(session, unit) for unit in builders.units_of(session, job))
    path = f"/jobs/{job.id}/results?limit=2"

    def end(held: Claim) -> None:
        with sessions.begin() as session:
            lifecycle.succeed(session, held, outcomes=builders.outcomes_of(session, held, failed=1))

    # The first scans are done after others: results would be missed by who is past them.
    events = {1: lambda: end(second), 2: lambda: end(first), 8: lambda: end(third)}
    pages = []
    for answer in every_page(client, path):
        page = answer.get_json()
        assert (answer.headers.get("Retry-After") == "1") == (len(page["data"]) < 2 and page["has_more"])
        pages.append([one["name"] for one in page["data"]])
        events.get(len(pages), lambda: None)()
    assert pages[:2] == [[], []]
    failed = results(client, {"links": {"results": path}}, "&state=failed")
    assert [one["name"] for one in failed] == ["0.png", "3.png"]
    assert [name for page in pages for name in page] == [f"{number}.png" for number in range(9)]


@pytest.mark.parametrize(
    ("trials", "complaint"),
    [
        (
            {"openvino-int8": {"admitted": False, "reason": "F1 fell by 0.020"}},
            "not admitted for int8: F1 fell by 0.020",
        ),
        ({"openvino-fp32": {"admitted": True, "reason": "the reference"}}, "trained on a machine without it"),
    ],
)
def test_a_precision_that_the_version_is_not_admitted_for_is_422(
    client: FlaskClient, sessions: Sessions, champion: ModelVersion, trials: dict, complaint: str
) -> None:
    with sessions.begin() as session:
        session.get_one(ModelVersion, champion.id).metrics = {"f1": 0.9, "engines": trials}
    answer = client.post("/jobs/predict", data={"file": file(png()), "precision": "int8"})
    problem = assert_problem(answer, 422)
    assert complaint in problem["detail"]
    assert problem["errors"][0]["pointer"] == "/precision"
    job = client.post("/jobs/predict", data={"file": file(png()), "precision": "fp32"}).get_json()
    assert job["params"] == {"precision": "fp32"}


def test_a_name_that_a_spreadsheet_would_run_is_made_harmless(client: FlaskClient) -> None:
    job = client.post("/jobs/predict/batch", data={"files": [file(png(), "=cmd|x.png"), file(b"")]}).get_json()
    path = f"{job['links']['results']}?state=pending"
    table = client.get(path, headers={"Accept": "text/csv"}).get_data(as_text=True)
    assert "'=cmd|x.png" in table


def test_a_training_has_no_results(client: FlaskClient, sessions: Sessions) -> None:
    with sessions.begin() as session:
        job = builders.make_job(session, state=JobState.SUCCEEDED)
    for accept in ("application/json", "application/x-ndjson", "text/csv"):
        answer = client.get(f"/jobs/{job.id}/results", headers={"Accept": accept})
        assert_problem(answer, 409, "NO_RESULTS")


def test_the_lane_can_be_chosen(client: FlaskClient, sessions: Sessions) -> None:
    job = client.post("/jobs/predict", data={"file": file(png()), "lane": "batch"}).get_json()
    with sessions.begin() as session:
        assert session.get_one(Job, uuid.UUID(job["id"])).lane == "batch"


# --- scans ---


def test_the_same_bytes_are_the_same_scan(client: FlaskClient, stranger: FlaskClient) -> None:
    first = client.post("/scans", data={"file": file(png())})
    second = client.post("/scans", json={"image": base64.b64encode(png()).decode()})
    assert (first.status_code, second.status_code) == (201, 200)
    assert first.get_json() == second.get_json() == client.get(first.headers["Location"]).get_json()
    assert stranger.post("/scans", data={"file": file(png())}).get_json()["id"] != first.get_json()["id"]


@pytest.mark.parametrize(
    ("content", "kind", "size"),
    [
        (png(7, 9), "image/png", (7, 9)),
        (dicom(16, 12), "application/dicom", (12, 16)),
        (dicom(16, 12, deflate=True), "application/dicom", (12, 16)),
    ],
)
def test_a_scan_says_what_its_header_declares(client: FlaskClient, content: bytes, kind: str, size: tuple) -> None:
    scan = client.post("/scans", data={"file": file(content)}).get_json()
    assert (scan["media_type"], (scan["width"], scan["height"])) == (kind, size)


def test_every_dicom_sample_of_pydicom_has_the_size_that_pydicom_reads() -> None:
    from pathlib import Path

    import pydicom
    import pydicom.data

    from ml.spec.headers import dicom as dicom_header

    folder = Path(pydicom.data.__file__).parent / "test_files"
    pictures = 0
    for path in folder.rglob("*.dcm"):
        with path.open("rb") as stream:
            if not dicom_header.is_dicom(stream):
                continue
            read = pydicom.dcmread(path, stop_before_pixels=True, force=True)
            if "Rows" in read and read.get("Modality") not in ("SEG", "RTDOSE"):
                found = dicom_header.read(stream)
                assert found == (read.Rows, read.Columns, int(read.get("NumberOfFrames", 1))), path.name
                pictures += 1
            else:
                with pytest.raises(ValueError, match="no picture"):
                    dicom_header.read(stream)
    assert pictures > 50
