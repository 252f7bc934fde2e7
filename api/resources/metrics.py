"""`GET /metrics`: the tenant's queue, and its champion's drift and accuracy, for Prometheus.

It needs a key, like every resource: Prometheus sends one with `authorization: {credentials_file: …}`. Every request
reads the database, so all processes of the API give the same figures.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from flask import Response, request
from sqlalchemy.orm import Session

from api.http.auth import needs
from api.http.bodies import Blueprint
from api.http.context import services, tenant, transaction
from api.http.responses import TEXT
from jobs.keys import Scope
from jobs.models import drift
from jobs.models.drift import DriftReport
from jobs.models.registry import find_champion
from jobs.queue import position

PROMETHEUS, OPENMETRICS = "text/plain", "application/openmetrics-text"
ACCURACY_DAYS = 30
"""Days of feedback that the champion's accuracy is computed from."""

Values = Mapping[tuple[str, ...], float]
"""Values of a gauge by the values of its labels."""

blueprint = Blueprint("metrics", __name__, description="Metrics in Prometheus' format.")


@dataclass(frozen=True)
class Gauge:
    """A Prometheus gauge."""

    name: str
    help: str
    labels: tuple[str, ...]
    values: Values


@dataclass(frozen=True)
class _Collector:
    """What prometheus_client's encoders ask for metrics."""

    families: list[Any]

    def collect(self) -> list[Any]:
        return self.families


@blueprint.route("/metrics")
@needs(Scope.JOBS_READ)
@blueprint.response(200, TEXT, content_type=PROMETHEUS)
@blueprint.alt_response(200, schema=TEXT, content_type=OPENMETRICS, success=True)
@blueprint.doc(operationId="getPrometheusMetrics")
def get_metrics() -> Response:
    """Show the champion's drift and accuracy, and the queue, in Prometheus' format."""
    with transaction() as session:
        gauges = [*_queue(session), *_champion(session)]
    content, media_type = _exposition(gauges, request.headers.get("Accept", ""))
    return Response(content, content_type=media_type)


def _exposition(gauges: Iterable[Gauge], accept: str) -> tuple[bytes, str]:
    """The gauges in the format that the client accepts, and its media type."""
    from prometheus_client.core import GaugeMetricFamily  # imported by the first request: it takes 11 MB
    from prometheus_client.exposition import choose_encoder

    families = []
    for gauge in gauges:
        family = GaugeMetricFamily(gauge.name, gauge.help, labels=gauge.labels)
        for labels, value in gauge.values.items():
            family.add_metric(labels, value)
        families.append(family)
    encode, media_type = choose_encoder(accept)
    return encode(_Collector(families)), media_type  # type: ignore[arg-type]


def _queue(session: Session) -> Iterator[Gauge]:
    jobs, units = position.unfinished_jobs(session, tenant()), position.unfinished_units(session, tenant())
    yield Gauge("renalq_jobs", "Jobs that have not ended.", ("state",), _by_label(jobs))
    yield Gauge("renalq_units", "Units of work that have not ended.", ("state",), _by_label(units))


def _by_label(counts: Mapping[str, int]) -> Values:
    return {(label,): count for label, count in counts.items()}


def _champion(session: Session) -> Iterator[Gauge]:
    champion = find_champion(session, tenant())
    if champion is None:
        return
    report = drift.drift(session, champion, drift.DriftPolicy.of(services().settings), ACCURACY_DAYS)
    yield Gauge("renalq_champion_version", "Version of the champion.", (), {(): champion.version})
    yield from _drift(report, str(champion.version))


def _drift(report: DriftReport, model: str) -> Iterator[Gauge]:
    day, labels = report.latest, ("model", "figure")
    figures = day.figures if day else {}
    psi: Values = {(model, name): figure.psi for name, figure in figures.items()}
    limits: Values = {(model, name): figure.limit for name, figure in figures.items()}
    yield Gauge("renalq_drift_psi", "Population stability index of the latest day.", labels, psi)
    yield Gauge("renalq_drift_limit", "Index above which a figure has drifted.", labels, limits)
    if day and day.rejected_share is not None:
        help_ = "Share of scans of the latest day that were rejected."
        yield Gauge("renalq_rejected_share", help_, ("model",), {(model,): day.rejected_share})
    if report.truths.accuracy is not None:
        help_ = f"Share of correct predictions among those with feedback, {ACCURACY_DAYS} days."
        yield Gauge("renalq_model_accuracy", help_, ("model",), {(model,): report.truths.accuracy})
