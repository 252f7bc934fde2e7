"""The gate's rules, each with a sentence that shows both numbers. Pure functions of stored metrics."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jobs.settings import Settings
from jobs.tables import Json
from ml.spec.pipeline import Bound, Gate
from ml.spec.positive_class import of_metrics

LEAKS = {
    "patients": ("is of a patient", "are of patients", "that the network has learnt from"),
    "studies": ("is of a study", "are of studies", "that the network has learnt from"),
    "duplicates": ("is a copy", "are copies", "of scans that the network has learnt from"),
    "near_duplicates": ("looks", "look", "almost the same as scans that the network has learnt from"),
}
REMEDY = "Train anew, or promote it with `force` and a `reason`."
NOT_SHARED = "no test scans were scored with both"
BY_PATIENT = ("accuracy", "precision", "recall", "f1", "specificity", "roc_auc", "pr_auc")
MORE_PATIENTS = "Add patients, or raise test_size."


@dataclass(frozen=True)
class GatePolicy:
    """The gate's thresholds: the settings of the same names, with `promote_` before them."""

    min_f1: float = 0.85
    min_sensitivity: float = 0.80
    max_calibration_error: float = 0.10
    min_sensitivity_low: float = 0.70
    min_class_recall: float = 0.60
    min_positives: int = 20
    min_negatives: int = 20
    margin: float = 0.05
    unknown_patients: bool = True

    @classmethod
    def of(cls, settings: Settings) -> "GatePolicy":
        """The policy in the settings."""
        return cls(**{name: getattr(settings, f"promote_{name}") for name in cls.__dataclass_fields__})

    def threshold(self, bound: Bound) -> float:
        """The policy's value of the bound's setting, or the bound that the pipeline declares."""
        declared = bound.most if bound.least is None else bound.least
        value = getattr(self, (bound.setting or "").removeprefix("promote_") or "-", declared)
        return math.nan if value is None else value


@dataclass(frozen=True)
class ChampionComparison:
    """The champion, and both networks' metrics on the same `scans` test scans, or `why` there are none.

    `paired`: the paired tests on these scans (`ml.evaluation.paired`); None where an earlier release trained it.
    `reported`: the leading figure that the champion is reported with.
    """

    version: int
    scans: int = 0
    candidate: Json | None = None
    champion: Json | None = None
    why: str = NOT_SHARED
    paired: Json | None = None
    reported: float | None = None
    test_digest: str | None = None


@dataclass(frozen=True)
class Rule:
    """One checked rule: whether it holds, and a sentence with both numbers."""

    holds: bool
    sentence: str


# --- by patient ---


def of_patients(metrics: Json) -> Json:
    """The metrics with the figures by patient in place of those by slice, where it has them."""
    found = metrics.get("by_patient")
    if not found:
        return metrics
    figures = {name: found[name] for name in BY_PATIENT if name in found}
    return {**metrics, **figures, "intervals": found["intervals"], "independent_per_class": found["per_class"]}


def named_by_patient(declared: Gate, metrics: Json) -> Gate:
    """The declaration, whose titles say that its figures are by patient, where they are."""
    if not metrics.get("by_patient"):
        return declared
    by = "by patient" if metrics.get("patients_known") else "by group of scans"

    def named(bound: Bound) -> Bound:
        return bound.model_copy(update={"title": f"{bound.title} {by}"}) if bound.figure in BY_PATIENT else bound

    return declared.model_copy(update={"leads": named(declared.leads), "always": tuple(map(named, declared.always))})


# --- the test itself ---


def of_tests(metrics: Json, policy: GatePolicy, declared: Gate) -> Iterator[Rule]:
    """Whether the test can tell anything: no leaks, known patients where the policy asks for them, enough groups."""
    yield from _leaks(metrics)
    if metrics.get("patients_known") is False and declared.unknown_patients and not policy.unknown_patients:
        remedy = "The setting RENALQ_PROMOTE_UNKNOWN_PATIENTS refuses that: list the patients in patients.csv."
        yield Rule(False, f"{declared.unknown_patients} {remedy}")
    if declared.by_groups:
        yield from _groups(metrics, policy)


def _leaks(metrics: Json) -> Iterator[Rule]:
    found = metrics.get("leaks") or {}
    counts = {kind: int(found.get(kind) or 0) for kind in LEAKS}
    for kind, count in counts.items():
        one, many, of_what = LEAKS[kind]
        if count:
            scans = f"1 test scan {one}" if count == 1 else f"{count} test scans {many}"
            yield Rule(False, f"{scans} {of_what}.")
    if any(counts.values()):
        yield Rule(False, "Its scores are too good to go by: mend the dataset, and train anew.")


def _groups(metrics: Json, policy: GatePolicy) -> Iterator[Rule]:
    counts = metrics.get("independent_per_class")
    noun = "patients" if metrics.get("patients_known") else "independent groups of scans"
    if not counts:
        yield Rule(False, f"How many {noun} it was tested on is not known. {REMEDY}")
        return
    positive = of_metrics(metrics) or []
    if not positive:
        fewest = min(counts, key=lambda name: counts[name])
        yield _enough(counts[fewest], f"{noun} of {fewest}, the fewest of a class,", policy.min_positives)
        return
    negatives = [name for name in counts if name not in positive]
    for names, least in ((positive, policy.min_positives), (negatives, policy.min_negatives)):
        yield _enough(sum(counts.get(name, 0) for name in names), f"{noun} of {_listed(names)}", least)


