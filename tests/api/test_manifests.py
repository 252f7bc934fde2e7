"""Manifests by REST: a list says which scans a batch has, and what they are called at the client's."""

import csv
import io
import json
import uuid
from typing import Any

import pytest
from flask.testing import FlaskClient
from sqlalchemy import select

from api.intake import manifests
from jobs.db import Sessions
from jobs.queue import lifecycle
from jobs.settings import Settings
from jobs.states import JobKind
from jobs.tables import Job, ScanResult
from tests import builders
from tests.api.conftest import Finish, file, png, zipped
from tests.api.test_errors import assert_problem
from tests.api.test_predictions import results
from tests.api.test_uploads import uploaded
from tests.builders import stored_files

pytestmark = pytest.mark.usefixtures("champion")

PATH = "/jobs/predict/batch"
CSV, NDJSON = "text/csv", "application/x-ndjson"


def manifest(text: str | bytes, name: str = "manifest.csv") -> tuple[io.BytesIO, str]:
    return file(text.encode() if isinstance(text, str) else text, name)


def sent(client: FlaskClient, text: str | bytes, *names: str, **more: Any) -> Any:
    """The answer to a manifest with files of these names, all different."""
    files = [file(png(shade=shade), name) for shade, name in enumerate(names)]
    return client.post(PATH, data={"manifest": manifest(text), **({"files": files} if files else {}), **more})


def stored(client: FlaskClient, shade: int = 9) -> str:
    scan_id: str = client.post("/scans", data={"file": file(png(shade=shade))}).get_json()["id"]
    return scan_id


def rows_of(sessions: Sessions, answer: Any) -> list[ScanResult]:
    assert answer.status_code == 202, answer.get_data(as_text=True)
    mine = select(ScanResult).where(ScanResult.job_id == uuid.UUID(answer.get_json()["id"]))
    with sessions.begin() as session:
        found = session.scalars(mine.order_by(ScanResult.ordinal)).all()
        session.expunge_all()
    return list(found)


def errors_of(answer: Any) -> list[tuple[str, str]]:
    return [(error["pointer"], error["detail"]) for error in assert_problem(answer, 422, "INVALID")["errors"]]


def pointers_of(answer: Any) -> list[str]:
    return [pointer for pointer, _ in errors_of(answer)]


# --- what a manifest says ---


def test_results_come_in_the_manifests_order_under_the_clients_own_keys(client: FlaskClient, finish: Finish) -> None:
    text = "file,scan_id,custom_id,patient,study\nb.png,,7,P1,S1\n," + stored(client) + ",8,P1,\na.png,,,,S2\n"
    job = sent(client, text, "a.png", "b.png").get_json()
    finish(job["id"])
    found = results(client, job)
    shown = [{name: row.get(name) for name in ("name", "custom_id", "patient", "study")} for row in found]
    assert shown == [
        {"name": "b.png", "custom_id": "7", "patient": "P1", "study": "S1"},
        {"name": None, "custom_id": "8", "patient": "P1", "study": None},
        {"name": "a.png", "custom_id": None, "patient": None, "study": "S2"},
    ]
    assert "study" not in found[1]  # absent, like custom_id
    assert found[0]["scan_id"] != found[2]["scan_id"]
    for kind in (CSV, NDJSON):
        body = client.get(job["links"]["results"], headers={"Accept": kind}).get_data(as_text=True)
        read = csv.DictReader(io.StringIO(body)) if kind == CSV else map(json.loads, body.splitlines())
        assert [row.get("patient") or None for row in read] == ["P1", "P1", None]


@pytest.mark.parametrize(
    "text",
    [
        "file,custom_id,patient\n1.png,7,P\n",
        "file;custom_id;patient\r\n1.png;7;P\r\n",
        "file\tcustom_id\tpatient\n1.png\t7\tP",
        "\ufefffile,custom_id,patient\n1.png,7,P\n",
        'patient, custom_id, "file"\n"P", "7", "1.png"\n',
        '{"file": "1.png", "custom_id": "7", "patient": "P", "study": null}\n',
        '\ufeff{"file": "./1.png", "custom_id": "7", "patient": "P"}',
    ],
    ids=["comma", "semicolon", "tab", "bom", "quoted", "ndjson", "ndjson-bom"],
)
def test_each_way_to_write_a_manifest_says_the_same(client: FlaskClient, sessions: Sessions, text: str) -> None:
    (row,) = rows_of(sessions, sent(client, text, "1.png"))
    assert (row.name, row.custom_id, row.patient, row.study) == ("1.png", "7", "P", None)


