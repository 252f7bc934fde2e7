"""The gate: whether a new version becomes champion, and why, in words that a person understands. Pure functions."""

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
class Policy:
    """What the gate asks for. The calibration error is that beyond what chance shows on as many scans."""

    min_f1: float = 0.85
    min_sensitivity: float = 0.80
    max_calibration_error: float = 0.10

    @classmethod
    def of(cls, settings: Settings) -> "Policy":
        """The policy that the settings name."""
        return cls(settings.promote_min_f1, settings.promote_min_sensitivity, settings.promote_max_calibration_error)


@dataclass(frozen=True)
class Against:
    """The champion, and both networks' metrics on the same `scans` test scans; without such scans `why` says why."""

    version: int
    scans: int = 0
    candidate: Json | None = None
    champion: Json | None = None
    why: str = "no test scans were scored with both"


@dataclass(frozen=True)
class Verdict:
    """The gate's word, with its reasons."""

    promoted: bool
    reasons: list[str]

    def as_dict(self) -> Json:
        """As it is kept with a version and a promotion."""
        return {"promoted": self.promoted, "reasons": self.reasons}


@dataclass(frozen=True)
class Rule:
    """One rule, looked at: whether it is kept, and a sentence with both numbers."""

    kept: bool
    sentence: str


def gate(candidate: Json, against: Against | None, wanted: str, policy: Policy) -> Verdict:
    """Whether a new version becomes champion: a function of metrics and the policy.

    `candidate`: its metrics on all its test scans. `against`: None where there is no champion. A network that was
    tested on what it has learnt from is refused, whatever its figures; without a champion F1 must reach `min_f1`, with
    one it must not be lower than the champion's on the same test scans; in both cases sensitivity and calibration must
    be good enough. What is not known counts as not good enough. Every rule that was looked at has its sentence.
    """
    rules = [*_leaks(candidate), *_figures(candidate, against, policy)]
    promoted = all(rule.kept for rule in rules)
    reasons = [*(rule.sentence for rule in rules), *_notes(candidate)]
    if wanted == "never":
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


def _figures(candidate: Json, against: Against | None, policy: Policy) -> Iterator[Rule]:
    if against is None:
        yield _at_least("There is no champion yet, and F1", _number(candidate, "f1"), "the required", policy.min_f1)
    else:
        yield _not_worse(against)
    sensitivity = _number(candidate, "recall")
    yield _at_least("Sensitivity", sensitivity, "the required", policy.min_sensitivity)
    yield _calibrated(candidate, policy.max_calibration_error)


def _not_worse(against: Against) -> Rule:
    name = f"the champion (version {against.version})"
    if against.candidate is None or against.champion is None:
        return Rule(False, f"It cannot be compared with {name}: {against.why}. {REMEDY}")
    ours, theirs = _number(against.candidate, "f1"), _number(against.champion, "f1")
    where = f" (version {against.version}) on the same {against.scans} test scans"
    return _at_least("F1", ours, "the champion's", theirs, where)


def _calibrated(candidate: Json, most: float) -> Rule:
    beyond = _number(candidate, "ece") - _number(candidate, "ece_chance")
    if math.isnan(beyond):
        return Rule(False, f"How well it is calibrated is not known; its error beyond chance must be ≤ {most:.2f}.")
    error = max(0.0, beyond)
    kept = error <= most
    shown, bound = _shown(error, most)
    return Rule(kept, f"Calibration error beyond chance {shown} {'≤' if kept else '>'} the allowed {bound}.")


def _at_least(what: str, value: float, of_what: str, least: float, where: str = "") -> Rule:
    if math.isnan(value) or math.isnan(least):
        return Rule(False, f"{what} is not known, and cannot be held against {of_what} {least:.4f}{where}.")
    kept = value >= least
    shown, bound = _shown(value, least)
    return Rule(kept, f"{what} {shown} {'≥' if kept else '<'} {of_what} {bound}{where}.")


def _shown(value: float, bound: float) -> tuple[str, str]:
    """Both numbers with four digits, or with as many more as tell them apart."""
    digits = next((n for n in range(4, 12) if value == bound or f"{value:.{n}f}" != f"{bound:.{n}f}"), 12)
    return f"{value:.{digits}f}", f"{bound:.{digits}f}"


def _number(metrics: Json, name: str) -> float:
    """The figure; NaN where it is not known."""
    value = metrics.get(name)
    return math.nan if value is None else float(value)


def _notes(metrics: Json) -> Iterator[str]:
    if metrics.get("patients_known") is False:
        yield (
            "Neither names nor DICOM tell the patients: one patient's scans may be in both training and test set, "
            "and F1 too good."
        )
