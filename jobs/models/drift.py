"""Drift: how far a version's predictions of a day (UTC) are from its test scans, and how often they were right.

Each figure (the input statistics, the confidence, the predicted class, whether a scan was rejected) is compared in the
bins of the version's reference by the population stability index (PSI): the sum over bins of (q - p) ln(q / p). Without
drift, the PSI of B bins and n and m independent cases is distributed like (1/n + 1/m) times a chi-squared variable with
B - 1 degrees of freedom, so its mean is (B - 1)(1/n + 1/m) (Yurdakul 2018, "Statistical Properties of Population
Stability Index"). A figure has drifted if its PSI exceeds the bound plus that mean, and also the value that chance
exceeds once in two thousand checks: a few studies raise no alarm.

The slices of a study are alike, so the cases are studies: n and m are numbers of studies, and scans of one study have
one vote together (`effective_studies`). Scans of no known study count as if they came like the test scans do, with as
many to a study.
"""

import datetime as dt
import math
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist

import structlog
from sqlalchemy import Select, exists, func, select, update
from sqlalchemy.orm import Session, load_only

from jobs.events import webhooks
from jobs.models import feedback
from jobs.models.feedback import ConfusionCounts
from jobs.models.figures import CONFIDENCE
from jobs.queue.outcomes import CLASS, DISPOSITION, IN_STUDIES, REJECTED, SQUARES, STUDY
from jobs.settings import Settings
from jobs.tables import Json, ModelVersion, PredictionCount

SMOOTHING = 0.5
"""Studies added to each bin on both sides (additive smoothing), so that an empty bin does not make the PSI infinite."""
FALSE_ALARM_RATE = 0.0005
"""Probability of a false alarm of one check, over all figures. A day is checked again and again as studies arrive:
between 50 and 200 studies, fewer than one day in a hundred raises a false alarm."""
MAX_POOLED_DAYS = 30
"""Days that one verdict pools at most."""
MONITORED_DAYS = 2
"""Days that are checked: the last scans of a day may be counted after midnight. Deliveries prevent a second event for a
day, so they are kept longer (`RENALQ_DELIVERY_DAYS`)."""

CHECKED_AT_ONCE = 10
"""Champions that one `check_drift` checks: their references and counts are read at once."""

Counts = Counter[tuple[str, str]]
"""Scans by figure and bin."""
DayCounts = dict[dt.date, Counts]
log = structlog.get_logger()


@dataclass(frozen=True)
class DriftPolicy:
    """The PSI above which a figure has drifted, and how many studies a verdict needs."""

    bound: float
    least_studies: int

    @classmethod
    def of(cls, settings: Settings) -> "DriftPolicy":
        """The policy in the settings."""
        return cls(settings.drift_bound, settings.drift_least_studies)


@dataclass(frozen=True)
class Figure:
    """A figure's PSI, and the limit above which it has drifted."""

    psi: float
    limit: float

    @property
    def drifted(self) -> bool:
        """Whether the PSI exceeds the limit."""
        return self.psi > self.limit


@dataclass(frozen=True)
class Day:
    """A day with predictions, or with feedback on some. Cached results are not counted, but feedback on them is.

    `since`: the first of the pooled days that the figures cover; None if there is no verdict, for lack of studies or of
    a reference. `studies`: the number of studies that a verdict counts, or has so far; None without a reference.
    `truths`: the feedback."""

    day: dt.date
    scans: int
    classes: dict[str, int]
    dispositions: dict[str, int]
    rejected_share: float | None
    truths: ConfusionCounts
    since: dt.date | None = None
    studies: float | None = None
    figures: dict[str, Figure] = field(default_factory=dict)

    @property
    def drifted(self) -> list[str]:
        """Names of the figures that have drifted."""
        return [name for name, figure in self.figures.items() if figure.drifted]


@dataclass(frozen=True)
class DriftReport:
    """A version's days, oldest first."""

    model: ModelVersion
    reference_scans: int | None
    reference_studies: float | None
    bound: float
    days: list[Day]

    @property
    def latest(self) -> Day | None:
        """The latest day with counted predictions."""
        return next((day for day in reversed(self.days) if day.scans), None)

    @property
    def drifted(self) -> bool:
        """Whether any figure of the latest day has drifted."""
        return self.latest is not None and bool(self.latest.drifted)

    @property
    def truths(self) -> ConfusionCounts:
        """The feedback of all days together."""
        return sum((day.truths for day in self.days), ConfusionCounts())


# --- pure functions ---


def psi(expected: Sequence[float], found: Sequence[float]) -> float:
    """The population stability index of two histograms over the same bins."""
    return sum((q - p) * math.log(q / p) for p, q in zip(_shares(expected), _shares(found), strict=True))


def _shares(counts: Sequence[float]) -> list[float]:
    whole = sum(counts) + SMOOTHING * len(counts)
    return [(number + SMOOTHING) / whole for number in counts]


