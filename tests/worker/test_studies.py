"""A study on its way through a worker: the same answers whatever files it comes in, and nothing of it in any log."""

from __future__ import annotations

import io
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import select

from jobs.queue.submission import NewJob, NewResult, submit
from jobs.results import queries, studies
from jobs.results.study_answers import StudyAnswer
from jobs.settings import Settings
from jobs.states import JobKind, Lane
from jobs.tables import Artifact, Job, JobEvent, ModelVersion, PredictionCount, ScanResult
from ml.image.pixels.picture import Origin
from ml.runtime.pseudonyms import pseudonym
from tests import builders
from tests.builders import TENANT
from tests.ml.raw_dicom import raw_dicom
from tests.study_files import Study, make_studies
from tests.worker.test_unsuitable import VALUES, stored, version_of
from worker.execution.resources import Resources
from worker.execution.unit import UnitLease
from worker.handlers.explain import explain_results
from worker.handlers.outcomes import kept_identity
from worker.handlers.predict import predict_chunk

pytestmark = pytest.mark.usefixtures("sessions")

SLICES = 5
ORDER = [3, 0, 4, 1, 2]
LEARNT = {"origins": [asdict(Origin("CT", "ABDOMEN"))]}


@pytest.fixture(scope="module")
def made() -> list[Study]:
    """Two of CT, and one of MR."""
    return make_studies(3, SLICES, 64)


def predicted(
    resources: Resources, model: ModelVersion, files: list[tuple[bytes, int]], **options: Any
) -> tuple[Job, list[ScanResult]]:
    """The job of files with so many frames each, and its results in their order."""
    with resources.sessions.begin() as session:
        scans = []
        for content, frames in files:
            sha256 = resources.artifacts.put(io.BytesIO(content)).sha256
            scans.append(NewResult(stored(session, sha256), frames=frames))
        params = {"precision": "fp32", **options}
        new = NewJob(TENANT, JobKind.PREDICT_BATCH, Lane.BATCH, params=params, model_id=model.id, model_version=1)
        job = submit(session, new, scans, 100)
        held = UnitLease(builders.claim(session, builders.units_of(session, job)[0]), resources)
    predict_chunk(held)
    with resources.sessions.begin() as session:
        session.expire_on_commit = False
        rows = select(ScanResult).where(ScanResult.job_id == job.id).order_by(ScanResult.ordinal)
        return session.get_one(Job, job.id), list(session.scalars(rows))


def answers(resources: Resources, job: Job) -> list[StudyAnswer]:
    """Of the job's studies."""
    with resources.sessions.begin() as session:
        return list(studies.studies(session, queries.job(session, TENANT, job.id), Settings()).data)


def upwards(answer: StudyAnswer, rows: list[ScanResult]) -> list[dict[str, float]]:
    """Probabilities of its slices, in their order."""
    return [rows[ordinal].probabilities or {} for ordinal in answer.ordinals]


FORMS: dict[str, Any] = {
    "slices": lambda one: [(one.slices()[number], 1) for number in ORDER],
    "one object": lambda one: [(one.multi_frame(ORDER), SLICES)],
    "a volume": lambda one: [(one.volume(), SLICES)],
}


def test_a_study_is_answered_alike_in_whatever_files_it_comes(
    resources: Resources, tmp_path: Path, made: list[Study]
) -> None:
    model, probabilities = version_of(resources, tmp_path, LEARNT), {}
    for form, files in FORMS.items():
        job, rows = predicted(resources, model, [file for one in made for file in files(one)])
        assert {row.state for row in rows} == {"succeeded"}, [row.error for row in rows]
        found = answers(resources, job)
        assert [one.slices for one in found] == [SLICES] * 3
        assert [one.disposition == "rejected" for one in found] == [False, False, True], form
        assert (found[2].used, found[2].rejected) == (0, SLICES)
        probabilities[form] = [row[name] for one in found for row in upwards(one, rows) for name in ("Normal", "Tumor")]
    slices = np.array(probabilities["slices"])
    assert len(np.unique(slices.round(4))) > SLICES, "slices that look all alike would show nothing"
    for form in ("one object", "a volume"):
        assert np.abs(np.array(probabilities[form]) - slices).max() < 1e-6, form


def test_uids_and_order_are_those_of_the_files(resources: Resources, tmp_path: Path, made: list[Study]) -> None:
    model = version_of(resources, tmp_path, LEARNT)
    job, rows = predicted(resources, model, FORMS["slices"](made[0]))
    datasets = made[0].datasets
    (found,) = answers(resources, job)
    assert found.study_uids == [datasets[0].StudyInstanceUID]
    assert found.series_uids == [datasets[0].SeriesInstanceUID]
    assert found.accession == datasets[0].AccessionNumber
    assert found.patient == pseudonym(datasets[0].PatientID)
    sops = [(rows[ordinal].identity or {})["sop_uid"] for ordinal in found.ordinals]
    assert sops == [dataset.SOPInstanceUID for dataset in reversed(datasets)], "from the feet upwards"
    again, copies = predicted(resources, model, FORMS["slices"](made[0]))
    assert all(row.cached for row in copies)
    assert answers(resources, again)[0].ordinals == found.ordinals
    assert [row.identity for row in copies] == [row.identity for row in rows]


