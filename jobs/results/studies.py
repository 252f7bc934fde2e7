"""One answer for each study, or for each patient, of a prediction: its slices' results, pooled (ml.spec.pooling).

Nothing of it is stored: an answer is computed from the results when it is asked for, so it cannot disagree with them. A
study is what the client calls one, else the file's StudyInstanceUID, else the scan by itself.
"""

import re
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from sqlalchemy import ColumnElement, String, case, cast, func, or_, select
from sqlalchemy.orm import Session

from jobs.errors import StudyNotFound
from jobs.paging import Page, page
from jobs.queue import kept
from jobs.queue.outcomes import REJECTED
from jobs.results.queries import START, JobView, require_prediction, views_of
from jobs.settings import Settings
from jobs.states import TERMINAL, ResultState
from jobs.tables import NOT_SUCCEEDED, Job, Json, ModelVersion, ScanResult
from jobs.tables.columns import LAST_ID
from ml.spec.pooling import Pooled, Pooling, pooled, positive_of

By = Literal["study", "patient"]
INDETERMINATE = "indeterminate"
MOST_COUNTED = 20_000
"""Results of a prediction whose studies are counted for a webhook, which the dispatcher's process does."""
USABLE_SHARE = 0.5
"""Of a study's slices: where fewer can be used, what the others show decides nothing by itself."""
_UID = re.compile(r"[0-9.]{1,64}")
COLUMNS = (
    ScanResult.ordinal, ScanResult.frame, ScanResult.custom_id, ScanResult.patient, ScanResult.study, ScanResult.state,
    ScanResult.probabilities, ScanResult.disposition, ScanResult.reason, ScanResult.error, ScanResult.identity,
)  # fmt: skip


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
        return cls(positive_of(metrics), Pooling.of(metrics), low, high)

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


def studies(
    session: Session, view: JobView, settings: Settings, by: By = "study", limit: int = 100, after: int | None = None
) -> Page[StudyAnswer]:
    """Answers of an ended prediction, in the order of their first results. While it runs there are none, and `has_more`
    is true: an answer without all of its slices could be another one.

    Scans that failed and do not say which study they are of stand in no answer.

    Raises:
        NoResults: the job is not a prediction.
        ResultsExpired
    """
    require_prediction(view)
    first = START if after is None else after
    if not view.terminal:
        return Page([], True, str(first))
    key, mine = _key(by).label("key"), (ScanResult.job_id == view.job.id, _belongs())
    lowest = func.min(ScanResult.ordinal).label("first")
    keys = select(key, lowest).where(*mine).group_by(key).having(lowest > first).order_by(lowest).limit(limit + 1)
    found = page(session.execute(keys).all(), limit, lambda row: row.first)
    rows = _rows(session, key, *mine, _key(by).in_([row.key for row in found.data]))
    kept.require_kept(session, view.job.id)
    policy = StudyPolicy.of(settings, _metrics(session, view.job))
    answers = {name: answer_of(view.job, list(some), policy) for name, some in groupby(rows, lambda row: row.key)}
    return Page([answers[row.key] for row in found.data], found.has_more, found.next)


def of_uid(
    session: Session, tenant_id: str, uid: str, settings: Settings, limit: int = 100, after: uuid.UUID | None = None
) -> Page[StudyAnswer]:
    """What ended predictions of the tenant say of the study with this StudyInstanceUID, newest first.

    Raises:
        StudyNotFound: no result is of this study.
    """
    if not _UID.fullmatch(uid):
        raise StudyNotFound
    of_study = ScanResult.tenant_id == tenant_id, _uid() == uid, _uid().is_not(None)
    ended = Job.id.in_(select(ScanResult.job_id).where(*of_study)), Job.state.in_(TERMINAL)
    query = views_of().where(*ended, Job.id < (after or LAST_ID)).order_by(Job.id.desc()).limit(limit + 1)
    found = page(session.execute(query).all(), limit, lambda row: row[0].id)
    if not found.data and after is None:
        raise StudyNotFound
    return Page([_of_job(session, job, uid, settings) for job, _ in found.data], found.has_more, found.next)


def _of_job(session: Session, job: Job, uid: str, settings: Settings) -> StudyAnswer:
    rows = _rows(session, _uid().label("key"), ScanResult.job_id == job.id, _uid() == uid)
    return answer_of(job, rows, StudyPolicy.of(settings, _metrics(session, job)))


def dispositions(session: Session, view: JobView, settings: Settings) -> dict[str, int] | None:
    """How many studies of an ended prediction have which disposition; None if it has more than `MOST_COUNTED` results.

    Raises:
        NoResults, ResultsExpired
    """
    require_prediction(view)
    if view.job.total > MOST_COUNTED:
        return None
    rows = _rows(session, _key("study").label("key"), ScanResult.job_id == view.job.id, _belongs())
    kept.require_kept(session, view.job.id)
    policy = StudyPolicy.of(settings, _metrics(session, view.job))
    answers = (answer_of(view.job, list(some), policy) for _, some in groupby(rows, lambda row: row.key))
    return dict(Counter(answer.disposition for answer in answers))


# --- which results belong together -----------------------------------------------------------------------------------


def _uid() -> ColumnElement[str | None]:
    return ScanResult.identity["study_uid"].astext


def _key(by: By) -> ColumnElement[str]:
    """What results of one study, or of one patient, have in common. The first letters keep the kinds of keys apart."""
    alone = func.concat("o", cast(ScanResult.ordinal, String))
    keys = case(
        (ScanResult.study.is_not(None), func.concat("s", ScanResult.study)),
        (_uid().is_not(None), func.concat("u", _uid())),
        else_=alone,
    )
    if by == "study":
        return keys
    patient = _patient()
    return case((patient.is_not(None), func.concat("p", patient)), else_=keys)


def _patient() -> ColumnElement[str | None]:
    told = ScanResult.identity["patient"].astext, ScanResult.identity["patient_hash"].astext
    return func.coalesce(ScanResult.patient, *told)


def _belongs() -> ColumnElement[bool]:
    """Not what failed without telling its study: a report or a broken file is no study of its own."""
    return or_(ScanResult.state.not_in(NOT_SUCCEEDED), ScanResult.study.is_not(None), _uid().is_not(None))


def _rows(session: Session, key: Any, *which: ColumnElement[bool]) -> list[Any]:
    """Results with their `key`, those of one key beside each other."""
    return list(session.execute(select(key, *COLUMNS).where(*which).order_by(key, ScanResult.ordinal)).all())


def _metrics(session: Session, job: Job) -> Json | None:
    model = session.get(ModelVersion, job.model_id) if job.model_id else None
    return model.metrics if model else None


# --- an answer -------------------------------------------------------------------------------------------------------


def answer_of(job: Job, rows: Sequence[Any], policy: StudyPolicy) -> StudyAnswer:
    """The answer of a study's results, at least one."""
    ordered = in_order(rows)
    usable = [row for row in ordered if row.state == ResultState.SUCCEEDED and row.disposition != REJECTED]
    usable = [row for row in usable if row.probabilities]
    rejected = sum(row.disposition == REJECTED for row in rows)
    failed = sum(row.state in NOT_SUCCEEDED for row in rows)
    answer = pooled([row.probabilities for row in usable], policy.positive, policy.pooling) if usable else None
    if answer is None:
        disposition, reason = REJECTED, _why_nothing(rows)
    else:
        disposition, reason = policy.disposition(answer, len(usable), len(rows))
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
        disposition=disposition,
        reason=reason,
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