def _enough(count: int, of_what: str, least: int) -> Rule:
    holds = count >= least
    sentence = f"It was tested on {count} {of_what} {'≥' if holds else '<'} the required {least}."
    return Rule(holds, sentence if holds else f"{sentence} {MORE_PATIENTS}")


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


# --- figures ---


def of_figures(
    candidate: Json, versus: ChampionComparison | None, policy: GatePolicy, declared: Gate
) -> Iterator[Rule]:
    """The leading figure, alone or against the champion's; the other bounds; and each class's recall."""
    if versus is None:
        first = f"There is no champion yet, and {declared.leads.title}"
        yield _within(declared.leads.model_copy(update={"title": first}), candidate, policy)
    else:
        yield from _against(versus, policy, declared)
    for bound in declared.always:
        if not bound.lower_end or policy.threshold(bound) > 0:
            yield _within(bound, candidate, policy)
    if declared.by_groups:
        yield from _class_recalls(candidate, policy)


def _against(versus: ChampionComparison, policy: GatePolicy, declared: Gate) -> Iterator[Rule]:
    name, leads = f"the champion (version {versus.version})", declared.leads
    if versus.candidate is None or versus.champion is None:
        yield Rule(False, f"It cannot be compared with {name}: {versus.why}. {REMEDY}")
    elif declared.by_groups:
        yield from _not_inferior(versus, leads, policy.margin)
    else:
        ours, theirs = number(versus.candidate, leads.figure), number(versus.champion, leads.figure)
        where = f" (version {versus.version}) on the same {versus.scans} test scans"
        held = _at_most if leads.least is None else _at_least
        yield held(leads.title, ours, "the champion's", theirs, where)


def difference(versus: ChampionComparison, figure: str) -> Json | None:
    """The paired difference of a figure; None if it was not computed."""
    found: Json | None = ((versus.paired or {}).get("differences") or {}).get(figure)
    return found


def _not_inferior(versus: ChampionComparison, leads: Bound, margin: float) -> Iterator[Rule]:
    """Non-inferiority: the 95 % interval of the difference lies above the margin; and not all of it lies below 0."""
    name, found = f"the champion (version {versus.version})", difference(versus, leads.figure)
    if found is None:
        yield Rule(False, f"It cannot be compared with {name}: {leads.title} has no paired test. {REMEDY}")
        return
    both = f"{leads.title} {found['ours']:.4f}, the champion's {found['theirs']:.4f} (version {versus.version})"
    where = f"on the same {versus.scans} test scans in {(versus.paired or {}).get('groups')} independent groups"
    begin = f"{both} {where}: difference {found['difference']:+.4f}"
    if margin >= 1:
        yield Rule(True, f"{begin}. The settings allow any.")
        return
    if found["low"] is None:
        yield Rule(False, f"{begin}, and there are too few groups for an interval of it. {MORE_PATIENTS}")
        return
    holds = found["low"] >= -margin
    compared = "≥ the allowed" if holds else "< the allowed"
    between = f"95 % interval {found['low']:+.4f} to {found['high']:+.4f}"
    yield Rule(holds, f"{begin}, {between}; its lower end is {compared} {-margin:+.4f}.")
    if found["high"] < 0:
        yield Rule(False, f"That is worse than {name} beyond chance.")


def other_tests(versus: ChampionComparison | None) -> Iterator[str]:
    """What the other paired tests say; they decide nothing."""
    tests = (versus.paired or {}) if versus else {}
    area = (tests.get("differences") or {}).get("roc_auc")
    if area and area["low"] is not None:
        yield (
            f"For information: ROC-AUC {area['ours']:.4f}, the champion's {area['theirs']:.4f}, difference "
            f"{area['difference']:+.4f}, 95 % interval {area['low']:+.4f} to {area['high']:+.4f}."
        )
    named = {"McNemar's test of the errors": tests.get("mcnemar"), "DeLong's of the areas": tests.get("delong")}
    values = [f"{name} p = {test['p']:.3f}" for name, test in named.items() if test]
    if values:
        yield f"For information, by groups: {', '.join(values)}."


def _class_recalls(metrics: Json, policy: GatePolicy) -> Iterator[Rule]:
    recalls = {name: number(each, "recall") for name, each in (metrics.get("per_class") or {}).items()}
    if len(recalls) <= 2:
        return
    if unknown := [name for name, recall in recalls.items() if math.isnan(recall)]:
        yield Rule(False, f"The recall of {_listed(unknown)} is not known.")
        return
    lowest = min(recalls, key=lambda name: recalls[name])
    yield _at_least(
        f"The lowest recall of a class ({lowest})", recalls[lowest], "the required", policy.min_class_recall
    )


def _within(bound: Bound, candidate: Json, policy: GatePolicy) -> Rule:
    value = _lower_end(candidate, bound.figure) if bound.lower_end else number(candidate, bound.figure)
    if bound.minus is not None:
        value = max(0.0, beyond) if not math.isnan(beyond := value - number(candidate, bound.minus)) else math.nan
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


def number(metrics: Json, name: str) -> float:
    """The metric; NaN if it is unknown."""
    value = metrics.get(name)
    return math.nan if value is None else float(value)


def _lower_end(metrics: Json, name: str) -> float:
    interval = (metrics.get("intervals") or {}).get(name)
    return math.nan if not interval else float(interval[0])
