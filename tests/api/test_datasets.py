"""Datasets by REST, and zips that mean harm."""

import io
import stat
import uuid
import zipfile
from pathlib import Path

import pytest
from flask.testing import FlaskClient

from jobs.datasets import catalog
from jobs.db import Sessions
from jobs.errors import BadArchive
from jobs.queue import lifecycle
from jobs.retention import blobs
from jobs.settings import Settings
from jobs.states import JobState
from jobs.storage import archives
from jobs.storage.archives import Limits
from jobs.storage.blobs import BlobStore
from jobs.tables import Job
from tests import builders
from tests.api.conftest import file, png, zipped
from tests.api.test_errors import assert_problem

GOOD = {"Normal/1.png": png(), "Tumor/2.png": png(shade=3)}


def upload(client: FlaskClient, content: bytes | None = None, **more: str) -> dict:
    answer = client.post("/datasets", data={"file": file(content or zipped(GOOD), "kidneys.zip"), **more})
    assert answer.status_code == 202, answer.get_json()
    return answer.get_json()


def check(sessions: Sessions, dataset: dict, problems: list[str]) -> None:
    """What the ingest worker does with a dataset."""
    job_id = uuid.UUID(dataset["job_id"])
    with sessions.begin() as session:
        held = builders.claim(session, builders.units_of(session, session.get_one(Job, job_id))[0])
        catalog.finish_check(session, job_id, {"Normal": 1, "Tumor": 1}, None if problems else "d" * 64, problems)
        lifecycle.succeed(session, held)


def test_an_uploaded_dataset_is_checked_by_a_job(client: FlaskClient, sessions: Sessions) -> None:
    answer = client.post("/datasets", data={"file": file(zipped(GOOD), "kidneys.zip")})
    dataset = answer.get_json()
    assert (dataset["name"], dataset["state"], dataset["problems"]) == ("kidneys", "checking", [])
    assert answer.headers["Location"] == f"/datasets/{dataset['id']}"
    assert "Retry-After" in answer.headers
    job = client.get(f"/jobs/{dataset['job_id']}").get_json()
    assert (job["kind"], job["dataset_id"]) == ("ingest", dataset["id"])
    check(sessions, dataset, [])
    ready = client.get(f"/datasets/{dataset['id']}").get_json()
    assert (ready["state"], ready["classes"], ready["digest"]) == ("ready", {"Normal": 1, "Tumor": 1}, "d" * 64)
    assert client.post("/jobs/train", json={"dataset_id": dataset["id"]}).status_code == 202


def test_a_checked_dataset_shows_what_the_check_doubts(client: FlaskClient, sessions: Sessions) -> None:
    dataset = upload(client)
    before = client.get(f"/datasets/{dataset['id']}").get_json()
    assert (before["warnings"], before["report"]) == ([], None)
    report = {"inspection": {"modes": {"L": 2}}, "warnings": ["Normal has 10 times as many scans as Tumor."]}
    job_id = uuid.UUID(dataset["job_id"])
    with sessions.begin() as session:
        held = builders.claim(session, builders.units_of(session, session.get_one(Job, job_id))[0])
        catalog.finish_check(session, job_id, {"Normal": 1, "Tumor": 1}, "d" * 64, [], report)
        lifecycle.succeed(session, held)
    found = client.get(f"/datasets/{dataset['id']}").get_json()
    assert (found["state"], found["warnings"], found["report"]) == ("ready", report["warnings"], report)
    (listed,) = client.get("/datasets").get_json()["data"]
    assert listed["warnings"] == report["warnings"]
    assert "report" not in listed, "a page of them would be long"


def test_an_unfit_dataset_says_why(client: FlaskClient, sessions: Sessions) -> None:
    dataset = upload(client, name="mine")
    check(sessions, dataset, ["Normal/1.png cannot be decoded."])
    found = client.get(f"/datasets/{dataset['id']}").get_json()
    assert (found["name"], found["state"]) == ("mine", "invalid")
    assert found["problems"] == ["Normal/1.png cannot be decoded."]
    assert_problem(client.post("/jobs/train", json={"dataset_id": dataset["id"]}), 409, "DATASET_NOT_READY")


