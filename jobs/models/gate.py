"""The gate: whether a new version becomes champion, with its reasons as sentences. Pure functions."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from jobs.settings import Settings
from jobs.tables import Json

LEAKS = {
    "patients": ("is of a patient", "are of patients", "that the network has learnt from"),
    "duplicates": ("is a copy", "are copies", "of scans that the network has learnt from"),
    "near_duplicates": ("looks", "look", "almost the same as scans that the network has learnt from"),
}
REMEDY = "Train anew, or promote it with `force` and a `reason`."


@dataclass(frozen=True)
class GatePolicy:
    """The gate's thresholds. The calibration error counts only beyond what chance causes on as many scans."""

    min_f1: float = 0.85
    min_sensitivity: float = 0.80
    max_calibration_error: float = 0.10

    @classmethod
    def of(cls, settings: Settings) -> "GatePolicy":
        """The policy in the settings."""
        return cls(settings.promote_min_f1, settings.promote_min_sensitivity, settings.promote_max_calibration_error)


@dataclass(frozen=True)
class ChampionComparison:
    """The champion, and both networks' metrics on the same `scans` test scans, or `why` there are none."""

    version: int
    scans: int = 0
    candidate: Json | None = None
    champion: Json | None = None
    why: str = "no test scans were scored with both"


@dataclass(frozen=True)
class Verdict:
    """The gate's decision, with its reasons."""

    promoted: bool
    reasons: list[str]

    def as_dict(self) -> Json:
        """The form stored with versions and promotions."""
        return {"promoted": self.promoted, "reasons": self.reasons}


@dataclass(frozen=True)
class Rule:
    """One checked rule: whether it holds, and a sentence with both numbers."""

    holds: bool
    sentence: str


def gate(candidate: Json, versus: ChampionComparison | None, promote: str, policy: GatePolicy) -> Verdict:
    """Whether a new version becomes champion.

    A network that was tested on scans it was trained on is refused whatever its metrics. Without a champion, F1 must
    reach `min_f1`; with one, it must not be lower than the champion's on the same test scans. Sensitivity and
    calibration must meet the policy in both cases. An unknown metric fails its rule. Each checked rule gives a reason.

    Args:
        candidate: the version's metrics on all its test scans.
        versus: None if there is no champion.
        promote: `auto`, or `never`: then the reasons say what the gate would have decided.
    """
    rules = [*_leaks(candidate), *_figures(candidate, versus, policy)]
    promoted = all(rule.holds for rule in rules)
    reasons = [*(rule.sentence for rule in rules), *_notes(candidate)]
    if promote == "never":
        would = "would have promoted it" if promoted else "would have refused it, too"
        return Verdict(False, [f"The job asked for no promotion (promote: never). The gate {would}:", *reasons])
    return Verdict(promoted, reasons)


def _leaks(metrics: Json) -> Iterator[Rule]:
    found = metrics.get("leaks") or {}
    counts = {kind: int(found.get(kind) or 0) for kind in LEAKS}
    for kind, number in counts.items():
        one, many, of_what = LEAKS[kind]
        if number:
            scans = f"1 test scan {one}" if number == 1 else f"{number} test scans {many}"
            yield Rule(False, f"{scans} {of_what}.")
    if any(counts.values()):
        yield Rule(False, "Its scores are too good to go by: mend the dataset, and train anew.")


def _figures(candidate: Json, versus: ChampionComparison | None, policy: GatePolicy) -> Iterator[Rule]:
    if versus is None:
        yield _at_least("There is no champion yet, and F1", _number(candidate, "f1"), "the required", policy.min_f1)
    else:
        yield _not_worse(versus)
    sensitivity = _number(candidate, "recall")
    yield _at_least("Sensitivity", sensitivity, "the required", policy.min_sensitivity)
    yield _calibrated(candidate, policy.max_calibration_error)


def _not_worse(versus: ChampionComparison) -> Rule:
    name = f"the champion (version {versus.version})"
    if versus.candidate is None or versus.champion is None:
        return Rule(False, f"It cannot be compared with {name}: {versus.why}. {REMEDY}")
    ours, theirs = _number(versus.candidate, "f1"), _number(versus.champion, "f1")
    where = f" (version {versus.version}) on the same {versus.scans} test scans"
    return _at_least("F1", ours, "the champion's", theirs, where)


def _calibrated(candidate: Json, most: float) -> Rule:
    beyond = _number(candidate, "ece") - _number(candidate, "ece_chance")
    if math.isnan(beyond):
        return Rule(False, f"How well it is calibrated is not known; its error beyond chance must be ≤ {most:.2f}.")
    error = max(0.0, beyond)
    holds = error <= most
    shown, bound = _shown(error, most)
    return Rule(holds, f"Calibration error beyond chance {shown} {'≤' if holds else '>'} the allowed {bound}.")


def _at_least(what: str, value: float, of_what: str, least: float, where: str = "") -> Rule:
    if math.isnan(value) or math.isnan(least):
        return Rule(False, f"{what} is not known, and cannot be held against {of_what} {least:.4f}{where}.")
    holds = value >= least
    shown, bound = _shown(value, least)
    return Rule(holds, f"{what} {shown} {'≥' if holds else '<'} {of_what} {bound}{where}.")


def _shown(value: float, bound: float) -> tuple[str, str]:
    """Both numbers with four digits, or with as many more as make them differ."""
    digits = next((n for n in range(4, 12) if value == bound or f"{value:.{n}f}" != f"{bound:.{n}f}"), 12)
    return f"{value:.{digits}f}", f"{bound:.{digits}f}"


def _number(metrics: Json, name: str) -> float:
    """The metric; NaN if it is unknown."""
    value = metrics.get(name)
    return math.nan if value is None else float(value)


def _notes(metrics: Json) -> Iterator[str]:
    if metrics.get("patients_known") is False:
        yield (
            "Neither names nor DICOM tell the patients: one patient's scans may be in both training and test set, "
            "and F1 too good."
        )