def test_a_quoted_cell_may_hold_the_delimiter(client: FlaskClient, sessions: Sessions) -> None:
    (row,) = rows_of(sessions, sent(client, 'file,patient\n"a,b.png","Muster ""M"", 7"\n', "a,b.png"))
    assert (row.name, row.patient) == ("a,b.png", 'Muster "M", 7')


def test_a_custom_id_need_not_be_unique(client: FlaskClient, sessions: Sessions) -> None:
    found = rows_of(sessions, sent(client, "file,custom_id\n1.png,same\n2.png,same\n", "1.png", "2.png"))
    assert [row.custom_id for row in found] == ["same", "same"]


def test_files_in_folders_are_named_with_their_folders(client: FlaskClient, sessions: Sessions) -> None:
    found = rows_of(sessions, sent(client, "file\np2/1.png\np1\\1.png\n", "p1/1.png", "p2/1.png"))
    assert [row.name for row in found] == ["p2/1.png", "p1/1.png"]


def test_a_file_that_is_no_image_fails_alone_and_keeps_its_keys(client: FlaskClient, sessions: Sessions) -> None:
    text = "file,patient\nnote.txt,P1\n1.png,P2\n"
    body = {"manifest": manifest(text), "files": [file(png(), "1.png"), file(b"text", "note.txt")]}
    found = rows_of(sessions, client.post(PATH, data=body))
    assert [(row.state, row.patient) for row in found] == [("failed", "P1"), ("pending", "P2")]


# --- how it is sent ---


@pytest.mark.parametrize("name", ["manifest.csv", "manifest.ndjson"])
def test_a_zip_may_hold_its_own_manifest(client: FlaskClient, sessions: Sessions, name: str) -> None:
    lines = {
        "manifest.csv": "file,patient\np1/2.png,P2\np1/1.png,P1\n",
        "manifest.ndjson": '{"file": "p1/2.png", "patient": "P2"}\n{"file": "p1/1.png", "patient": "P1"}\n',
    }
    content = zipped({"p1/1.png": png(shade=1), name: lines[name].encode(), "p1/2.png": png(shade=2)})
    found = rows_of(sessions, client.post(PATH, data={"files": file(content, "all.zip")}))
    assert [(row.name, row.patient) for row in found] == [("p1/2.png", "P2"), ("p1/1.png", "P1")]


def test_a_manifest_may_come_beside_a_zip(client: FlaskClient, sessions: Sessions) -> None:
    content = zipped({"a/1.png": png(), "a/manifest.csv": png()})  # not at its top: a file like any other
    body = {"manifest": manifest("file\na/manifest.csv\na/1.png\n"), "files": file(content, "all.zip")}
    assert [row.name for row in rows_of(sessions, client.post(PATH, data=body))] == ["a/manifest.csv", "a/1.png"]


def test_a_zip_may_hold_more_files_than_a_request_has_parts(
    client: FlaskClient, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifests, "MAX_SCANS", 1)
    members = {"1.png": png(), "2.png": png(), "manifest.csv": b"file\n1.png\n2.png\n"}
    assert len(rows_of(sessions, client.post(PATH, data={"files": file(zipped(members), "all.zip")}))) == 2


def test_an_upload_in_pieces_may_hold_a_manifest(client: FlaskClient, sessions: Sessions) -> None:
    content = zipped({"1.png": png(), "manifest.csv": b"file,patient\n1.png,P1\n"})
    (row,) = rows_of(sessions, client.post(PATH, json={"upload_id": uploaded(client, content)}))
    assert row.patient == "P1"


