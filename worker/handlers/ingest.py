"""Unpack and check an uploaded dataset; it becomes `ready`, or `invalid` with the reasons."""

import time
from dataclasses import asdict
from pathlib import Path

from sqlalchemy.orm import Session

from jobs.datasets import catalog
from jobs.queue import lifecycle
from jobs.tables import Dataset, Job, Json
from ml.image.dataset.scans import DatasetReport, check_dataset
from ml.runtime.archives import extract_zip
from ml.runtime.errors import ArchiveError
from worker.execution.unit import UnitLease, WorkFailed

REPORT_EVERY = 0.5
"""Seconds between two reports of progress."""

INVALID: Json = {
    "code": "BAD_DATASET",
    "detail": "The dataset cannot be trained on. GET /datasets/ID names each problem; mend them and upload it anew.",
    "retryable": False,
}


def check_upload(unit: UnitLease) -> None:
    """Check the zip, and write the verdict and the job's end in one transaction."""
    sha256 = unit.in_transaction(lambda session: _read_archive(session, unit))
    with unit.workspace() as folder:
        report = _check(unit, unit.resources.artifacts.fetch(sha256, folder), folder / "unpacked")
    unit.finish(lambda session: _write_verdict(session, unit, report))


def _write_verdict(session: Session, unit: UnitLease, report: DatasetReport) -> None:
    digest = None if report.problems else report.digest
    catalog.finish_check(session, unit.claim.job_id, report.classes, digest, list(report.problems), as_json(report))
    if report.problems:
        lifecycle.fail(session, unit.claim, INVALID)
    else:
        lifecycle.succeed(session, unit.claim, metrics={"classes": report.classes, "images": report.images})


def as_json(report: DatasetReport) -> Json:
    """What the dataset's row keeps of the check: its findings and its warnings."""
    return {"inspection": asdict(report.inspection), "warnings": list(report.warnings)}


def _read_archive(session: Session, unit: UnitLease) -> str:
    job = session.get_one(Job, unit.claim.job_id)
    dataset = session.get(Dataset, job.dataset_id) if job.dataset_id else None
    if dataset is None:
        raise WorkFailed("BAD_DATASET", "The dataset was deleted before it was checked. Upload it again.")
    return dataset.archive_sha256


def _check(unit: UnitLease, archive: Path, folder: Path) -> DatasetReport:
    try:
        extract_zip(archive, folder)
    except ArchiveError as error:
        return DatasetReport({}, 0, "", (str(error),))
    reported = time.monotonic()

    def report(fraction: float) -> None:
        nonlocal reported
        unit.check()
        if time.monotonic() - reported > REPORT_EVERY:
            reported = time.monotonic()
            unit.report(stage="data_ingestion", progress=min(fraction, 0.999))

    return check_dataset(folder, on_progress=report)
