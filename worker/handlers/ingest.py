"""Unpack and check an uploaded dataset; it becomes `ready`, or `invalid` with the reasons."""

import time

from sqlalchemy.orm import Session

from jobs.datasets import catalog
from jobs.queue import lifecycle
from jobs.tables import Dataset, Job, Json
from ml.pipelines import DatasetCheck, Report, pipeline_of
from ml.spec.registry import spec_of
from worker.execution.unit import Ended, UnitLease, WorkFailed
from worker.handlers.training_request import installed_spec

REPORT_EVERY = 0.5
"""Seconds between two reports of progress."""

INVALID: Json = {
    "code": "BAD_DATASET",
    "detail": "The dataset cannot be trained on. GET /datasets/ID names each problem; mend them and upload it anew.",
    "retryable": False,
}


def check_upload(unit: UnitLease) -> None:
    """Check the zip, and write the verdict and the job's end in one transaction."""
    pipeline, sha256 = unit.in_transaction(lambda session: _read(session, unit))
    with unit.workspace() as folder:
        archive = unit.resources.artifacts.fetch(sha256, folder)
        report = pipeline_of(pipeline).check(archive, folder / "unpacked", _reporter(unit, pipeline))
    unit.finish(lambda session: _write_verdict(session, unit, report))


def _write_verdict(session: Session, unit: UnitLease, report: DatasetCheck) -> Ended | None:
    digest = None if report.problems else report.digest
    catalog.finish_check(session, unit.claim.job_id, report.classes, digest, list(report.problems), as_json(report))
    if report.problems:
        return Ended(lifecycle.fail(session, unit.claim, INVALID), INVALID["code"])
    lifecycle.succeed(session, unit.claim, metrics={"classes": report.classes, "images": report.items})
    return None


def as_json(report: DatasetCheck) -> Json:
    """What the dataset's row keeps of the check: its findings and its warnings."""
    return {"inspection": report.inspection, "warnings": list(report.warnings)}


def _read(session: Session, unit: UnitLease) -> tuple[str, str]:
    job = session.get_one(Job, unit.claim.job_id)
    dataset = session.get(Dataset, job.dataset_id) if job.dataset_id else None
    if dataset is None:
        raise WorkFailed("BAD_DATASET", "The dataset was deleted before it was checked. Upload it again.")
    return installed_spec(dataset.pipeline).name, dataset.archive_sha256


def _reporter(unit: UnitLease, pipeline: str) -> Report:
    """Report the fraction done as the job's progress, and stop the check when the unit is interrupted."""
    reported = time.monotonic()
    stage = spec_of(pipeline).stages[0].name

    def report(fraction: float) -> None:
        nonlocal reported
        unit.check()
        if time.monotonic() - reported > REPORT_EVERY:
            reported = time.monotonic()
            unit.report(stage=stage, progress=min(fraction, 0.999))

    return report