@pytest.mark.parametrize(
    ("kind", "text"),
    [(CSV, "scan_id,patient\n{},P1\n"), (CSV + "; charset=utf-8", "scan_id;patient\n{};P1\n"),
     (NDJSON, '{{"scan_id": "{}", "patient": "P1"}}\n')],
)  # fmt: skip
def test_a_manifest_alone_may_be_the_body(client: FlaskClient, sessions: Sessions, kind: str, text: str) -> None:
    scan_id = stored(client)
    query = "?model=champion&precision=fp32&lane=urgent&metadata[ward]=3"
    answer = client.post(PATH + query, data=text.format(scan_id).encode(), content_type=kind)
    (row,) = rows_of(sessions, answer)
    assert (str(row.scan_id), row.patient) == (scan_id, "P1")
    job = answer.get_json()
    assert (job["params"], job["metadata"]) == ({"precision": "fp32"}, {"ward": "3"})
    with sessions.begin() as session:
        assert session.get_one(Job, uuid.UUID(job["id"])).lane == "urgent"


@pytest.mark.parametrize(
    ("query", "pointer"),
    [("lane=train", "/lane"), ("precision=best", "/precision"), ("model=mine", "/model"), ("colour=red", "/colour"),
     ("manifest=x", "/manifest")],
)  # fmt: skip
def test_beside_a_manifest_the_query_is_checked_like_a_body(client: FlaskClient, query: str, pointer: str) -> None:
    answer = client.post(f"{PATH}?{query}", data="scan_id\n" + stored(client), content_type=CSV)
    assert pointers_of(answer) == [pointer]


def test_a_body_of_another_kind_is_415_and_names_those_that_are_taken(client: FlaskClient) -> None:
    detail = assert_problem(client.post(PATH, data="file\n", content_type="text/plain"), 415)["detail"]
    assert CSV in detail
    assert NDJSON in detail
    assert_problem(client.post("/jobs/predict", data="file\n", content_type=CSV), 415)


@pytest.mark.parametrize("content_type", ["multipart/form-data", CSV])
def test_a_key_makes_one_job_of_a_manifest_that_is_sent_twice(client: FlaskClient, content_type: str) -> None:
    scan_id = stored(client)

    def post(text: str) -> Any:
        data: Any = text if content_type == CSV else {"manifest": manifest(text)}
        return client.post(PATH, data=data, content_type=content_type, headers={"Idempotency-Key": "once"})

    first, again = (post(f"scan_id,patient\n{scan_id},P1\n") for _ in range(2))
    assert first.status_code == again.status_code == 202
    assert (again.data, again.headers["Idempotency-Replayed"]) == (first.data, "true")
    assert_problem(post(f"scan_id,patient\n{scan_id},P2\n"), 422, "IDEMPOTENCY_KEY_REUSED")


def test_the_document_shows_every_way_to_send_a_manifest(client: FlaskClient) -> None:
    operation = client.get("/openapi.json").get_json()["paths"][PATH]["post"]
    assert {CSV, NDJSON, "multipart/form-data", "application/json"} == set(operation["requestBody"]["content"])
    names = {(parameter["in"], parameter["name"]) for parameter in operation["parameters"]}
    assert {("query", "model"), ("query", "precision"), ("query", "lane"), ("header", "Idempotency-Key")} <= names
    assert ("query", "manifest") not in names


# --- what is refused ---


