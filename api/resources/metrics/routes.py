"""`GET /metrics`, in Prometheus' format.

It needs a key, like every resource: Prometheus sends one with `authorization: {credentials_file: …}`. Every request
reads the database, so all processes of the API give the same figures.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from flask import Response, request

from api.http.auth import needs
from api.http.bodies import Blueprint
from api.http.context import principal, services, transaction
from api.http.responses import TEXT
from api.resources.metrics.families import Kind, Metric
from api.resources.metrics.stack import stack_metrics
from api.resources.metrics.tenant import tenant_metrics
from jobs.keys import Scope

PROMETHEUS, OPENMETRICS = "text/plain", "application/openmetrics-text"

blueprint = Blueprint("metrics", __name__, description="Metrics in Prometheus' format.")


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
    """Show the tenant's queue, totals, storage and champion; with the scope `operator` the stack's figures too."""
    is_operator = principal().may(Scope.OPERATOR)
    if is_operator:
        services().requests.flush()
    with transaction() as session:
        metrics = [*tenant_metrics(session), *(stack_metrics(session) if is_operator else ())]
    content, media_type = _exposition(metrics, request.headers.get("Accept", ""))
    return Response(content, content_type=media_type)


def _exposition(metrics: Iterable[Metric], accept: str) -> tuple[bytes, str]:
    """The metrics in the format that the client accepts, and its media type."""
    from prometheus_client.exposition import choose_encoder  # imported by the first request: it takes 11 MB

    encode, media_type = choose_encoder(accept)
    return encode(_Collector([_family(metric) for metric in metrics])), media_type  # type: ignore[arg-type]


def _family(metric: Metric) -> Any:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    kinds: dict[Kind, Any] = {
        Kind.GAUGE: GaugeMetricFamily, Kind.COUNTER: CounterMetricFamily, Kind.HISTOGRAM: HistogramMetricFamily,
    }  # fmt: skip
    family = kinds[metric.family.kind](metric.family.name, metric.family.help, labels=metric.family.labels)
    for labels, value in metric.values.items():
        if metric.family.kind == Kind.HISTOGRAM:
            family.add_metric(labels, value.buckets, value.total)  # type: ignore[union-attr]
        else:
            family.add_metric(labels, value)
    return family