def test_frames_are_copied_from_the_result_cache_each_for_itself(
    resources: Resources, tmp_path: Path, made: list[Study]
) -> None:
    model = version_of(resources, tmp_path, LEARNT)
    (_, first), (_, again) = (predicted(resources, model, FORMS["one object"](made[0])) for _ in range(2))
    assert [row.cached for row in again] == [True] * SLICES
    assert [row.probabilities for row in again] == [row.probabilities for row in first]
    (_, whole) = predicted(resources, model, [(made[0].multi_frame(ORDER), 1)])
    assert [(row.frame, row.cached, row.disposition) for row in whole] == [(None, False, "indeterminate")]


def test_a_slice_that_cannot_be_shown_counts_in_its_study(resources: Resources, tmp_path: Path) -> None:
    named = {"StudyInstanceUID": "1.2.3", "SeriesInstanceUID": "1.2.3.1"}
    good, bad = raw_dicom(VALUES, **named), raw_dicom(VALUES, **named, PixelData=b"\0\0")
    job, _ = predicted(resources, version_of(resources, tmp_path, {}), [(good, 1), (bad, 1)])
    (found,) = answers(resources, job)
    assert (found.study_uid, found.slices, found.used, found.failed) == ("1.2.3", 2, 1, 1)


def test_a_file_is_brought_once_for_all_of_its_frames(
    resources: Resources, tmp_path: Path, made: list[Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    brought: list[str] = []
    fetch = resources.artifacts.fetch

    def counting(self: object, sha256: str, folder: Path) -> Path:
        brought.append(sha256)
        return fetch(sha256, folder)

    monkeypatch.setattr(type(resources.artifacts), "fetch", counting)
    predicted(resources, version_of(resources, tmp_path, LEARNT), FORMS["a volume"](made[0]))
    assert len(brought) == len(set(brought)) > 0


def test_each_frame_is_explained_by_itself(resources: Resources, tmp_path: Path, made: list[Study]) -> None:
    job, _ = predicted(resources, version_of(resources, tmp_path, LEARNT), FORMS["one object"](made[0]), explain=True)
    with resources.sessions.begin() as session:
        unit = builders.units_of(session, job)[1]
        held = UnitLease(builders.claim(session, unit), resources)
    explain_results(held)
    with resources.sessions.begin() as session:
        found = session.execute(select(Artifact.name, Artifact.sha256).where(Artifact.job_id == job.id)).all()
    overlays = {row.name: row.sha256 for row in found if re.fullmatch(r"explanations/\d+\.png", row.name)}
    assert len(overlays) == len(set(overlays.values())) == SLICES


KEPT = {
    "hash": {"study_uid": "1", "accession": "A", "patient_hash": pseudonym("P-9")},
    "keep": {"study_uid": "1", "accession": "A", "patient": "P-9"},
    "drop": {"study_uid": "1"},
}


@pytest.mark.parametrize("setting", KEPT)
def test_the_setting_says_what_is_kept_of_a_patient(setting: str) -> None:
    read = {"study_uid": "1", "accession": "A", "patient": "P-9"}
    assert kept_identity(read, setting) == KEPT[setting]
    assert kept_identity(None, setting) == {}
    for earlier, kept in KEPT.items():
        copied = kept_identity(kept, setting)
        assert setting == "keep" or "patient" not in copied, f"kept as {earlier}, and {setting} now"
        assert setting != "drop" or copied == {"study_uid": "1"}


CANARY = "CANARY4711"
CANARIES = {
    "PatientID": CANARY, "PatientName": CANARY, "AccessionNumber": CANARY, "StudyInstanceUID": f"1.2.{4711}",
    "SeriesInstanceUID": "1.2.4711.1", "SOPInstanceUID": "1.2.4711.1.1",
}  # fmt: skip
SECRETS = (CANARY, "1.2.4711")
WAYS_IN = {
    "a slice": [(raw_dicom(VALUES, **CANARIES), 1)],
    "frames": [(raw_dicom(np.stack([VALUES] * 3), **CANARIES), 3)],
    "broken": [(raw_dicom(VALUES, **CANARIES, PixelData=b"\0\0"), 1)],
    "broken frames": [(raw_dicom(np.stack([VALUES] * 3), **CANARIES, PixelData=b"\0\0"), 3)],
    "no picture": [(raw_dicom(VALUES, **CANARIES, Rows=None), 1)],
    "of an unknown syntax": [(raw_dicom(VALUES, "1.2.3.4", **CANARIES), 1)],
}


@pytest.mark.parametrize("way", WAYS_IN)
def test_no_identity_is_in_logs_events_counts_or_messages(
    resources: Resources, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, way: str
) -> None:
    """A canary in each element that names somebody, by each way in. Celery's messages hold the unit's id alone; what is
    counted for drift and metrics, and told in events and errors, is looked through here."""
    caplog.set_level("DEBUG")
    job, rows = predicted(resources, version_of(resources, tmp_path, {}), WAYS_IN[way])
    with resources.sessions.begin() as session:
        events = [event.data for event in session.scalars(select(JobEvent).where(JobEvent.job_id == job.id))]
        counted = session.execute(select(PredictionCount.what, PredictionCount.bin)).all()
    printed = capfd.readouterr()
    told = [printed.out, printed.err, caplog.text, str(counted), json.dumps(events), repr(rows), str(vars(job))]
    told += [json.dumps([row.error, row.reason, row.output, row.label]) for row in rows]
    for secret in SECRETS:
        assert [text for text in told if secret in text] == []
