"""The gate: whether a new version becomes champion, with its reasons as sentences. Pure functions."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from jobs.settings import Settings
from jobs.tables import Json
from ml.spec.pipeline import IMAGE, Bound, Gate
from ml.spec.registry import spec_of

LEAKS = {
    "patients": ("is of a patient", "are of patients", "that the network has learnt from"),
    "studies": ("is of a study", "are of studies", "that the network has learnt from"),
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

    def threshold(self, bound: Bound) -> float:
        """The policy's value of the bound's setting, or the bound that the pipeline declares."""
        mine = {
            "promote_min_f1": self.min_f1,
            "promote_min_sensitivity": self.min_sensitivity,
            "promote_max_calibration_error": self.max_calibration_error,
        }
        declared = bound.most if bound.least is None else bound.least
        value = mine.get(bound.setting or "", declared)
        return math.nan if value is None else value


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


def gate(
    candidate: Json,
    versus: ChampionComparison | None,
    promote: str,
    policy: GatePolicy,
    declared: Gate | None = None,
) -> Verdict:
    """Whether a new version becomes champion.

    A network that was tested on scans it was trained on is refused whatever its metrics. Without a champion, the
    leading figure must reach its bound; with one, it must not be worse than the champion's on the same test scans. The
    pipeline's other bounds must hold in both cases. An unknown metric fails its rule. Each checked rule gives a reason.

    Args:
        candidate: the version's metrics on all its test scans.
        versus: None if there is no champion.
        promote: `auto`, or `never`: then the reasons say what the gate would have decided.
        declared: which figures count, by the pipeline's spec; the image pipeline's if it is left out.
    """
    declared = declared or spec_of(IMAGE).gate
    rules = [*_leaks(candidate), *_figures(candidate, versus, policy, declared)]
    promoted = all(rule.holds for rule in rules)
    reasons = [*(rule.sentence for rule in rules), *_notes(candidate, declared)]
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


def _figures(candidate: Json, versus: ChampionComparison | None, policy: GatePolicy, declared: Gate) -> Iterator[Rule]:
    if versus is None:
        first = f"There is no champion yet, and {declared.leads.title}"
        yield _within(declared.leads.model_copy(update={"title": first}), candidate, policy)
    else:
        yield _not_worse(versus, declared.leads)
    for bound in declared.always:
        yield _within(bound, candidate, policy)


def _not_worse(versus: ChampionComparison, leads: Bound) -> Rule:
    name = f"the champion (version {versus.version})"
    if versus.candidate is None or versus.champion is None:
        return Rule(False, f"It cannot be compared with {name}: {versus.why}. {REMEDY}")
    ours, theirs = _number(versus.candidate, leads.figure), _number(versus.champion, leads.figure)
    where = f" (version {versus.version}) on the same {versus.scans} test scans"
    held = _at_most if leads.least is None else _at_least
    return held(leads.title, ours, "the champion's", theirs, where)


def _within(bound: Bound, candidate: Json, policy: GatePolicy) -> Rule:
    value = _number(candidate, bound.figure)
    if bound.minus is not None:
        value = max(0.0, beyond) if not math.isnan(beyond := value - _number(candidate, bound.minus)) else math.nan
    threshold = policy.threshold(bound)
    if bound.unknown and math.isnan(value):
        return Rule(False, bound.unknown.format(bound=threshold))
    if bound.least is None:
        return _at_most(bound.title, value, "the allowed", threshold)
    return _at_least(bound.title, value, "the required", threshold)


def _at_least(what: str, value: float, of_what: str, least: float, where: str = "") -> Rule:
    if math.isnan(value) or math.isnan(least):
        return Rule(False, f"{what} is not known, and cannot be held against {of_what} {least:.4f}{where}.")
    shown, bound = _shown(value, least)
    return Rule(value >= least, f"{what} {shown} {'≥' if value >= least else '<'} {of_what} {bound}{where}.")


def _at_most(what: str, value: float, of_what: str, most: float, where: str = "") -> Rule:
    if math.isnan(value) or math.isnan(most):
        return Rule(False, f"{what} is not known; it must be ≤ {of_what} {most:.2f}{where}.")
    shown, bound = _shown(value, most)
    return Rule(value <= most, f"{what} {shown} {'≤' if value <= most else '>'} {of_what} {bound}{where}.")


def _shown(value: float, bound: float) -> tuple[str, str]:
    """Both numbers with four digits, or with as many more as make them differ."""
    digits = next((n for n in range(4, 12) if value == bound or f"{value:.{n}f}" != f"{bound:.{n}f}"), 12)
    return f"{value:.{digits}f}", f"{bound:.{digits}f}"


def _number(metrics: Json, name: str) -> float:
    """The metric; NaN if it is unknown."""
    value = metrics.get(name)
    return math.nan if value is None else float(value)


def _notes(metrics: Json, declared: Gate) -> Iterator[str]:
    if metrics.get("patients_known") is False and declared.unknown_patients:
        yield declared.unknown_patients
