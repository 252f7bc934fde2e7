"""Pathology's word on scans: told, corrected, shown, and made a dataset of."""

import io
import re
import uuid
import zipfile
from dataclasses import replace
from typing import Any

import pytest
from flask.testing import FlaskClient
from sqlalchemy import func, select, text

from jobs.datasets.from_feedback import LabelledScan, write_zip
from jobs.db import Sessions
from jobs.errors import Invalid
from jobs.models import feedback
from jobs.queue import lifecycle
from jobs.queue.outcomes import ScanOutcome
from jobs.queue.submission import NewJob, NewResult, submit
from jobs.results import queries
from jobs.retention.results import expire
from jobs.settings import Settings
from jobs.states import JobKind, JobState
from jobs.storage.blobs import BlobStore
from jobs.tables import Dataset, ModelVersion, Scan, Truth
from tests import builders
from tests.api.conftest import Door, png
from tests.api.test_errors import assert_problem
from tests.builders import TENANT

Told = tuple[str, list[str]]
"""A job's id, and its scans'."""


@pytest.fixture
def batch(sessions: Sessions, settings: Settings, champion: ModelVersion) -> Told:
    """Five stored scans, predicted as Tumor but for the last, which failed; the first two are of one patient."""
    store, keys = BlobStore(settings.artifacts), ("Ann/1", "Ann/1", "Bob", None, None)
    blobs = [store.put(io.BytesIO(png(shade=10 + number))) for number in range(5)]
    with sessions.begin() as session:
        kind = {"tenant_id": TENANT, "media_type": "image/png", "width": 8, "height": 8}
        scans = [Scan(sha256=blob.sha256, size=blob.size, **kind) for blob in blobs]
        session.add_all(scans)
        session.flush()
        results = [NewResult(scan.id, "secret.png", patient=key) for scan, key in zip(scans, keys, strict=True)]
        new = NewJob(TENANT, JobKind.PREDICT_BATCH, builders.LANES[JobKind.PREDICT_BATCH], model_id=champion.id)
        job = submit(session, new, results)
        held = builders.claim(session, builders.units_of(session, job)[0])
        good = {"label": "Tumor", "confidence": 0.9, "probabilities": {"Tumor": 0.9}, "disposition": "tumor"}
        lifecycle.succeed(
            session,
            held,
            outcomes=[*(ScanOutcome(n, **good) for n in range(4)), ScanOutcome(4, error=builders.BROKEN)],
        )
        return str(job.id), [str(scan.id) for scan in scans]


def path(job_id: str, scan_id: str) -> str:
    return f"/jobs/{job_id}/results/{scan_id}/truth"


def tell(client: FlaskClient, batch: Told, number: int, label: str = "Tumor") -> dict[str, Any]:
    answer = client.post(path(batch[0], batch[1][number]), json={"label": label})
    assert answer.status_code == 201, answer.get_json()
    return answer.get_json()


def test_a_truth_is_told_corrected_and_shown(client: FlaskClient, sessions: Sessions, batch: Told) -> None:
    job_id, scans = batch
    assert_problem(client.get(path(job_id, scans[0])), 404, "NOT_FOUND")
    first = tell(client, batch, 0)
    assert (first["label"], first["predicted"], first["right"], first["disposition"]) == (*["Tumor"] * 2, True, "tumor")
    assert (first["job_id"], first["scan_id"], first["confidence"]) == (job_id, scans[0], 0.9)
    corrected = tell(client, batch, 0, "Normal")
    assert corrected["right"] is False
    assert client.get(path(job_id, scans[0])).get_json() == corrected
    rows = client.get(f"/jobs/{job_id}/results").get_json()["data"]
    assert [row.get("truth") for row in rows] == ["Normal", None, None, None, None]
    lines = client.get(f"/jobs/{job_id}/results", headers={"Accept": "text/csv"}).get_data(as_text=True).splitlines()
    header, line = lines[0].split(","), lines[1].split(",")
    assert (line[header.index("truth")], line[header.index("disposition")]) == ("Normal", "tumor")
    with sessions() as session:
        assert session.scalar(select(func.count()).select_from(Truth)) == 2, "what was said stays on record"
        assert all(truth.by_key for truth in session.scalars(select(Truth)))