def test_a_dataset_whose_check_died_is_not_checked_for_ever(client: FlaskClient) -> None:
    dataset = upload(client)
    client.post(f"/jobs/{dataset['job_id']}/cancel")
    found = client.get(f"/datasets/{dataset['id']}").get_json()
    assert found["state"] == "invalid"
    assert dataset["job_id"] in found["problems"][0]


def test_a_check_that_is_told_twice_changes_nothing(client: FlaskClient, sessions: Sessions) -> None:
    dataset = upload(client)
    check(sessions, dataset, [])
    with sessions.begin() as session:
        catalog.finish_check(session, uuid.UUID(dataset["job_id"]), {}, None, ["late"])
    assert client.get(f"/datasets/{dataset['id']}").get_json()["state"] == "ready"


def test_an_empty_zip_goes_to_its_check(client: FlaskClient) -> None:
    assert upload(client, zipped({}))["state"] == "checking"


def test_datasets_are_listed_newest_first(client: FlaskClient) -> None:
    ids = [upload(client)["id"] for _ in range(3)]
    first = client.get("/datasets?limit=2").get_json()
    rest = client.get(f"/datasets?after={first['next']}").get_json()
    assert [one["id"] for one in first["data"] + rest["data"]] == ids[::-1]


def test_bytes_are_freed_with_the_last_dataset_that_needs_them(
    client: FlaskClient, stranger: FlaskClient, sessions: Sessions, settings: Settings
) -> None:
    mine, theirs = upload(client), upload(stranger)
    for dataset in (mine, theirs):
        check(sessions, dataset, [])
    store = BlobStore(settings.artifacts)
    with sessions.begin() as session:
        sha256 = catalog.get(session, builders.TENANT, uuid.UUID(mine["id"])).dataset.archive_sha256
    assert client.delete(f"/datasets/{mine['id']}").status_code == 202
    blobs.step(sessions, store, settings)
    assert store.exists(sha256)
    assert stranger.delete(f"/datasets/{theirs['id']}").status_code == 202
    blobs.step(sessions, store, settings)
    assert not store.exists(sha256)
    assert_problem(client.get(f"/datasets/{mine['id']}"), 404)
    assert_problem(client.get(f"/jobs/{mine['job_id']}"), 404)


def test_a_dataset_in_use_stays(client: FlaskClient, sessions: Sessions) -> None:
    dataset = upload(client)
    assert_problem(client.delete(f"/datasets/{dataset['id']}"), 409, "DATASET_IN_USE")
    check(sessions, dataset, [])
    job = client.post("/jobs/train", json={"dataset_id": dataset["id"]}).get_json()
    assert_problem(client.delete(f"/datasets/{dataset['id']}"), 409, "DATASET_IN_USE")
    client.post(f"/jobs/{job['id']}/cancel")
    assert client.delete(f"/datasets/{dataset['id']}").status_code == 202


# --- zips ---


