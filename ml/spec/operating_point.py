"""The operating point: the threshold on the positive classes' probability, the rule that chose it, and what it gives.

Plain Python without numpy: a training and the API, which sets a version's point anew, choose by the same code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

F1: Literal["f1"] = "f1"
Rule = Literal["sensitivity", "specificity", "threshold"]
Wanted = Annotated[float, Field(gt=0, le=1)]
OperateAt = Literal["f1"] | Annotated[dict[Rule, Wanted], Field(min_length=1, max_length=1)]
EXPECTED = "Must be f1, or one of sensitivity, specificity and threshold with a number: {sensitivity: 0.95}."
MIN_GROUPS = 10
"""Independent groups (patients) below which there is no interval: too few to say."""
PSEUDO = 0.2
"""Weight of the pseudo-groups, one right and one wrong, in groups; see `ml.evaluation.intervals`."""
_Z = 1.959963984540054  # the normal distribution's 97.5 % quantile


class NoChoice(ValueError):
    """The rule cannot choose on these scans; the message is a sentence that says why and what to do."""


@dataclass(frozen=True)
class Scored:
    """N scans: whether each is of a positive class, its score (the sum of these classes' probabilities), and its group
    (a patient, where they are known)."""

    truth: Sequence[bool]
    score: Sequence[float]
    group: Sequence[int]


@dataclass(frozen=True)
class Share:
    """A share of scans with its 95 % interval and the number of groups behind it. None: no scans, or too few groups."""

    value: float | None
    low: float | None
    high: float | None
    groups: int


@dataclass(frozen=True)
class OperatingPoint:
    """A threshold, and what it gave on the `scans` scans that it was chosen on (`chosen_on`: validation, out_of_fold).

    `rule`: f1, sensitivity, specificity or threshold; `wanted`: its number. `best_f1`: what the rule f1 would choose.
    """

    rule: str
    wanted: float | None
    threshold: float
    sensitivity: Share
    specificity: Share
    scans: int
    best_f1: float
    chosen_on: str = "validation"

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def sentence(point: Mapping[str, Any]) -> str:
    """What a card and a report say of a point, given as `as_dict`."""
    wanted = point["wanted"]
    why = {
        "f1": "chosen by F1",
        "threshold": "as it was asked for",
        "sensitivity": f"the highest with a sensitivity of {wanted}",
        "specificity": f"the lowest with a specificity of {wanted}",
    }[point["rule"]]
    scans = f"{point['scans']} {point['chosen_on'].replace('_', '-')} scans"
    shares = " and ".join(f"{name} {_shown(point[name])}" for name in ("sensitivity", "specificity"))
    return f"Threshold {point['threshold']:.3f}, {why}. On {scans} it gave {shares}."


def _shown(share: Mapping[str, Any]) -> str:
    if share["value"] is None:
        return "not known"
    if share["low"] is None:
        return f"{share['value']:.3f} (too few patients or groups for an interval: {share['groups']})"
    return f"{share['value']:.3f} (95 % interval {share['low']:.3f} to {share['high']:.3f})"


def without_threshold(reason: str) -> str:
    """The reason of a calibration or a pooling, without its last sentence: why F1 chose a threshold."""
    return reason.partition(" Threshold ")[0]


def parse(value: Any) -> OperateAt:
    """A checked rule.

    Raises:
        ValueError: says what is expected.
    """
    try:
        return _ADAPTER.validate_python(value, strict=True)
    except ValidationError:
        raise ValueError(EXPECTED) from None


def json_schema() -> dict[str, Any]:
    """The rules as JSON schema."""
    return _ADAPTER.json_schema()


_ADAPTER: TypeAdapter[OperateAt] = TypeAdapter(OperateAt)


def operating_point(
    operate_at: OperateAt, scored: Scored, best_f1: float, chosen_on: str = "validation"
) -> OperatingPoint:
    """The point that a rule chooses on these scans. `best_f1`: the threshold of the rule f1.

    Raises:
        NoChoice
    """
    rule, wanted = (F1, None) if operate_at == F1 else next(iter(dict(operate_at).items()))
    threshold = best_f1 if wanted is None else choose(rule, wanted, scored)
    shares = shares_at(threshold, scored)
    return OperatingPoint(rule, wanted, threshold, *shares, len(scored.truth), best_f1, chosen_on)


def choose(rule: str, wanted: float, scored: Scored) -> float:
    """The threshold of a rule: of those with at least the wanted sensitivity the highest, of those with at least the
    wanted specificity the lowest. It lies midway between two scores, so that rounding changes no scan.

    Raises:
        NoChoice: there is no scan that the rule counts.
    """
    if rule == "threshold":
        return wanted
    counted = sorted(
        score for truth, score in zip(scored.truth, scored.score, strict=True) if truth == (rule == "sensitivity")
    )
    if not counted:
        kind = "positive" if rule == "sensitivity" else "negative"
        raise NoChoice(f"No scan to choose on is {kind}: name a threshold, or train with more scans of that kind.")
    needed = max(1, math.ceil(wanted * len(counted) - 1e-9))
    levels = sorted({0.0, 1.0, *scored.score})
    if rule == "sensitivity":
        lowest_found = counted[len(counted) - needed]
        return (lowest_found + max((level for level in levels if level < lowest_found), default=0.0)) / 2
    highest_spared = counted[needed - 1]
    return (highest_spared + min((level for level in levels if level > highest_spared), default=1.0)) / 2


def shares_at(threshold: float, scored: Scored) -> tuple[Share, Share]:
    """Sensitivity and specificity on these scans."""
    rows = [*zip(scored.truth, scored.score, scored.group, strict=True)]
    found = share([(score >= threshold, group) for truth, score, group in rows if truth])
    return found, share([(score < threshold, group) for truth, score, group in rows if not truth])


def share(outcomes: Sequence[tuple[bool, int]]) -> Share:
    """The share of scans with a true outcome, by (outcome, group), with the interval of `ml.evaluation.intervals`.

    That is, for a figure of one class: jackknife by groups, pseudo-groups, Student's t, and Wilson's form (1927).
    """
    if not outcomes:
        return Share(None, None, None, 0)
    counts: dict[int, list[int]] = {}
    for outcome, group in outcomes:
        hits_and_scans = counts.setdefault(group, [0, 0])
        hits_and_scans[0] += outcome
        hits_and_scans[1] += 1
    value = sum(outcome for outcome, _ in outcomes) / len(outcomes)
    if len(counts) < MIN_GROUPS:
        return Share(value, None, None, len(counts))
    centre, variance = _spread([*counts.values()])
    low, high = _wilson(value, centre * (1 - centre) / variance, student(len(counts) - 1))
    return Share(value, min(low, value), max(high, value), len(counts))


def _spread(counts: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Centre and variance of a share, by the hits and the scans of each group."""
    groups, hits, scans = len(counts), sum(hit for hit, _ in counts), sum(scan for _, scan in counts)
    mean, scale = scans / groups, groups / (groups - 1)
    more = PSEUDO * mean

    def rate(hit: float, scan: float) -> float:
        return (hit + more) / (scan + 2 * more)

    without = [rate((hits - hit) * scale, (scans - scan) * scale) for hit, scan in counts]
    middle = sum(without) / groups
    jackknife = sum((each - middle) ** 2 for each in without) / scale
    least = PSEUDO * sum(((hits + right * mean) / (scans + mean) - hits / scans) ** 2 for right in (0, 1))
    return rate(hits, scans), max(jackknife, least)


def _wilson(rate: float, count: float, z: float) -> tuple[float, float]:
    centre, below = rate + z**2 / (2 * count), 1 + z**2 / count
    spread = z * math.sqrt(rate * (1 - rate) / count + z**2 / (4 * count**2))
    return max(0.0, (centre - spread) / below), min(1.0, (centre + spread) / below)


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, to 0.001 from 9 degrees on (Abramowitz and Stegun 1964, 26.7.5)."""
    z, n = _Z, freedom
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / n**power for power, term in enumerate(terms, 1))