def test_a_truth_that_cannot_be_is_refused_with_the_reason(
    client: FlaskClient, stranger: FlaskClient, door: Door, sessions: Sessions, batch: Told
) -> None:
    job_id, scans = batch
    wrong = assert_problem(client.post(path(job_id, scans[0]), json={"label": "Stone"}), 422)
    assert wrong["errors"] == [
        {"pointer": "/label", "detail": "The model's classes are Normal, Tumor: send one of them.", "in": "body"}
    ]
    assert_problem(client.post(path(job_id, scans[0]), json={}), 422)
    assert_problem(client.post(path(job_id, scans[4]), json={"label": "Tumor"}), 409, "WRONG_STATE")
    for other in (str(uuid.uuid4()), "no-id"):
        assert_problem(client.post(path(job_id, other), json={"label": "Tumor"}), 404, "NOT_FOUND")
    for verb in (stranger.post, stranger.get):
        assert_problem(verb(path(job_id, scans[0]), json={"label": "Tumor"}), 404)
    assert_problem(door.client("jobs:read").post(path(job_id, scans[0]), json={"label": "Tumor"}), 403)
    with sessions.begin() as session:
        training = builders.make_job(session, state=JobState.SUCCEEDED).id
    for verb in (client.post, client.get):
        assert_problem(verb(path(str(training), scans[0]), json={"label": "Tumor"}), 409, "NO_RESULTS")


def test_a_truth_is_of_one_slice_and_so_of_no_file_that_holds_several(
    client: FlaskClient, sessions: Sessions, batch: Told
) -> None:
    """It would be compared with the answer to the first frame, where a tumour may not be."""
    job_id, scans = batch
    with sessions.begin() as session:
        model = session.scalars(select(ModelVersion.id)).one()
        new = NewJob(TENANT, JobKind.PREDICT_BATCH, builders.LANES[JobKind.PREDICT_BATCH], model_id=model)
        several = submit(session, new, [NewResult(uuid.UUID(scans[0]), "volume.dcm", frames=2)])
        good = {"label": "Tumor", "confidence": 0.9, "probabilities": {"Tumor": 0.9}, "disposition": "tumor"}
        held = builders.claim(session, builders.units_of(session, several)[0])
        lifecycle.succeed(session, held, outcomes=[ScanOutcome(n, **good) for n in range(2)])
        of_frames = str(several.id)
    problem = assert_problem(client.post(path(of_frames, scans[0]), json={"label": "Tumor"}), 409, "WRONG_STATE")
    assert "holds several slices" in problem["detail"]
    assert tell(client, batch, 0)["job_id"] == job_id


def test_truths_outlive_the_results(client: FlaskClient, sessions: Sessions, batch: Told) -> None:
    tell(client, batch, 0)
    with sessions.begin() as session:
        expire(session, 1e-9)
    assert client.get(path(batch[0], batch[1][0])).get_json()["label"] == "Tumor"
    assert_problem(client.post(path(batch[0], batch[1][1]), json={"label": "Tumor"}), 410, "RESULTS_EXPIRED")


def test_to_find_the_result_a_job_of_many_is_not_read_through(sessions: Sessions, champion: ModelVersion) -> None:
    read = "SELECT seq_tup_read + idx_tup_fetch FROM pg_stat_xact_user_tables WHERE relname = 'scan_results'"
    with sessions.begin() as session:
        job = builders.make_job(session, JobKind.PREDICT_BATCH, JobState.SUCCEEDED, 500, 500, model_id=champion.id)
        scan_id = session.scalars(select(Scan.id).order_by(Scan.id.desc()).limit(1)).one()
    with sessions.begin() as session:
        session.execute(text("ANALYZE"))
        view = queries.job(session, TENANT, job.id)
        before = session.scalars(text(read)).one()
        feedback.record(session, view, scan_id, "Tumor")
        assert session.scalars(text(read)).one() - before < 10


def test_a_truth_is_told_also_of_a_result_that_was_taken_over(
    client: FlaskClient, sessions: Sessions, batch: Told, champion: ModelVersion
) -> None:
    again = singly(sessions, champion, batch[1][2], cached=True)
    assert tell(client, (again, batch[1]), 2)["job_id"] == again


