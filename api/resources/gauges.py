"""What Prometheus is told, read from the rows when it asks. Imported only then: the library takes 11 MB by itself."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from sqlalchemy.orm import Session

from api.http.context import services, tenant, transaction
from jobs.models import drift, registry
from jobs.models.drift import DriftReport
from jobs.queue import position

DAYS = 30
"""The champion's truths of so many days make its accuracy."""


class Gauges(Collector):
    """What there is to tell now."""

    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """As the library asks for it."""
        yield from self._metrics


def exposition(accept: str) -> tuple[bytes, str]:
    """All gauges of the asking tenant in the format that is accepted, and that format's name."""
    with transaction() as session:
        found = [*_queue(session), *_champion(session)]
    registered = CollectorRegistry(auto_describe=False)
    registered.register(Gauges(found))
    encode, kind = choose_encoder(accept)
    return encode(registered), kind


def _queue(session: Session) -> Iterator[Metric]:
    jobs = GaugeMetricFamily("renalq_jobs", "Jobs that have not ended.", labels=["state"])
    units = GaugeMetricFamily("renalq_units", "Units of work that have not ended.", labels=["state"])
    for gauge, counted in (
        (jobs, position.unfinished_jobs(session, tenant())),
        (units, position.unfinished_units(session, tenant())),
    ):
        for state, number in counted.items():
            gauge.add_metric([state], number)
    yield from (jobs, units)


def _champion(session: Session) -> Iterator[Metric]:
    champion = registry.find_champion(session, tenant())
    if champion is None:
        return
    found = drift.drift(session, champion, drift.DriftPolicy.of(services().settings), DAYS)
    yield GaugeMetricFamily("renalq_champion_version", "The version that predicts.", champion.version)
    yield from _drift(found, str(champion.version))


def _drift(found: DriftReport, model: str) -> Iterator[Metric]:
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
