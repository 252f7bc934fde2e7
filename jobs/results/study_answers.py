"""The answer for one study, or one patient, of its slices' results: pooled by `ml.spec.pooling`, with a disposition."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.queue.outcomes import REJECTED
from jobs.settings import Settings
from jobs.states import ResultState
from jobs.tables import NOT_SUCCEEDED, Job, Json
from ml.spec.pooling import Pooled, Pooling, pooled
from ml.spec.positive_class import of_metrics

INDETERMINATE = "indeterminate"
USABLE_SHARE = 0.5
"""Of a study's slices: where fewer can be used, what the others show decides nothing by itself."""


@dataclass(frozen=True)
class StudyPolicy:
    """How a model's slices become one answer: its positive classes and pooling, and the settings' limits of doubt."""

    positive: Sequence[str]
    pooling: Pooling
    low: float
    high: float

    @classmethod
    def of(cls, settings: Settings, metrics: Json | None) -> "StudyPolicy":
        """The policy of the settings, for a model with these metrics."""
        low, high = settings.indeterminate_above, settings.indeterminate_below
        return cls(of_metrics(metrics) or (), Pooling.of(metrics), low, high)

    def disposition(self, answer: Pooled, usable: int, slices: int) -> tuple[str, str | None]:
        """The disposition of an answer that so many of a study's slices gave, and why it is no class."""
        if usable < USABLE_SHARE * slices:
            return INDETERMINATE, f"Only {usable} of its {slices} slices could be used: look at the others yourself."
        sure = answer.confidence >= self.high if answer.score is None else not self.low < answer.score < self.high
        if not sure:
            return INDETERMINATE, f"The network is unsure: {answer.label} has {answer.confidence:.2f}."
        if answer.score is not None and (answer.score >= self.high) != (answer.score >= self.pooling.threshold):
            shown = answer.confidence
            return INDETERMINATE, f"The network is unsure: it calls this {answer.label}, but with {shown:.2f} only."
        return answer.label.lower(), None


@dataclass(frozen=True)
class StudyAnswer:
    """What a prediction says of a study, or of a patient.

    `first`: the ordinal of its first result, by which answers are ordered and paged. `ordinals`: of all of its results,
    in the order of the slices: series after series, by position. `deciding`: the results that decided it. `used`,
    `rejected`, `failed`: how many of its slices; cancelled ones count as failed.
    """

    job: Job
    first: int
    study_uids: list[str]
    studies: list[str]
    series_uids: list[str]
    accession: str | None
    patient: str | None
    label: str | None
    confidence: float | None
    probabilities: dict[str, float] | None
    disposition: str
    reason: str | None
    slices: int
    used: int
    rejected: int
    failed: int
    deciding: list[Json]
    ordinals: list[int]
    pooling: Pooling

    @property
    def study_uid(self) -> str | None:
        """The StudyInstanceUID, if it is one."""
        return self.study_uids[0] if len(self.study_uids) == 1 else None

    @property
    def study(self) -> str | None:
        """The client's key, if it is one."""
        return self.studies[0] if len(self.studies) == 1 else None


def answer_of(job: Job, rows: Sequence[Any], policy: StudyPolicy) -> StudyAnswer:
    """The answer of a study's results, at least one."""
    ordered = in_order(rows)
    usable = [row for row in ordered if row.state == ResultState.SUCCEEDED and row.disposition != REJECTED]
    usable = [row for row in usable if row.probabilities]
    rejected = sum(row.disposition == REJECTED for row in rows)
    failed = sum(row.state in NOT_SUCCEEDED for row in rows)
    answer = pooled([row.probabilities for row in usable], policy.positive, policy.pooling) if usable else None
    judged = policy.disposition(answer, len(usable), len(rows)) if answer else (REJECTED, _why_nothing(rows))
    deciding = [usable[position] for position in answer.deciding] if answer else []
    return StudyAnswer(
        job=job,
        first=min(row.ordinal for row in rows),
        study_uids=_distinct(_told(row, "study_uid") for row in ordered),
        studies=_distinct(row.study for row in ordered),
        series_uids=_distinct(_told(row, "series_uid") for row in ordered),
        accession=next(iter(_distinct(_told(row, "accession") for row in ordered)), None),
        patient=next(iter(_distinct(map(patient_of, ordered))), None),
        label=answer.label if answer else None,
        confidence=answer.confidence if answer else None,
        probabilities=answer.probabilities if answer else None,
        disposition=judged[0],
        reason=judged[1],
        slices=len(rows),
        used=len(usable),
        rejected=rejected,
        failed=failed,
        deciding=[_slice(row, answer) for row in deciding] if answer else [],
        ordinals=[row.ordinal for row in ordered],
        pooling=policy.pooling,
    )


def in_order(rows: Iterable[Any]) -> list[Any]:
    """Slices series after series; in a series by position, or by InstanceNumber where one has no position."""
    by_series: dict[str, list[Any]] = {}
    for row in sorted(rows, key=lambda row: row.ordinal):
        by_series.setdefault(_told(row, "series_uid") or "", []).append(row)
    return [row for series in by_series.values() for row in _ordered(series)]


def _ordered(series: list[Any]) -> list[Any]:
    placed = all(_told(row, "position_mm") is not None for row in series)

    def place(row: Any) -> tuple[float, ...]:
        number = _told(row, "instance_number")
        counted = float("inf") if number is None else number
        position = (_told(row, "position_mm"),) if placed else ()
        return (*position, counted, row.frame or 0, row.ordinal)

    return sorted(series, key=place)


def patient_of(row: Any) -> str | None:
    """A result's patient: the client's key, else what is kept of DICOM's PatientID."""
    patient: str | None = row.patient or _told(row, "patient") or _told(row, "patient_hash")
    return patient


def _told(row: Any, name: str) -> Any:
    return (row.identity or {}).get(name)


def _distinct(values: Iterable[str | None]) -> list[str]:
    return list(dict.fromkeys(value for value in values if value is not None))


def _slice(row: Any, answer: Pooled) -> Json:
    told = {name: _told(row, name) for name in ("sop_uid", "instance_number", "position_mm")}
    return {"ordinal": row.ordinal, "frame": row.frame, **told, "probability": row.probabilities[answer.label]}


def _why_nothing(rows: Sequence[Any]) -> str:
    """Why no slice can be used, by what most of them say."""
    said = Counter(row.reason or (row.error or {}).get("detail") for row in rows)
    most = next((reason for reason, _ in said.most_common() if reason), "They have no class.")
    return f"None of its {len(rows)} slices can be used. Most often: {most}"
