"""Drift: how far what a version predicts now lies from its test scans, day by day (UTC), and how right it was.

Each figure (the statistics of the pictures, the confidence, the predicted class, whether a scan was rejected) is
compared in the bins of the version's reference by the population stability index: the sum over bins of
(q - p) ln(q / p). Chance alone makes it (B - 1)(1/n + 1/m) on average, for B bins, n reference scans and m scans, and
spreads it like a chi-squared number of B - 1 degrees of freedom times (1/n + 1/m) (Yurdakul 2018, "Statistical
Properties of Population Stability Index"). So a figure has drifted where its index is above the bound and that average
together, and above what chance alone makes it once in two thousand days as well: few scans alarm nobody.
"""

import datetime as dt
import math
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist

from sqlalchemy import exists, func, select
from sqlalchemy.orm import Session

from jobs.events import webhooks
from jobs.models import feedback
from jobs.models.feedback import Judged
from jobs.queue.prediction_counts import CLASS, DISPOSITION, REJECTED
from jobs.settings import Settings
from jobs.tables import ModelVersion, PredictionCount

SMOOTHING = 0.5
"""Scans added to each bin on both sides (Laplace's way), so that an empty one is not infinitely far."""
RISK = 0.0005
"""Chance of a verdict with no cause, over all figures. A day that is looked at again and again has several such
chances; from 50 scans to 200, less than one day in a hundred brings one."""
MAX_POOLED_DAYS = 30
"""Days that one verdict reaches back at most."""
MONITORED_DAYS = 2
"""Days that drift is looked for in: the last scans of a day may be counted after the last look at it. Deliveries, by
which it is known that a day's drift was told of, are kept for longer (`RENALQ_DELIVERY_DAYS`)."""

Counts = Counter[tuple[str, str]]
"""Scans by figure and bin."""


@dataclass(frozen=True)
class DriftPolicy:
    """From which index on a figure has drifted, and how many scans a verdict needs."""

    bound: float
    least_scans: int

    @classmethod
    def of(cls, settings: Settings) -> "DriftPolicy":
        """The policy of the settings."""
        return cls(settings.drift_bound, settings.drift_least_scans)


@dataclass(frozen=True)
class Figure:
    """A figure's index, and the limit that it must pass to have drifted."""

    psi: float
    limit: float

    @property
    def drifted(self) -> bool:
        """Whether it has."""
        return self.psi > self.limit


@dataclass(frozen=True)
class Day:
    """A day with predictions, or with the truths of some: those that were taken over from equal ones are not counted,
    and yet judged. `since`: the first of the days that the figures are of; None where there is no verdict, for want of
    scans or of a reference."""

    day: dt.date
    scans: int
    classes: dict[str, int]
    dispositions: dict[str, int]
    rejected_share: float | None
    truths: Judged
    since: dt.date | None = None
    figures: dict[str, Figure] = field(default_factory=dict)

    @property
    def drifted(self) -> list[str]:
        """The figures that have drifted."""
        return [name for name, figure in self.figures.items() if figure.drifted]


@dataclass(frozen=True)
class Drift:
    """A version's days, oldest first."""

    model: ModelVersion
    reference_scans: int | None
    bound: float
    days: list[Day]

    @property
    def latest(self) -> Day | None:
        """The latest day with predictions."""
        return next((day for day in reversed(self.days) if day.scans), None)

    @property
    def drifted(self) -> bool:
        """Whether a figure of the latest day has drifted."""
        return self.latest is not None and bool(self.latest.drifted)

    @property
    def truths(self) -> Judged:
        """All days' truths together."""
        return sum((day.truths for day in self.days), Judged())


# --- pure functions ---


def psi(expected: Sequence[int], found: Sequence[int]) -> float:
    """The population stability index of two histograms over the same bins."""
    return sum((q - p) * math.log(q / p) for p, q in zip(_shares(expected), _shares(found), strict=True))


def _shares(counts: Sequence[int]) -> list[float]:
    whole = sum(counts) + SMOOTHING * len(counts)
    return [(number + SMOOTHING) / whole for number in counts]


def chance(bins: int, n: int, m: int, risk: float) -> float:
    """What the index is above with a probability of `risk` where nothing has changed. n, m: scans on either side."""
    freedom = bins - 1
    if freedom < 1:
        return 0.0
    spread = 2 / (9 * freedom)  # Wilson and Hilferty's approximation of the chi-squared distribution
    chi_squared = freedom * (1 - spread + NormalDist().inv_cdf(1 - risk) * math.sqrt(spread)) ** 3
    return chi_squared * (1 / n + 1 / m)