def linked() -> bytes:
    """A zip with a symbolic link."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        info = zipfile.ZipInfo("Normal/link.png")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    return content.getvalue()


def encrypted() -> bytes:
    """A zip whose member says that it is encrypted."""
    content = bytearray(zipped({"Normal/1.png": png()}))
    content[content.index(b"PK\x01\x02") + 8] |= 1
    return bytes(content)


def lying() -> bytes:
    """A zip whose directory declares fewer bytes than come out."""
    content = bytearray(zipped({"Normal/1.png": bytes(5000)}))
    at = content.index(b"PK\x01\x02") + 24
    content[at : at + 4] = (10).to_bytes(4, "little")
    return bytes(content)


with pytest.warns(UserWarning, match="Duplicate"):
    TWICE = zipped([("Normal/1.png", png()), ("Normal/1.png", png(shade=1))])

ATTACKS = {
    "parent": (zipped({"../evil.png": png()}), "../evil.png"),
    "parent inside": (zipped({"a/../../evil.png": png()}), "a/../../evil.png"),
    "backslashes": (zipped({"..\\evil.png": png()}), "../evil.png"),
    "absolute": (zipped({"/etc/evil.png": png()}), "/etc/evil.png"),
    "drive": (zipped({"C:\\evil.png": png()}), "C:/evil.png"),
    "link": (linked(), "Normal/link.png"),
    "encrypted": (encrypted(), "Normal/1.png"),
    "nested": (zipped({"Normal/more.zip": zipped(GOOD)}), "Normal/more.zip"),
    "twice": (TWICE, "Normal/1.png"),
    "twice by another spelling": (zipped({"a/1.png": png(), "a/./1.png": png()}), "a/1.png"),
    "thousand to one": (zipped({"Normal/zeros.png": bytes(5_000_000)}), "Normal/zeros.png"),
    "not a zip": (b"this is no zip", ""),
    "cut off": (zipped(GOOD)[:60], ""),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_zip_that_means_harm_is_422_and_names_the_member(
    client: FlaskClient, champion: object, settings: Settings, attack: str
) -> None:
    content, member = ATTACKS[attack]
    problem = assert_problem(client.post("/datasets", data={"file": file(content, "x.zip")}), 422, "BAD_ARCHIVE")
    assert member in problem["detail"]
    if content.startswith(b"PK") and attack != "cut off":
        problem = assert_problem(client.post("/jobs/predict/batch", data={"files": file(content, "x.zip")}), 422)
        assert problem["code"] == "BAD_ARCHIVE"
    assert client.get("/datasets").get_json()["data"] == []
    assert not list(Path(settings.home).rglob("*evil*"))


def test_limits_of_a_zip_hold() -> None:
    many = io.BytesIO(zipped({f"{number}.png": b"x" for number in range(5)}))
    with pytest.raises(BadArchive, match="5 members"):
        archives.count_members(many, Limits(members=4))
    large = io.BytesIO(zipped({f"{number}.png": bytes(600) for number in range(5)}, compress=False))
    with pytest.raises(BadArchive, match="more than 2000 bytes"):
        archives.count_members(large, Limits(total_bytes=2000))
    with pytest.raises(BadArchive, match=r"'0\.png'"):
        archives.count_members(large, Limits(member_bytes=500))
    with pytest.raises(BadArchive, match="no file"):
        archives.count_members(io.BytesIO(zipped({"__MACOSX/a": b""})), Limits())


def test_a_member_that_unpacks_to_more_than_it_declares_is_stopped() -> None:
    with archives.open_zip(io.BytesIO(lying()), Limits()) as members, pytest.raises(BadArchive, match=r"Normal/1\.png"):
        members[0].read()


def test_a_damaged_member_of_a_batch_fails_alone(client: FlaskClient, champion: object) -> None:
    content = bytearray(zipped({"1.png": png(64, 64), "2.png": png(shade=4)}, compress=False))
    content[80] ^= 0xFF
    job = client.post("/jobs/predict/batch", data={"files": file(bytes(content), "x.zip")}).get_json()
    assert (job["counts"]["failed"], job["counts"]["pending"], job["state"]) == (1, 1, JobState.QUEUED)


def test_a_batch_passes_over_what_a_dataset_passes_over_and_says_how_many(
    client: FlaskClient, champion: object
) -> None:
    junk = {"__MACOSX/._1.png": png(), "a/.ipynb_checkpoints/1.png": png(), "LICENSE": b"x", "patients.csv": b"x"}
    content = zipped({**junk, "a/1.png": png(), "a/2.png": png(shade=3)})
    job = client.post("/jobs/predict/batch", data={"files": file(content, "x.zip")}).get_json()
    assert job["counts"]["total"] == 2
    assert [(one["code"], one["detail"][-3:]) for one in job["warnings"]] == [("FILES_PASSED_OVER", " 4.")]
    plain = client.post("/jobs/predict/batch", data={"files": file(zipped({"1.png": png()}), "x.zip")}).get_json()
    assert plain["warnings"] == []
    empty = client.post("/jobs/predict/batch", data={"files": file(zipped({"patients.csv": b"x"}), "x.zip")})
    assert_problem(empty, 422, "BAD_ARCHIVE")
