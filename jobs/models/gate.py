"""The gate: whether a new version becomes champion, with its reasons as sentences. Pure functions.

All statistics were computed by the worker (`ml.evaluation`) and are stored with the version's metrics.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import NormalDist

from jobs.models import gate_rules
from jobs.models.gate_rules import ChampionComparison, GatePolicy, Rule, number
from jobs.tables import Json
from ml.spec.pipeline import IMAGE, Gate
from ml.spec.registry import spec_of

__all__ = ["ChampionComparison", "GatePolicy", "Reported", "Verdict", "gate"]

LEVEL = 0.05
"""Chance that any choice ever made by one test set raises the reported figure wrongly; the n-th gets 1 / n (n + 1)."""
_Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Reported:
    """The leading figure that a version is reported with, and how often its test scans have chosen, this time included.

    It is the Ladder of Blum and Hardt (2015): on test scans that have chosen before, a version takes over the
    champion's figure unless its own is better beyond chance. Otherwise the figure would climb by selection alone.
    """

    figure: str
    value: float | None
    choices: int
    test_digest: str | None = None


@dataclass(frozen=True)
class Verdict:
    """The gate's decision, with its reasons."""

    promoted: bool
    reasons: list[str]
    reported: Reported | None = None

    def as_dict(self) -> Json:
        """The form stored with versions and promotions."""
        reported = {} if self.reported is None else {"reported": vars(self.reported)}
        return {"promoted": self.promoted, "reasons": self.reasons, **reported}


def gate(
    candidate: Json,
    versus: ChampionComparison | None,
    promote: str,
    policy: GatePolicy,
    declared: Gate | None = None,
    choices: int = 1,
) -> Verdict:
    """Whether a new version becomes champion.

    A network that was tested on scans it was trained on is refused whatever its metrics, and so is one that was tested
    on too few independent patients. Without a champion, the leading figure must reach its bound; with one, it must not
    be worse on the same test scans, beyond a margin and chance. The pipeline's other bounds must hold in both cases. An
    unknown metric fails its rule. Each checked rule gives a reason.

    Args:
        candidate: the version's metrics on all its test scans.
        versus: None if there is no champion.
        promote: `auto`, or `never`: then the reasons say what the gate would have decided.
        declared: which figures count, by the pipeline's spec; the image pipeline's if it is left out.
        choices: how often the test scans of this choice have chosen, this time included.
    """
    declared = gate_rules.named_by_patient(declared or spec_of(IMAGE).gate, candidate)
    candidate, versus = gate_rules.of_patients(candidate), versus and _of_patients(versus)
    rules = [
        *gate_rules.of_tests(candidate, policy, declared),
        *gate_rules.of_figures(candidate, versus, policy, declared),
    ]
    promoted = all(rule.holds for rule in rules)
    reported = _reported(candidate, versus, declared, choices)
    reasons = [*_warnings(candidate, rules, declared), *(rule.sentence for rule in rules)]
    reasons += [*gate_rules.other_tests(versus), *_of_choices(candidate, reported, declared)]
    if promote == "never":
        would = "would have promoted it" if promoted else "would have refused it, too"
        reasons = [f"The job asked for no promotion (promote: never). The gate {would}:", *reasons]
    return Verdict(promoted and promote != "never", reasons, reported)


def _of_patients(versus: ChampionComparison) -> ChampionComparison:
    ours, theirs = (each and gate_rules.of_patients(each) for each in (versus.candidate, versus.champion))
    return replace(versus, candidate=ours, champion=theirs)


def _reported(candidate: Json, versus: ChampionComparison | None, declared: Gate, choices: int) -> Reported | None:
    if not declared.by_groups:
        return None
    figure = declared.leads.figure
    own, digest = candidate.get(figure), candidate.get("test_digest")
    if versus is None or versus.candidate is None or versus.champion is None:
        return Reported(figure, own, choices, digest)
    digest = versus.test_digest
    if choices == 1 or _better_beyond_chance(gate_rules.difference(versus, figure), choices):
        return Reported(figure, versus.candidate.get(figure), choices, digest)
    known = versus.champion.get(figure) if versus.reported is None else versus.reported
    return Reported(figure, known, choices, digest)


def _better_beyond_chance(difference: Json | None, choices: int) -> bool:
    if difference is None or difference["high"] is None:
        return False
    strict = NormalDist().inv_cdf(1 - LEVEL / (2 * choices * (choices + 1)))
    reach = difference["high"] - difference["difference"]
    return bool(difference["difference"] > reach * strict / _Z)


def _warnings(metrics: Json, rules: list[Rule], declared: Gate) -> Iterator[str]:
    """What comes before all reasons, unless a rule refuses it already."""
    warning = declared.unknown_patients
    if metrics.get("patients_known") is False and warning and not any(warning in rule.sentence for rule in rules):
        yield warning


def _of_choices(candidate: Json, reported: Reported | None, declared: Gate) -> Iterator[str]:
    if reported is None or reported.choices < 2:
        return
    title, own = declared.leads.title, number(candidate, reported.figure)
    yield f"Its test scans have now been used for {reported.choices} such decisions."
    if reported.value is not None and reported.value != own:
        yield (
            f"It is reported with {title} {reported.value:.4f}, the champion's, and not with its own: no difference "
            "beyond chance was found, and the best of several equal networks always looks better than it is."
        )