@pytest.mark.parametrize(
    ("text", "pointers"),
    [
        ("file,colour\n1.png,red\n", ["/manifest/1/colour"]),
        ("file,file\n1.png,\n", ["/manifest/1/file"]),
        ("file,value\n1.png,7\n", ["/manifest/1"]),
        ("custom_id\n7\n", ["/manifest/1"]),
        ("\nfile\n1.png\n", ["/manifest/1"]),
        ("file,patient\n1.png\n", ["/manifest/2"]),
        ("file,patient\n1.png,P,more\n", ["/manifest/2"]),
        ("file,patient\n1.png,P\n\n", ["/manifest/3"]),
        ("file,patient\n1.png,P\n,\n", ["/manifest/3"]),
        ("file,patient\n,P\n", ["/manifest/2/file"]),
        ("file,scan_id\n1.png,c0ffee00-0000-4000-8000-000000000000\n", ["/manifest/2/scan_id"]),
        ("file\n2.png\n1.png\n", ["/manifest/2/file"]),
        ("file\n1.png\n1.png\n", ["/manifest/3/file"]),
        ("scan_id\nx\n", ["/manifest/2/scan_id"]),
        ("url\nftp://a/b\n", ["/manifest/2/url"]),
        ("file,patient\n1.png," + "x" * 201 + "\n", ["/manifest/2/patient"]),
        ("file,patient\n1.png,P\0\n", ["/manifest/2/patient"]),
        ('file,patient\n"1.png,P\n2.png",P\n', ["/manifest/2"]),
        (b"file,patient\n1.png,M\xfcller\n", ["/manifest/2"]),
        ("file,patient\n1.png,P\n".encode("utf-16"), ["/manifest/1"]),
        ("file,patient\n1.png," + "x" * 200_000 + "\n,\n", ["/manifest/2", "/manifest/3"]),
        ("file\n", ["/manifest"]),
        ("", ["/manifest"]),
        ('{"file": "1.png"}\n{"file": 1}\n[]\n{"colour": 1, "file": "1.png"}\n{\n', ["/manifest/2/file", "/manifest/3",
         "/manifest/4/colour", "/manifest/5"]),
        ("[" * 60_000, ["/manifest/1"]),
        ('{"file": ' + "[" * 400 + "]" * 400 + "}", ["/manifest/1"]),
        ('{"file": "1.png", "study": "\\ud800"}', ["/manifest/1/study"]),
    ],
)  # fmt: skip
def test_every_complaint_names_its_line(client: FlaskClient, text: str | bytes, pointers: list[str]) -> None:
    assert pointers_of(sent(client, text, "1.png")) == pointers


def test_an_unknown_column_is_told_with_those_that_are_known(client: FlaskClient) -> None:
    for text in ("file,Patient\n1.png,P\n", '{"file": "1.png", "Patient": "P"}'):
        assert errors_of(sent(client, text, "1.png")) == [
            (
                "/manifest/1/Patient",
                "Unknown column 'Patient': use file, scan_id, url, custom_id, patient, study.",
            )
        ]


def test_of_many_complaints_twenty_are_told_and_the_rest_is_counted(client: FlaskClient) -> None:
    answer = sent(client, "scan_id\n" + "x\n" * 50)
    assert [pointer for pointer, _ in errors_of(answer)] == [f"/manifest/{line}/scan_id" for line in range(2, 22)]
    assert answer.get_json()["detail"].endswith(" There are 30 more.")


@pytest.mark.parametrize(("header", "row"), [("scan_id\n", "x"), ("", '{"scan_id": "x"}')])
def test_more_rows_than_a_batch_takes_are_not_even_read(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch, header: str, row: str
) -> None:
    monkeypatch.setattr(manifests, "MAX_SCANS", 3)
    found = errors_of(sent(client, header + f"{row}\n" * 10))
    assert len(found) == 4
    assert found[-1] == (f"/manifest/{5 if header else 4}", "More than 3 scans. Split the manifest.")
    assert len(errors_of(sent(client, header + f"{row}\n" * 3))) == 3


def test_a_file_that_the_manifest_does_not_name_is_named(client: FlaskClient) -> None:
    found = errors_of(sent(client, "file\n1.png\n", "1.png", "2.png"))
    assert found == [("/files", "'2.png' is not in the manifest. List it there, or leave it out.")]
    content = zipped({"1.png": png(), "2.png": png(), "manifest.csv": b"file\n1.png\n"})
    assert errors_of(client.post(PATH, data={"files": file(content, "all.zip")})) == found


def test_two_files_of_one_name_are_refused(client: FlaskClient) -> None:
    assert pointers_of(sent(client, "file\n1.png\n", "1.png", "1.png")) == ["/files"]


def test_an_unknown_scan_and_anothers_are_refused_on_their_lines(client: FlaskClient, stranger: FlaskClient) -> None:
    text = f"scan_id\n{stored(client)}\n{stored(stranger)}\n{builders.unknown_id()}\n"
    assert pointers_of(sent(client, text)) == ["/manifest/3/scan_id", "/manifest/4/scan_id"]


