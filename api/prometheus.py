"""`GET /metrics`: the asking tenant's figures for Prometheus, read from the rows whenever it asks.

They need a key, as everything here does: Prometheus sends one by `authorization: {credentials_file: …}`. All processes
of the API answer alike, since none of them counts anything itself.
"""

from collections.abc import Iterator

from flask import Response, request
from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from sqlalchemy.orm import Session

from api.auth import needs
from api.bodies import Blueprint
from api.services import services, tenant, transaction
from jobs import drift, load, registry
from jobs.drift import Drift
from jobs.keys import Scope

TEXT, OPENMETRICS = "text/plain", "application/openmetrics-text"
DAYS = 30
"""The champion's truths of so many days make its accuracy."""

blueprint = Blueprint("metrics", __name__, description="For Prometheus.")


class Gauges(Collector):
    """What there is to tell now."""

    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """As the library asks for it."""
        yield from self._metrics


@blueprint.route("/metrics")
@needs(Scope.JOBS_READ)
@blueprint.response(200, {"type": "string"}, content_type=TEXT)
@blueprint.alt_response(200, schema={"type": "string"}, content_type=OPENMETRICS, success=True)
@blueprint.doc(operationId="getPrometheusMetrics")
def get_metrics() -> Response:
    """Show the champion's drift, its truths, and what is in the queue, in Prometheus' format."""
    with transaction() as session:
        found = [*_queue(session), *_champion(session)]
    registered = CollectorRegistry(auto_describe=False)
    registered.register(Gauges(found))
    encode, kind = choose_encoder(request.headers.get("Accept", ""))
    return Response(encode(registered), content_type=kind)


def _queue(session: Session) -> Iterator[Metric]:
    jobs = GaugeMetricFamily("renalq_jobs", "Jobs that have not ended.", labels=["state"])
    units = GaugeMetricFamily("renalq_units", "Units of work that have not ended.", labels=["state"])
    for gauge, counted in ((jobs, load.jobs(session, tenant())), (units, load.units(session, tenant()))):
        for state, number in counted.items():
            gauge.add_metric([state], number)
    yield from (jobs, units)


def _champion(session: Session) -> Iterator[Metric]:
    champion = registry.find_champion(session, tenant())
    if champion is None:
        return
    found = drift.drift(session, champion, drift.Policy.of(services().settings), DAYS)
    yield GaugeMetricFamily("renalq_champion_version", "The version that predicts.", champion.version)
    yield from _drift(found, str(champion.version))


def _drift(found: Drift, model: str) -> Iterator[Metric]:
    day, accuracy = found.latest, found.truths.accuracy
    psi = GaugeMetricFamily("renalq_drift_psi", "Population stability index, latest day.", labels=["model", "figure"])
    limit = GaugeMetricFamily("renalq_drift_limit", "Beyond it a figure has drifted.", labels=["model", "figure"])
    for name, figure in (day.figures if day else {}).items():
        psi.add_metric([model, name], figure.psi)
        limit.add_metric([model, name], figure.limit)
    yield from (psi, limit)
    shares = (
        ("renalq_rejected_share", "Scans that were rejected, latest day.", day.rejected_share if day else None),
        ("renalq_model_accuracy", f"Right where the truth is known, {DAYS} days.", accuracy),
    )
    for name, told, value in shares:
        if value is not None:
            gauge = GaugeMetricFamily(name, told, labels=["model"])
            gauge.add_metric([model], value)
            yield gauge
