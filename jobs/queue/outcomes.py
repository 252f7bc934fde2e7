"""Writes of a unit's results, with the counters of its job and the counts of its model's predictions (by model, day,
figure and bin; and by study), which `jobs.models.drift` reads."""

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sqlalchemy import all_, func, literal, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from jobs.db import NOW, PreparedStatement
from jobs.queue.leases import Claim
from jobs.states import PREDICTIONS, ResultState
from jobs.tables import Job, Json, ScanResult, UnitCount

CLASS, DISPOSITION = "class", "disposition"
"""Figures that are counted by word; all others are numeric and counted by bin."""
STUDY, IN_STUDIES, SQUARES = "study", "scans", "squares"
"""The figure that counts predictions of known studies, and its bins: their number, and the sum over the day's studies
of the square of the study's number of predictions."""
REJECTED = "rejected"
"""The disposition of a scan whose class must not be used (ml/image/serving/disposition.py)."""


@dataclass(frozen=True)
class ScanOutcome:
    """The result of one scan: a label with its probabilities and the engine that computed them, or an error.

    `disposition`, `reason`, `ood_score`, `output`, `identity`: see ml.pipelines.Prediction and Disposition.
    `statistics` of the scan are counted for drift and not stored.
    """

    ordinal: int
    label: str | None = None
    confidence: float | None = None
    probabilities: Mapping[str, float] | None = None
    engine: str | None = None
    cached: bool = False
    """Copied from an earlier result of the same scan, model and engine."""
    error: Json | None = None
    disposition: str | None = None
    reason: str | None = None
    ood_score: float | None = None
    statistics: Mapping[str, float] | None = None
    output: Json | None = None
    identity: Json | None = field(default=None, repr=False)


def add_counts(session: Session, job_id: uuid.UUID, **increments: int) -> None:
    """Increment the job's counters."""
    values = {name: getattr(Job, name) + number for name, number in increments.items() if number}
    if values:
        session.execute(update(Job).where(Job.id == job_id).values(**values))


def count_failure(session: Session, claim: Claim, error: Json, retried: bool) -> None:
    """Count a failed attempt of a unit by its error's code, for metrics."""
    new = insert(UnitCount).values(
        tenant_id=claim.tenant_id,
        kind=claim.kind,
        code=str(error.get("code"))[:80],
        retried=int(retried),
        ended=int(not retried),
    )
    both = {name: getattr(UnitCount, name) + new.excluded[name] for name in ("retried", "ended")}
    session.execute(new.on_conflict_do_update(index_elements=["tenant_id", "kind", "code"], set_=both))


# One statement writes a whole chunk, up to 2048 rows. The ordinals are passed once more as an array: without statistics
# of a new batch the planner assumes few rows, and would join the whole batch to find the chunk in it.
WRITE_OUTCOMES = PreparedStatement(
    "write_outcomes",
    "uuid, int[], jsonb",
    """
UPDATE scan_results SET state = CASE WHEN ended.error IS NULL THEN 'succeeded' ELSE 'failed' END,
    label = ended.label, confidence = ended.confidence, probabilities = ended.probabilities, engine = ended.engine,
    cached = coalesce(ended.cached, false), error = ended.error, disposition = ended.disposition,
    reason = ended.reason, ood_score = ended.ood_score, output = ended.output,
    identity = coalesce(ended.identity, '{}'), finished_at = (SELECT clock_timestamp())
FROM jsonb_to_recordset($3) AS ended (ordinal int, label text, confidence float8, probabilities jsonb, engine text,
    cached boolean, error jsonb, disposition text, reason text, ood_score float8, output jsonb, identity jsonb)
WHERE scan_results.job_id = $1 AND scan_results.ordinal = ANY ($2) AND scan_results.ordinal = ended.ordinal
""",
)


def write_outcomes(session: Session, claim: Claim, outcomes: Sequence[ScanOutcome], counted: bool = False) -> None:
    """Write results of the unit's scans. `counted`: the caller has incremented the job's counters."""
    if not outcomes:
        return
    ordinals = [outcome.ordinal for outcome in outcomes]
    WRITE_OUTCOMES(session, str(claim.job_id), ordinals, json.dumps([_as_row(outcome) for outcome in outcomes]))
    _count_predictions(session, claim, outcomes)
    if not counted:
        failed = sum(outcome.error is not None for outcome in outcomes)
        add_counts(session, claim.job_id, succeeded=len(outcomes) - failed, failed=failed)
        for engine in engines_of(outcomes):
            new = update(Job).where(Job.id == claim.job_id, literal(engine) != all_(Job.engines))
            session.execute(new.values(engines=func.array_append(Job.engines, engine)))


def _as_row(outcome: ScanOutcome) -> Json:
    return {name: value for name, value in vars(outcome).items() if value is not None and name != "statistics"}