def test_two_manifests_are_one_too_many(client: FlaskClient) -> None:
    inside = zipped({"1.png": png(), "manifest.csv": b"file\n1.png\n"})
    body = {"manifest": manifest("file\n1.png\n"), "files": file(inside, "all.zip")}
    assert pointers_of(client.post(PATH, data=body)) == ["/manifest"]
    both = zipped({"manifest.csv": b"file\n", "manifest.ndjson": b"{}"})
    assert pointers_of(client.post(PATH, data={"files": file(both, "all.zip")})) == ["/manifest"]


def test_custom_ids_stand_in_the_manifest_alone(client: FlaskClient) -> None:
    assert pointers_of(sent(client, "file\n1.png\n", "1.png", custom_ids=["7"])) == ["/custom_ids"]


def test_without_a_manifest_the_files_are_required(client: FlaskClient) -> None:
    answer = client.post(PATH, data={"model": "champion"}, content_type="multipart/form-data")
    assert pointers_of(answer) == ["/files"]


def test_a_refused_manifest_leaves_nothing(client: FlaskClient, sessions: Sessions, settings: Settings) -> None:
    assert sent(client, "file\n2.png\n", "1.png").status_code == 422
    with sessions.begin() as session:
        assert session.scalar(select(Job).where(Job.kind == JobKind.PREDICT_BATCH)) is None
    assert stored_files(settings) == []


# --- addresses ---


def test_without_allowed_hosts_addresses_are_refused_with_what_to_do(client: FlaskClient, settings: Settings) -> None:
    settings.fetch_hosts = ""
    ((pointer, detail),) = errors_of(sent(client, "url\nhttp://scans.example/erika/7.dcm\n"))
    assert pointer == "/manifest/2/url"
    assert "RENALQ_FETCH_HOSTS" in detail
    assert "POST /scans" in detail


def test_only_addresses_on_allowed_hosts_are_taken(client: FlaskClient, settings: Settings) -> None:
    settings.fetch_hosts = "scans.example"
    text = "url\nhttp://scans.example/7.dcm\nhttp://other.example/erika.dcm\nhttp://me:pw@scans.example/7.dcm\n"
    found = errors_of(sent(client, text))
    assert [pointer for pointer, _ in found] == ["/manifest/3/url", "/manifest/4/url"]
    assert "RENALQ_FETCH_HOSTS" in found[0][1]
    assert "erika" not in str(found)


def test_an_address_waits_for_its_worker(client: FlaskClient, settings: Settings, sessions: Sessions) -> None:
    settings.fetch_hosts = "scans.example:8042"
    text = "url,scan_id,patient\nhttp://scans.example:8042/a/scan%207.dcm?token=x,,P1\n," + stored(client) + ",P2\n"
    fetched, known = rows_of(sessions, sent(client, text))
    assert (fetched.scan_id, fetched.error, fetched.state, fetched.patient) == (None, None, "pending", "P1")
    assert (fetched.source_url, fetched.name) == ("http://scans.example:8042/a/scan%207.dcm?token=x", "scan 7.dcm")
    assert fetched.unit_id is not None
    assert known.source_url is None


def test_a_retry_keeps_the_keys_and_the_addresses(client: FlaskClient, settings: Settings, sessions: Sessions) -> None:
    settings.fetch_hosts = "scans.example"
    text = "url,scan_id,custom_id,patient,study\nhttp://scans.example/7,,7,P1,S1\n," + stored(client) + ",8,P2,S2\n"
    old = sent(client, text).get_json()
    with sessions.begin() as session:
        for unit in builders.units_of(session, session.get_one(Job, uuid.UUID(old["id"]))):
            lifecycle.fail(session, builders.claim(session, unit), builders.BROKEN)
    found = rows_of(sessions, client.post(f"/jobs/{old['id']}/retry"))
    assert [(row.source_url, row.custom_id, row.patient, row.study) for row in found] == [
        ("http://scans.example/7", "7", "P1", "S1"),
        (None, "8", "P2", "S2"),
    ]
