"""The figures of one tenant: its queue, what has ended, its storage, its champion."""

from collections.abc import Iterator, Mapping

from sqlalchemy.orm import Session

from api.http.context import services, tenant
from api.resources.metrics import ended, families
from api.resources.metrics.families import Metric, Values
from jobs.models import drift
from jobs.models.drift import DriftReport
from jobs.models.registry import find_champion
from jobs.queue import position
from jobs.storage.usage import usage

ACCURACY_DAYS = 30
"""Days of feedback that the champion's accuracy is computed from."""


def tenant_metrics(session: Session) -> Iterator[Metric]:
    """All of them."""
    yield Metric(families.JOBS, _by_label(position.unfinished_jobs(session, tenant())))
    yield Metric(families.UNITS, _by_label(position.unfinished_units(session, tenant())))
    yield from ended.ended(session, ended.TENANT, tenant())
    yield from _storage(session)
    yield from _champion(session)


def _by_label(counts: Mapping[str, int]) -> Values:
    return {(label,): count for label, count in counts.items()}


def _storage(session: Session) -> Iterator[Metric]:
    yield Metric(families.STORAGE, _by_label(vars(usage(session, tenant()))))
    if quota := services().settings.quota_storage_bytes:
        yield Metric(families.QUOTA, {(): quota})


def _champion(session: Session) -> Iterator[Metric]:
    champion = find_champion(session, tenant())
    if champion is None:
        return
    report = drift.drift(session, champion, drift.DriftPolicy.of(services().settings), ACCURACY_DAYS)
    yield Metric(families.CHAMPION, {(): champion.version})
    yield from _drift(report, str(champion.version))


def _drift(report: DriftReport, model: str) -> Iterator[Metric]:
    day = report.latest
    figures = day.figures if day else {}
    yield Metric(families.DRIFT_PSI, {(model, name): figure.psi for name, figure in figures.items()})
    yield Metric(families.DRIFT_LIMIT, {(model, name): figure.limit for name, figure in figures.items()})
    if day and day.rejected_share is not None:
        yield Metric(families.REJECTED, {(model,): day.rejected_share})
    if report.truths.accuracy is not None:
        yield Metric(families.ACCURACY, {(model,): report.truths.accuracy})