def effective_studies(scans: int, in_studies: int, squares: int, per_study: float) -> float:
    """As how many studies of equal size scans count if those of a study are all alike (Kish 1965, "Survey Sampling").

    That is (sum of k)^2 / sum of k^2 over studies of k scans. `in_studies`: scans of known studies, and `squares`: the
    sum of k^2 over these studies. The others are taken for studies of `per_study` scans each.
    """
    return scans**2 / (squares + (scans - in_studies) * per_study) if scans else 0.0


def chance_limit(bins: int, n: float, m: float, risk: float) -> float:
    """The PSI that is exceeded with probability `risk` if nothing has changed. n, m: studies on either side."""
    freedom = bins - 1
    if freedom < 1:
        return 0.0
    spread = 2 / (9 * freedom)  # Wilson and Hilferty's approximation of the chi-squared distribution
    chi_squared = freedom * (1 - spread + NormalDist().inv_cdf(1 - risk) * math.sqrt(spread)) ** 3
    return chi_squared * (1 / n + 1 / m)


def drift_limit(bins: int, n: float, m: float, bound: float, risk: float = FALSE_ALARM_RATE) -> float:
    """The PSI above which a figure has drifted: more than the bound plus its mean by chance, and more than chance."""
    mean = (bins - 1) * (1 / n + 1 / m)
    return max(bound + mean, chance_limit(bins, n, m, risk))


def figures(
    reference: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]], bound: float, n: float, m: float
) -> dict[str, Figure]:
    """Each figure that both sides have scans for. The sides are histograms of scans over the same bins, of `n` and `m`
    studies."""
    both = {name: (counts, found[name]) for name, counts in reference.items() if sum(counts) and sum(found[name])}
    return {
        name: Figure(
            psi(_votes(old, n), _votes(new, m)), drift_limit(len(old), n, m, bound, FALSE_ALARM_RATE / len(both))
        )
        for name, (old, new) in both.items()
    }


def _votes(counts: Sequence[int], studies: float) -> list[float]:
    """The histogram, scaled from scans to studies."""
    return [number * studies / sum(counts) for number in counts]


# --- rows ---


def drift(session: Session, version: ModelVersion, policy: DriftPolicy, days: int) -> DriftReport:
    """The version's days with predictions or feedback, among the last `days`."""
    first = _first_of(session, days)
    counted = _counted(session, [version.id], first - dt.timedelta(days=MAX_POOLED_DAYS))[version.id]
    judged = feedback.counts_by_day(session, version, first)
    listed = sorted(day for day in {*counted, *judged} if day >= first)
    shown = [_day(version, policy, counted, day, judged.get(day, ConfusionCounts())) for day in listed]
    scans = (version.reference or {}).get("scans")
    studies = reference_studies(version) if scans else None
    return DriftReport(version, scans, studies, policy.bound, shown)


def check_drift(session: Session, policy: DriftPolicy, after: uuid.UUID | None = None) -> uuid.UUID | None:
    """Emit a webhook event for each recent day on which a champion has drifted, once per day however often it runs, and
    keep with the champion whether it has (`ModelVersion.drift`).

    Checks `CHECKED_AT_ONCE` champions with recent predictions, those of all tenants in the order of their ids, by two
    queries. An unreadable reference of one is logged and does not affect the others.

    Returns:
        The last one checked: call it again with `after`. None after the last champion.
    """
    first = _first_of(session, MONITORED_DAYS)
    champions = session.scalars(_monitored(first, after)).all()
    counted = _counted(session, [version.id for version in champions], first - dt.timedelta(days=MAX_POOLED_DAYS))
    for version in champions:
        days = _recent(version, policy, counted[version.id], first)
        for day in days:
            if day.drifted:
                data = {"model_version": str(version.version), **_as_json(day)}
                event_id = f"drift_{version.id}_{day.day}"
                webhooks.emit(session, version.tenant_id, event_id, webhooks.EventType.MODEL_DRIFTED, data)
        if days:
            _keep(session, version, _as_json(days[-1]) if days[-1].drifted else None)
    return champions[-1].id if len(champions) == CHECKED_AT_ONCE else None


def _monitored(first: dt.date, after: uuid.UUID | None) -> Select[ModelVersion]:
    """Champions with predictions since `first`, without the large columns that drift does not need."""
    columns = "tenant_id", "version", "classes", "reference", "metrics", "drift"
    needed = [getattr(ModelVersion, name) for name in columns]
    predicted = exists().where(PredictionCount.model_id == ModelVersion.id, PredictionCount.day >= first)
    some = select(ModelVersion).options(load_only(*needed, raiseload=True)).where(ModelVersion.champion, predicted)
    return some.where(ModelVersion.id > (after or uuid.UUID(int=0))).order_by(ModelVersion.id).limit(CHECKED_AT_ONCE)


