"""What was computed once need not be again: results of the same scan by the same model on the same engine.

The index ix_scan_results_computed holds computed results alone, so however often a scan is sent again, it is there once
for each model and engine.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import and_, select
from sqlalchemy.orm import Session

from jobs.states import ResultState
from jobs.tables import Job, ScanResult

COMPUTED = and_(ScanResult.state == ResultState.SUCCEEDED, ~ScanResult.cached)
"""In the very words of the index ix_scan_results_computed: for `cached IS false` Postgres reads the whole table."""


@dataclass(frozen=True)
class Known:
    """What was found for a scan before. What may be done with it is decided anew: the policy may be another by now."""

    label: str | None
    confidence: float | None
    probabilities: dict[str, float]
    ood_score: float | None = None
    reason: str | None = None


def known_results(
    session: Session, model_id: uuid.UUID, engine: str, scan_ids: Sequence[uuid.UUID]
) -> dict[uuid.UUID, Known]:
    """Results of these scans by this model on this engine, where there are any. Scan ids are of one tenant, and so is
    the model's: nobody is answered out of another's work."""
    rows = session.execute(_equal(model_id, engine, scan_ids))
    return {row.scan_id: Known(row.label, row.confidence, row.probabilities, row.ood_score, row.reason) for row in rows}


def _equal(model_id: uuid.UUID, engine: str, scan_ids: Sequence[uuid.UUID]) -> Any:
    found = (
        ScanResult.scan_id,
        ScanResult.label,
        ScanResult.confidence,
        ScanResult.probabilities,
        ScanResult.ood_score,
        ScanResult.reason,
    )
    alike = ScanResult.scan_id.in_(scan_ids), ScanResult.engine == engine, Job.model_id == model_id
    return select(*found).join(Job, Job.id == ScanResult.job_id).where(COMPUTED, *alike)