def test_a_key_makes_one_truth_of_two_requests(client: FlaskClient, sessions: Sessions, batch: Told) -> None:
    for _ in range(2):
        headers = {"Idempotency-Key": "once"}
        client.post(path(batch[0], batch[1][0]), json={"label": "Tumor"}, headers=headers)
    with sessions() as session:
        assert session.scalar(select(func.count()).select_from(Truth)) == 1


# --- a dataset of truths ---


def made(client: FlaskClient, sessions: Sessions, settings: Settings, **wanted: Any) -> dict[str, bytes]:
    """The files of the dataset that is made."""
    answer = client.post("/datasets", json={"name": "from pathology", "truths": wanted})
    assert answer.status_code == 202, answer.get_json()
    found = answer.get_json()
    assert (found["name"], found["state"]) == ("from pathology", "checking")
    assert client.get(f"/jobs/{found['job_id']}").get_json()["kind"] == "ingest"
    with sessions() as session:
        sha256 = session.get_one(Dataset, uuid.UUID(found["id"])).archive_sha256
    with zipfile.ZipFile(BlobStore(settings.artifacts).open(sha256)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    listed = files.pop("patients.csv", b"").decode().splitlines()[1:]
    keyed = [(name, match[1]) for name in files if (match := re.search(r"/patient_(\d+)/", name))]
    assert listed == [f"{name},{number}" for name, number in keyed], "the check of a dataset goes by it first"
    return files


def test_known_truths_become_a_dataset_with_a_folder_for_each_class(
    client: FlaskClient, sessions: Sessions, settings: Settings, batch: Told
) -> None:
    for number, label in enumerate(("Tumor", "Tumor", "Normal", "Normal")):
        tell(client, batch, number, label)
    tell(client, batch, 1, "Normal")
    files = made(client, sessions, settings)
    assert sorted(files.values()) == sorted(png(shade=10 + number) for number in range(4))
    labels = {content: name.split("/")[0] for name, content in files.items()}
    assert [labels[png(shade=10 + number)] for number in range(4)] == ["Tumor", "Normal", "Normal", "Normal"]
    assert made(client, sessions, settings) == files


def test_scans_of_one_patient_stay_together_and_nobody_reads_who_it_is(
    client: FlaskClient, sessions: Sessions, settings: Settings, batch: Told
) -> None:
    from ml.image.dataset.patients import patient_of  # what the check of a dataset goes by

    for number in range(4):
        tell(client, batch, number)
    files = {content: name for name, content in made(client, sessions, settings).items()}
    names = [files[png(shade=10 + number)] for number in range(4)]
    patients = [patient_of(name.removeprefix("Tumor/"), None) for name in names]
    assert patients[0] == patients[1] != patients[2]
    assert None not in patients[:3]
    assert patients[3] is None, "nobody told, so DICOM may still tell"
    assert not re.search("Ann|Bob|secret", "".join(names))
    theirs = LabelledScan("a" * 64, 1, "application/dicom", "Tumor", "Bob").path("elsewhere")
    assert theirs.split("/")[1] != names[2].split("/")[1], "two tenants' patients are not to be linked"


def singly(sessions: Sessions, champion: ModelVersion, scan_id: str, cached: bool = False) -> str:
    """A prediction of this scan alone, with no key of its patient. Returns its job."""
    with sessions.begin() as session:
        new = NewJob(TENANT, JobKind.PREDICT, builders.LANES[JobKind.PREDICT], model_id=champion.id)
        job = submit(session, new, [NewResult(uuid.UUID(scan_id), "secret.png")])
        held = builders.claim(session, builders.units_of(session, job)[0])
        lifecycle.succeed(session, held, outcomes=[replace(builders.outcomes_of(session, held)[0], cached=cached)])
        return str(job.id)


def folders(client: FlaskClient, sessions: Sessions, settings: Settings, **wanted: Any) -> list[str]:
    """Where the scans of the batch lie in the dataset, first first."""
    files = {content: name for name, content in made(client, sessions, settings, **wanted).items()}
    places = [files.get(png(shade=10 + number), "") for number in range(4)]
    return [place.rpartition("/")[0] for place in places]


def test_scans_of_one_patient_stay_together_after_their_results_have_expired(
    client: FlaskClient, sessions: Sessions, settings: Settings, batch: Told
) -> None:
    for number in range(4):
        tell(client, batch, number)
    before = folders(client, sessions, settings)
    with sessions.begin() as session:
        expire(session, 1e-9)
    assert folders(client, sessions, settings) == before
    assert before[0] == before[1] != before[2] != before[3] == "Tumor"


@pytest.mark.parametrize("cached", [False, True])
def test_a_scan_that_was_predicted_singly_stays_with_its_patient(
    cached: bool, client: FlaskClient, sessions: Sessions, settings: Settings, batch: Told, champion: ModelVersion
) -> None:
    again = singly(sessions, champion, batch[1][0], cached)
    tell(client, (again, batch[1]), 0)
    tell(client, batch, 1)
    mine, others, *_ = folders(client, sessions, settings)
    assert mine == others != "Tumor"


def test_whose_scan_it_is_an_earlier_truth_tells_once_the_results_are_gone(
    client: FlaskClient, sessions: Sessions, settings: Settings, batch: Told, champion: ModelVersion
) -> None:
    tell(client, batch, 0)
    with sessions.begin() as session:
        expire(session, 1e-9)
    later = tell(client, (singly(sessions, champion, batch[1][0]), batch[1]), 0, "Normal")["at"]
    with sessions() as session:
        assert session.scalars(select(Truth.patient)).all() == ["Ann/1", "Ann/1"]
    assert folders(client, sessions, settings, since=later)[0].startswith("Normal/patient_")


def test_whose_scan_it_is_may_be_told_by_any_of_its_truths(
    client: FlaskClient, sessions: Sessions, settings: Settings, batch: Told
) -> None:
    tell(client, batch, 0)
    since = tell(client, batch, 0, "Normal")["at"]
    with sessions.begin() as session:  # as of truths that were told before they held it
        last = session.scalars(select(Truth).order_by(Truth.id.desc()).limit(1)).one()
        last.patient = None
    assert folders(client, sessions, settings, since=since)[0].startswith("Normal/patient_")


def test_truths_are_chosen_by_time_and_by_model(
    client: FlaskClient, sessions: Sessions, settings: Settings, batch: Told
) -> None:
    tell(client, batch, 0)
    later = tell(client, batch, 1)["at"]
    assert len(made(client, sessions, settings, since=later)) == 1
    assert len(made(client, sessions, settings, model="champion")) == 2
    nothing = client.post("/datasets", json={"truths": {"since": "2099-01-01T00:00:00Z"}})
    assert assert_problem(nothing, 422)["errors"][0]["pointer"] == "/truths"
    assert_problem(client.post("/datasets", json={"truths": {"model": "7"}}), 404)
    assert_problem(client.post("/datasets", json={"truths": {"from": "x"}}), 422)


def test_without_truths_there_is_no_dataset_and_the_answer_says_what_to_do(
    client: FlaskClient, stranger: FlaskClient, batch: Told
) -> None:
    tell(client, batch, 0)
    assert (
        "POST /jobs/ID/results/SCAN_ID/truth"
        in assert_problem(stranger.post("/datasets", json={"truths": {}}), 422)["detail"]
    )
    assert_problem(client.post("/datasets", json={"name": "what of"}), 422)
    assert_problem(client.post("/datasets", json={"truths": {}, "upload_id": str(uuid.uuid4())}), 422)


def test_more_than_could_be_uploaded_is_refused(client: FlaskClient, settings: Settings, batch: Told) -> None:
    tell(client, batch, 0)
    tell(client, batch, 1)
    mine = client.application.extensions["renalq"].settings
    mine.max_archive_members = 1
    assert "since" in assert_problem(client.post("/datasets", json={"truths": {}}), 422)["detail"]
    mine.max_archive_members, mine.max_upload_bytes = 10, 20
    assert_problem(client.post("/datasets", json={"truths": {}}), 413, "TOO_LARGE")


def test_a_scan_whose_bytes_are_gone_is_named(settings: Settings) -> None:
    gone = LabelledScan("a" * 64, 10, "image/tiff", "Tumor", None)
    with pytest.raises(Invalid, match="a" * 64):
        write_zip(io.BytesIO(), TENANT, [gone], BlobStore(settings.artifacts))
    assert gone.path(TENANT) == f"Tumor/scan-{'a' * 32}.tiff"