def _recent(version: ModelVersion, policy: DriftPolicy, counted: DayCounts, first: dt.date) -> list[Day]:
    """The days with predictions since `first`, oldest first; none if the reference cannot be read."""
    try:
        return [_day(version, policy, counted, day, ConfusionCounts()) for day in sorted(counted) if day >= first]
    except Exception as error:  # written by another version of the pipeline
        log.error("drift_check_failed", model=str(version.id), error=type(error).__name__)
        return []


def _as_json(day: Day) -> Json:
    return {"day": day.day.isoformat(), "figures": day.drifted}


def _keep(session: Session, version: ModelVersion, found: Json | None) -> None:
    if version.drift != found:
        session.execute(update(ModelVersion).where(ModelVersion.id == version.id).values(drift=found))


def _first_of(session: Session, days: int) -> dt.date:
    """The first of the last `days` days (UTC), including today."""
    now: dt.datetime = session.scalars(select(func.timezone("UTC", func.clock_timestamp()))).one()
    return now.date() - dt.timedelta(days=days - 1)


def _counted(session: Session, models: Sequence[uuid.UUID], first: dt.date) -> dict[uuid.UUID, DayCounts]:
    """The counts of each of these models since `first`."""
    found: dict[uuid.UUID, DayCounts] = {model_id: {} for model_id in models}
    key = PredictionCount.model_id, PredictionCount.day, PredictionCount.what, PredictionCount.bin
    rows = select(*key, PredictionCount.scans).where(PredictionCount.model_id.in_(models), PredictionCount.day >= first)
    for row in session.execute(rows):
        found[row.model_id].setdefault(row.day, Counter())[row.what, row.bin] = row.scans
    return found


def _day(version: ModelVersion, policy: DriftPolicy, counted: DayCounts, day: dt.date, judged: ConfusionCounts) -> Day:
    mine = counted.get(day, Counter())
    classes, dispositions = _words(mine, CLASS), _words(mine, DISPOSITION)
    rejected = dispositions.get(REJECTED, 0) / sum(dispositions.values()) if dispositions else None
    plain = Day(day, sum(classes.values()), classes, dispositions, rejected, judged)
    if not mine or not version.reference:
        return plain
    known, decided = reference_studies(version), version.reference.get("decided_since", "")
    same = {
        each: counts for each, counts in counted.items() if (each.isoformat() > decided) == (day.isoformat() > decided)
    }
    since, pooled, studies = _pooled(same, day, policy.least_studies, version.reference["scans"] / known)
    if since is None:
        return replace(plain, studies=studies)
    reference = _reference(version)
    if day.isoformat() <= decided:  # what was predicted then had another threshold than the reference has now
        reference = {name: counts for name, counts in reference.items() if name not in (CLASS, CONFIDENCE)}
    found = {name: _bins(pooled, name, version, len(counts)) for name, counts in reference.items()}
    return replace(plain, since=since, studies=studies, figures=figures(reference, found, policy.bound, known, studies))


def _words(counts: Counts, what: str) -> dict[str, int]:
    return {bin_: scans for (name, bin_), scans in sorted(counts.items()) if name == what}


def reference_studies(version: ModelVersion) -> float:
    """The number of studies that the reference's test scans count as.

    Versions of before this was kept have the number of their independent groups; without that, each scan is a study.
    """
    reference = version.reference or {}
    return float(reference.get("studies") or version.metrics.get("independent") or reference["scans"])


def _pooled(counted: DayCounts, day: dt.date, least: int, per_study: float) -> tuple[dt.date | None, Counts, float]:
    """Counts of the day, pooled with as many previous days as are needed for `least` studies, the first of these days
    (None if all are not enough), and the number of studies."""
    pooled: Counts = Counter()
    studies = 0.0
    for earlier in sorted((each for each in counted if each <= day), reverse=True):
        if day - earlier > dt.timedelta(days=MAX_POOLED_DAYS):
            break
        pooled += counted[earlier]
        scans = sum(_words(pooled, CLASS).values())
        studies = effective_studies(scans, pooled[STUDY, IN_STUDIES], pooled[STUDY, SQUARES], per_study)
        if studies >= least:
            return earlier, pooled, studies
    return None, pooled, studies


def _reference(version: ModelVersion) -> dict[str, list[int]]:
    reference = version.reference or {}
    found = {name: list(figure["counts"]) for name, figure in reference.get("statistics", {}).items()}
    found[CLASS] = [reference.get("classes", {}).get(label, 0) for label in version.classes]
    if REJECTED in reference:
        found[REJECTED] = [reference[REJECTED], reference["scans"] - reference[REJECTED]]
    return found


def _bins(counts: Counts, name: str, version: ModelVersion, bins: int) -> list[int]:
    if name == REJECTED:
        all_scans = sum(_words(counts, DISPOSITION).values())
        return [counts[DISPOSITION, REJECTED], all_scans - counts[DISPOSITION, REJECTED]]
    names = version.classes if name == CLASS else map(str, range(bins))
    return [counts[name, bin_] for bin_ in names]