def limit(bins: int, n: int, m: int, bound: float, risk: float = RISK) -> float:
    """Above this index a figure has drifted: beyond the bound and what chance adds to it on average, and beyond what
    chance alone may well make it."""
    on_average = (bins - 1) * (1 / n + 1 / m)
    return max(bound + on_average, chance(bins, n, m, risk))


def figures(
    reference: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]], bound: float
) -> dict[str, Figure]:
    """Every figure that both sides have scans of, as histograms over the same bins."""
    both = {name: (counts, found[name]) for name, counts in reference.items() if sum(counts) and sum(found[name])}
    return {
        name: Figure(psi(old, new), limit(len(old), sum(old), sum(new), bound, RISK / len(both)))
        for name, (old, new) in both.items()
    }


# --- rows ---


def drift(session: Session, version: ModelVersion, policy: DriftPolicy, days: int) -> Drift:
    """The version's days with predictions or truths, of the last `days`."""
    first = _first_of(session, days)
    counted = _counted(session, version.id, first - dt.timedelta(days=MAX_POOLED_DAYS))
    told = feedback.by_day(session, version, first)
    known = sorted(day for day in {*counted, *told} if day >= first)
    shown = [_day(version, policy, counted, day, told.get(day, Judged())) for day in known]
    scans = (version.reference or {}).get("scans")
    return Drift(version, scans, policy.bound, shown)


def monitored_models(session: Session) -> Sequence[uuid.UUID]:
    """The champions, of all tenants, that have predicted lately: `check_drift` at each of them."""
    lately = PredictionCount.day >= _first_of(session, MONITORED_DAYS)
    predicted = exists().where(PredictionCount.model_id == ModelVersion.id, lately)
    return session.scalars(select(ModelVersion.id).where(ModelVersion.champion, predicted)).all()


def check_drift(session: Session, model_id: uuid.UUID, policy: DriftPolicy) -> None:
    """Tell webhooks of this champion's drift: an event for each day, however often we look. Give each champion a
    transaction of its own, so that a reference that cannot be read keeps no other from being told of."""
    version, first = session.get_one(ModelVersion, model_id), _first_of(session, MONITORED_DAYS)
    counted = _counted(session, model_id, first - dt.timedelta(days=MAX_POOLED_DAYS))
    for day in sorted(day for day in counted if day >= first):
        if drifted := _day(version, policy, counted, day, Judged()).drifted:
            data = {"model_version": str(version.version), "day": day.isoformat(), "figures": drifted}
            event_id = f"drift_{model_id}_{day}"
            webhooks.emit(session, version.tenant_id, event_id, webhooks.EventType.MODEL_DRIFTED, data)


def _first_of(session: Session, days: int) -> dt.date:
    """The first of the last `days` days (UTC), today among them."""
    now: dt.datetime = session.scalars(select(func.timezone("UTC", func.clock_timestamp()))).one()
    return now.date() - dt.timedelta(days=days - 1)


def _counted(session: Session, model_id: uuid.UUID, first: dt.date) -> dict[dt.date, Counts]:
    rows = select(PredictionCount.day, PredictionCount.what, PredictionCount.bin, PredictionCount.scans)
    found: dict[dt.date, Counts] = {}
    for row in session.execute(rows.where(PredictionCount.model_id == model_id, PredictionCount.day >= first)):
        found.setdefault(row.day, Counter())[row.what, row.bin] = row.scans
    return found


def _day(version: ModelVersion, policy: DriftPolicy, counted: dict[dt.date, Counts], day: dt.date, told: Judged) -> Day:
    mine = counted.get(day, Counter())
    classes, dispositions = _words(mine, CLASS), _words(mine, DISPOSITION)
    rejected = dispositions.get(REJECTED, 0) / sum(dispositions.values()) if dispositions else None
    plain = Day(day, sum(classes.values()), classes, dispositions, rejected, told)
    since, pooled = _pooled(counted, day, policy.least_scans)
    if not mine or since is None or not version.reference:
        return plain
    reference = _reference(version)
    found = {name: _bins(pooled, name, version, len(counts)) for name, counts in reference.items()}
    return replace(plain, since=since, figures=figures(reference, found, policy.bound))


def _words(counts: Counts, what: str) -> dict[str, int]:
    return {bin_: scans for (name, bin_), scans in sorted(counts.items()) if name == what}


def _pooled(counted: dict[dt.date, Counts], day: dt.date, least: int) -> tuple[dt.date | None, Counts]:
    """The day with as many of the days before it as it takes to have enough scans; their first day, None where all are
    not enough."""
    pooled: Counts = Counter()
    for earlier in sorted((each for each in counted if each <= day), reverse=True):
        if day - earlier > dt.timedelta(days=MAX_POOLED_DAYS):
            break
        pooled += counted[earlier]
        if sum(_words(pooled, CLASS).values()) >= least:
            return earlier, pooled
    return None, pooled


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