# Rows are written in the order of their key, so that two workers that finish chunks at once cannot deadlock.
COUNT_PREDICTIONS = PreparedStatement(
    "count_predictions",
    "uuid, jsonb",
    """
WITH model AS MATERIALIZED (
    SELECT model_versions.id, model_versions.tenant_id, coalesce(reference -> 'statistics', '{}') AS statistics
    FROM jobs JOIN model_versions ON model_versions.id = jobs.model_id WHERE jobs.id = $1
), binned AS MATERIALIZED (
    SELECT key AS what, translate(value ->> 'edges', '[]', '{}')::float8[] AS edges
    FROM model, jsonb_each(model.statistics)
), found AS (
    SELECT figure.key AS what, width_bucket(item.value::float8, edges)::text AS bin
    FROM jsonb_each($2) AS figure JOIN binned ON binned.what = figure.key,
        jsonb_array_elements_text(figure.value) AS item
    UNION ALL
    SELECT word, item.value
    FROM unnest(ARRAY['class', 'disposition']) AS word, jsonb_array_elements_text($2 -> word) AS item
)
INSERT INTO prediction_counts (model_id, day, what, bin, tenant_id, scans)
SELECT model.id, (SELECT (clock_timestamp() AT TIME ZONE 'UTC')::date), what, bin, model.tenant_id, count(*)
FROM model, found GROUP BY model.id, model.tenant_id, what, bin ORDER BY what, bin
ON CONFLICT (model_id, day, what, bin) DO UPDATE SET scans = prediction_counts.scans + excluded.scans
""",
)


# A study is what the client calls one, else the file's StudyInstanceUID (as in jobs.results.studies), of a patient.
# Each study's predictions of the day are counted in a table of their own, so that a study that comes in several
# requests and chunks is known again. A study of k predictions that gets n more adds (k + n)^2 - k^2 to the squares.
COUNT_STUDIES = PreparedStatement(
    "count_studies",
    "uuid, int[]",
    """
WITH model AS MATERIALIZED (
    SELECT model_versions.id, model_versions.tenant_id
    FROM jobs JOIN model_versions ON model_versions.id = jobs.model_id WHERE jobs.id = $1
), named AS MATERIALIZED (
    SELECT coalesce(patient, identity ->> 'patient', identity ->> 'patient_hash') AS patient,
        coalesce(study, identity ->> 'study_uid') AS study
    FROM scan_results WHERE job_id = $1 AND ordinal = ANY ($2)
), found AS MATERIALIZED (
    SELECT hashtextextended(concat_ws(chr(31), patient, study), 0) AS study, count(*) AS scans
    FROM named WHERE coalesce(study, patient) IS NOT NULL GROUP BY 1
), counted AS (
    INSERT INTO study_counts (model_id, day, study, tenant_id, scans)
    SELECT model.id, (SELECT (clock_timestamp() AT TIME ZONE 'UTC')::date), found.study, model.tenant_id, found.scans
    FROM model, found ORDER BY found.study
    ON CONFLICT (model_id, day, study) DO UPDATE SET scans = study_counts.scans + excluded.scans
    RETURNING model_id, day, study, tenant_id, scans
)
INSERT INTO prediction_counts (model_id, day, what, bin, tenant_id, scans)
SELECT model_id, day, 'study', figure.bin, tenant_id, sum(figure.scans)
FROM counted JOIN found ON found.study = counted.study, LATERAL (VALUES
    ('scans', found.scans), ('squares', counted.scans ^ 2 - (counted.scans - found.scans) ^ 2)) AS figure (bin, scans)
GROUP BY model_id, day, figure.bin, tenant_id ORDER BY figure.bin
ON CONFLICT (model_id, day, what, bin) DO UPDATE SET scans = prediction_counts.scans + excluded.scans
""",
)


def _count_predictions(session: Session, claim: Claim, outcomes: Sequence[ScanOutcome]) -> None:
    """Count predictions for the job's model and today (UTC): no failures, no cached results (counted before), and no
    numeric figures without bins in the model's reference."""
    found: dict[str, list[str | float]] = {}
    counted = [outcome for outcome in outcomes if outcome.error is None and not outcome.cached]
    for outcome in counted:
        figures = {CLASS: outcome.label, DISPOSITION: outcome.disposition, "confidence": outcome.confidence}
        for what, value in (*figures.items(), *(outcome.statistics or {}).items()):
            if value is not None:
                found.setdefault(what, []).append(value)
    if found:
        COUNT_PREDICTIONS(session, str(claim.job_id), json.dumps(found))
        COUNT_STUDIES(session, str(claim.job_id), [outcome.ordinal for outcome in counted if outcome.label is not None])


def engines_of(outcomes: Sequence[ScanOutcome]) -> list[str]:
    """The engines that computed these results, sorted."""
    return sorted({outcome.engine for outcome in outcomes if outcome.engine is not None})


def finish_items(session: Session, claim: Claim, state: ResultState, error: Json | None) -> None:
    """Give all pending scans of the unit this state, and count them. A unit of another kind counts as one."""
    ended = 1
    if claim.kind in PREDICTIONS:
        ended = session.execute(
            update(ScanResult)
            .where(ScanResult.unit_id == claim.unit_id, ScanResult.state == ResultState.PENDING)
            .values(state=state, error=error, finished_at=NOW)
            .execution_options(synchronize_session=False)
        ).rowcount  # type: ignore[attr-defined]
    add_counts(session, claim.job_id, **{str(state): ended})
