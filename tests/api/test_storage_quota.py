"""What a tenant may store: scans, datasets and open uploads together, counted whoever writes them."""

import threading
from typing import Any

import pytest
from flask.testing import FlaskClient
from sqlalchemy import delete, func, select

from jobs.db import Sessions
from jobs.settings import Settings
from jobs.storage import usage
from jobs.tables import Job, ModelVersion, Scan, StorageChange
from tests import builders
from tests.api.conftest import file, png, zipped
from tests.api.test_errors import assert_problem
from tests.builders import stored_files

LIMIT = 10_000
TUS = {"Tus-Resumable": "1.0.0"}


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """A small quota."""
    return settings.model_copy(update={"quota_storage_bytes": LIMIT})


def big(shade: int = 0) -> bytes:
    """A scan of 6,000 bytes: two do not fit."""
    content = png(shade=shade)
    return content + bytes(6000 - len(content))


def used(client: FlaskClient) -> dict[str, Any]:
    return client.get("/usage").get_json()["storage"]


def upload(client: FlaskClient, size: int) -> Any:
    return client.post("/uploads", headers={**TUS, "Upload-Length": str(size)})


def send(client: FlaskClient, content: bytes) -> str:
    """A complete upload."""
    upload_id = upload(client, len(content)).get_json()["id"]
    headers = {**TUS, "Upload-Offset": "0", "Content-Type": "application/offset+octet-stream"}
    assert client.patch(f"/uploads/{upload_id}", data=content, headers=headers).status_code == 204
    return upload_id


def refused(answer: Any) -> str:
    detail: str = assert_problem(answer, 507, "STORAGE_QUOTA_EXCEEDED")["detail"]
    assert str(LIMIT) in detail
    return detail


def test_everything_that_stores_bytes_counts_and_is_refused_beyond_the_quota(
    client: FlaskClient, stranger: FlaskClient, champion: ModelVersion
) -> None:
    assert client.post("/scans", data={"file": file(big())}).status_code == 201
    assert used(client) == {"used": 6000, "limit": LIMIT, "scans": 6000, "datasets": 0, "uploads": 0}
    assert "6000 of" in refused(client.post("/scans", data={"file": file(big(1))}))
    refused(client.post("/jobs/predict", data={"file": file(big(1))}))
    refused(client.post("/jobs/predict/batch", data={"files": [file(big(1), "a.png")]}))
    refused(client.post("/jobs/predict/batch", data={"files": [file(zipped({"a.png": big(1)}), "a.zip")]}))
    refused(upload(client, 4001))
    refused(client.post("/datasets", data={"file": file(zipped({"a/b.png": big(1)}, compress=False), "d.zip")}))
    assert used(client)["used"] == 6000
    assert upload(client, 4000).status_code == 201
    assert used(client)["uploads"] == 4000
    assert used(stranger)["used"] == 0, "each tenant has its own"
    assert stranger.post("/scans", data={"file": file(big(1))}).status_code == 201


def test_a_scan_that_is_stored_is_taken_also_where_nothing_more_fits(
    client: FlaskClient, champion: ModelVersion
) -> None:
    client.post("/scans", data={"file": file(big())})
    assert client.post("/scans", data={"file": file(big())}).status_code == 200
    assert client.post("/jobs/predict", data={"file": file(big())}).status_code == 202
    assert client.post("/jobs/predict/batch", data={"files": [file(big(), "a.png")]}).status_code == 202


def test_of_a_batch_that_does_not_fit_what_is_on_the_disk_counts(
    client: FlaskClient, sessions: Sessions, settings: Settings, champion: ModelVersion
) -> None:
    refused(client.post("/jobs/predict/batch", data={"files": [file(big(n), f"{n}.png") for n in range(3)]}))
    blobs = [path.stat().st_size for path in stored_files(settings)]
    assert sum(blobs) == used(client)["used"] == 6000
    with sessions.begin() as session:
        assert session.scalar(select(func.count()).select_from(Job).where(Job.kind == "predict_batch")) == 0


def test_an_upload_makes_room_for_what_is_made_of_it(client: FlaskClient, champion: ModelVersion) -> None:
    padded = zipped({"a/1.png": big(1)[:5900], "b/1.png": png()}, compress=False)
    assert LIMIT / 2 < len(padded) < LIMIT
    answer = client.post("/datasets", json={"upload_id": send(client, padded)})
    assert answer.status_code == 202, answer.get_json()
    assert (used(client)["datasets"], used(client)["uploads"]) == (len(padded), 0)


def test_what_is_deleted_makes_room_whoever_deletes_it(client: FlaskClient, sessions: Sessions) -> None:
    client.post("/scans", data={"file": file(big())})
    with sessions.begin() as session:  # as retention does
        session.execute(delete(Scan))
    assert used(client)["used"] == 0
    made = upload(client, 9000).get_json()["id"]
    assert client.delete(f"/uploads/{made}", headers=TUS).status_code == 204
    assert client.post("/scans", data={"file": file(big(1))}).status_code == 201


def test_uploads_that_begin_at_the_same_time_are_not_all_taken(client: FlaskClient) -> None:
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(upload(client, 6000).status_code)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [201] + [507] * 7


def test_many_changes_become_one_row_of_each_kind(
    client: FlaskClient, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage, "FOLD_ROWS", 20)
    with sessions.begin() as session:
        for _ in range(30):
            builders.make_scan(session)
        builders.make_dataset(session)
        builders.make_scan(session, "elsewhere")
    before = used(client)
    assert (before["scans"], before["datasets"]) == (30_000, 1000)
    assert used(client) == before
    with sessions.begin() as session:
        rows = select(StorageChange.tenant_id, func.count()).group_by(StorageChange.tenant_id)
        assert dict(tuple(row) for row in session.execute(rows)) == {builders.TENANT: 2, "elsewhere": 1}


def test_without_a_quota_everything_is_taken_and_shown_and_the_account_stays_small(
    client: FlaskClient, settings: Settings, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "quota_storage_bytes", 0)
    monkeypatch.setattr(usage, "FOLD_ROWS", 1)
    for shade in range(3):
        assert client.post("/scans", data={"file": file(big(shade))}).status_code == 201
    with sessions.begin() as session:
        assert session.scalar(select(func.count()).select_from(StorageChange)) == 2
    assert (used(client)["limit"], used(client)["scans"]) == (None, 18_000)
