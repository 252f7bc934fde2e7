"""One answer for each study, or for each patient, of a prediction: its slices' results, pooled (ml.spec.pooling).

Nothing of it is stored: an answer is computed from the results when it is asked for, so it cannot disagree with them. A
study is what the client calls one, else the file's StudyInstanceUID, else the scan by itself.
"""

import re
import uuid
from collections import Counter
from itertools import groupby
from typing import Any, Literal

from sqlalchemy import ColumnElement, String, and_, case, cast, func, or_, select
from sqlalchemy.orm import Session

from jobs.errors import ScanDeleted, StudyNotFound
from jobs.paging import Page, page
from jobs.queue import kept
from jobs.results.queries import START, JobView, require_prediction
from jobs.results.study_answers import StudyAnswer, StudyPolicy, answer_of
from jobs.settings import Settings
from jobs.states import TERMINAL
from jobs.tables import NOT_SUCCEEDED, Job, Json, ModelVersion, ScanResult
from jobs.tables.columns import LAST_ID

By = Literal["study", "patient"]
MOST_COUNTED = 20_000
"""Results of a prediction whose studies are counted for a webhook, which the dispatcher's process does."""
_UID = re.compile(r"[0-9.]{1,64}")
COLUMNS = (
    ScanResult.ordinal, ScanResult.frame, ScanResult.patient, ScanResult.study, ScanResult.state,
    ScanResult.probabilities, ScanResult.disposition, ScanResult.reason, ScanResult.error, ScanResult.identity,
)  # fmt: skip


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
    mine = Job.tenant_id == tenant_id, Job.id < (after or LAST_ID)  # a job that is being deleted has another tenant
    query = select(Job).where(*ended, *mine).order_by(Job.id.desc()).limit(limit + 1)
    found = page(session.scalars(query).all(), limit, lambda job: job.id)
    if not found.data and after is None:
        raise StudyNotFound
    answers = (_of_job(session, job, uid, settings) for job in found.data)
    return Page([answer for answer in answers if answer], found.has_more, found.next)


def _of_job(session: Session, job: Job, uid: str, settings: Settings) -> StudyAnswer | None:
    """None if the job's results were deleted meanwhile."""
    rows = _rows(session, _uid().label("key"), ScanResult.job_id == job.id, _uid() == uid)
    if not rows or not kept.are_kept(session, job.id):
        return None
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
    """Not what failed without telling its study: a report or a broken file is no study of its own. Nor what is left of
    the result of a deleted scan."""
    has_scan = ScanResult.error["code"].astext.is_distinct_from(ScanDeleted.code)
    told = or_(ScanResult.state.not_in(NOT_SUCCEEDED), ScanResult.study.is_not(None), _uid().is_not(None))
    return and_(has_scan, told)


def _rows(session: Session, key: Any, *which: ColumnElement[bool]) -> list[Any]:
    """Results with their `key`, those of one key beside each other."""
    return list(session.execute(select(key, *COLUMNS).where(*which).order_by(key, ScanResult.ordinal)).all())


def _metrics(session: Session, job: Job) -> Json | None:
    """The model's, at the operating point that the job is pinned to."""
    model = session.get(ModelVersion, job.model_id) if job.model_id else None
    if model is None:
        return None
    pinned = {name: value for name, value in (job.operating_point or {}).items() if value is not None}
    return {**model.metrics, **pinned}
