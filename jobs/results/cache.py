"""Result cache: a scan that the same model has predicted on the same engine is not computed again.

In the index ix_scan_results_scan_id_cached a scan's computed results stand apart from cached ones: one per model and
engine, however often the scan is sent.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import and_, select
from sqlalchemy.orm import Session

from jobs.states import ResultState
from jobs.tables import Job, Json, ScanResult

COMPUTED = and_(ScanResult.state == ResultState.SUCCEEDED, ~ScanResult.cached)
"""SQL: the result was computed. Not `cached IS false`: Postgres would not search for that in the index."""


ScanFrame = tuple[uuid.UUID, int | None]
"""A scan, and which of its frames; None: all of it."""


@dataclass(frozen=True)
class CachedResult:
    """An earlier prediction of a scan. Its disposition is decided again, since the policy may have changed."""

    label: str | None
    confidence: float | None
    probabilities: dict[str, float] | None
    ood_score: float | None = None
    reason: str | None = None
    output: Json | None = None
    identity: Json | None = field(default=None, repr=False)


def cached_results(
    session: Session, model_id: uuid.UUID, engine: str, scan_ids: Sequence[uuid.UUID]
) -> dict[ScanFrame, CachedResult]:
    """Earlier results of these scans by this model on this engine, by scan and frame. The model and the scans belong to
    one tenant, so that no result crosses tenants. Results of the time before identities were read are not reused: they
    would stand in no study."""
    rows = session.execute(_select_results(model_id, engine, scan_ids))
    return {(scan_id, frame): CachedResult(*result) for scan_id, frame, *result in rows}


def _select_results(model_id: uuid.UUID, engine: str, scan_ids: Sequence[uuid.UUID]) -> Any:
    columns = (
        ScanResult.scan_id,
        ScanResult.frame,
        ScanResult.label,
        ScanResult.confidence,
        ScanResult.probabilities,
        ScanResult.ood_score,
        ScanResult.reason,
        ScanResult.output,
        ScanResult.identity,
    )
    same = ScanResult.scan_id.in_(scan_ids), ScanResult.engine == engine, Job.model_id == model_id
    looked = ScanResult.identity.is_not(None)
    return select(*columns).join(Job, Job.id == ScanResult.job_id).where(COMPUTED, looked, *same)
