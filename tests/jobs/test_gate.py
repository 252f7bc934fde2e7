"""The gate's verdict for any metrics, as a table of cases."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.models.gate import ChampionComparison, GatePolicy, Verdict, gate
from jobs.settings import Settings
from ml.spec.pipeline import Bound, Gate
from tests.builders import paired

POLICY = GatePolicy(min_f1=0.85, min_sensitivity=0.80, max_calibration_error=0.10)
NO_LEAKS = {"patients": 0, "duplicates": 0, "near_duplicates": 0}
POSITIVES = "It was tested on 24 patients of Tumor ≥ the required 20."
NEGATIVES = "It was tested on 26 patients of Normal ≥ the required 20."
SENSITIVE = "Sensitivity 0.9100 ≥ the required 0.8000."
CERTAIN = "The lower end of sensitivity's 95 % interval 0.7700 ≥ the required 0.7000."
CALIBRATED = "Calibration error beyond chance 0.0200 ≤ the allowed 0.1000."
TESTED, FIGURES = [POSITIVES, NEGATIVES], [SENSITIVE, CERTAIN, CALIBRATED]
ONE_SET = "1" * 64


def metrics(**more: Any) -> dict[str, Any]:
    """Metrics of a good network, tested without leaks on enough patients."""
    figures = {"f1": 0.95, "recall": 0.91, "ece": 0.05, "ece_chance": 0.03, "intervals": {"recall": [0.77, 0.98]}}
    tested = {"positive": "Tumor", "independent_per_class": {"Normal": 26, "Tumor": 24}, "test_digest": ONE_SET}
    return {**figures, **tested, "leaks": NO_LEAKS, "patients_known": True, **more}


def against(ours: float | None, theirs: float | None, reach: float = 0.03, **more: Any) -> ChampionComparison:
    """Both networks' F1 on the same 93 test scans of 60 patients, of which the champion is version 3."""
    tests = paired(ours, theirs, reach)
    fields: dict[str, Any] = {"paired": tests, "test_digest": ONE_SET, **more}
    return ChampionComparison(3, 93, metrics(f1=ours), metrics(f1=theirs), **fields)


def judged(candidate: dict[str, Any], champion: ChampionComparison | None = None, wanted: str = "auto") -> Verdict:
    """The gate's verdict by the policy above."""
    return gate(candidate, champion, wanted, POLICY)


def by_patient(**more: Any) -> dict[str, Any]:
    """Figures by patient of the same network."""
    return {
        "f1": 0.95, "recall": 0.91, "per_class": {"Normal": 26, "Tumor": 24}, "intervals": {"recall": [0.77, 0.98]},
        **more,
    }  # fmt: skip


# --- first champions ---


def four_classes(**recalls: float) -> dict[str, Any]:
    """Metrics of a network for four classes, each tested on 25 patients."""
    of_each = {"Cyst": 0.95, "Normal": 0.95, "Stone": 0.95, "Tumor": 0.95, **recalls}
    return metrics(
        positive=None,
        per_class={name: {"recall": recall} for name, recall in of_each.items()},
        independent_per_class=dict.fromkeys(of_each, 25),
    )


def perfect_on(normal: int, tumor: int, **more: Any) -> dict[str, Any]:
    """Metrics of a network without a mistake, tested on so many patients; fewer than ten have no interval."""
    low = 0.025 ** (1 / tumor) if tumor else None
    found = {"recall": [low, 1.0] if min(normal, tumor) >= 10 else None}
    perfect = {"f1": 1.0, "recall": 1.0, "intervals": found}
    return metrics(**perfect, independent_per_class={"Normal": normal, "Tumor": tumor}, **more)


REFUSED = {
    "two test scans, both right": (perfect_on(1, 1), "1 patients of Tumor < the required 20"),
    "no test scans of a class": (perfect_on(40, 0), "0 patients of Tumor < the required 20"),
    "three patients of many slices": (perfect_on(2, 1, held_out=120), "2 patients of Normal < the required 20"),
    "one patient": (perfect_on(1, 0, held_out=40), "0 patients of Tumor"),
    "19 positives": (perfect_on(400, 19), "19 patients of Tumor < the required 20"),
    "19 negatives": (perfect_on(19, 400), "19 patients of Normal < the required 20"),
    "19 near-duplicate groups": (
        perfect_on(19, 400, patients_known=False),
        "19 independent groups of scans of Normal < the required 20",
    ),
    "four classes, Tumor found in 40 of 100": (
        four_classes(Tumor=0.40),
        "The lowest recall of a class (Tumor) 0.4000 < the required 0.6000.",
    ),
    "four classes, one tested on few": (
        {**four_classes(), "independent_per_class": {"Cyst": 25, "Normal": 25, "Stone": 4, "Tumor": 25}},
        "4 patients of Stone, the fewest of a class, < the required 20",
    ),
    "half of the cancers missed": (
        metrics(positive="Cancer", recall=0.5, independent_per_class={"Cancer": 40, "Healthy": 40}),
        "Sensitivity 0.5000 < the required 0.8000.",
    ),
    "sensitivity that might be 0.6": (
        metrics(recall=0.85, intervals={"recall": [0.61, 0.95]}),
        "The lower end of sensitivity's 95 % interval 0.6100 < the required 0.7000.",
    ),
    "sensitivity without an interval": (metrics(intervals={"recall": None}), "too few patients to say"),
    "an earlier release's, without counts": (metrics(independent_per_class=None), "How many patients it was tested on"),
}

PASSED = {
    "the demo's 96 patients": perfect_on(48, 48),
    "465 scans, patients unknown": metrics(
        f1=0.925, recall=0.91, intervals={"recall": [0.79, 0.97]}, patients_known=False,
        independent_per_class={"Normal": 46, "Tumor": 43},
    ),
    "the least that is allowed": perfect_on(20, 20),
    "four classes, each found": four_classes(Stone=0.62),
    "three positive classes against one": metrics(
        positive=["Cyst", "Stone", "Tumor"],
        independent_per_class={"Cyst": 7, "Normal": 20, "Stone": 6, "Tumor": 7},
        per_class={name: {"recall": 0.9} for name in ("Cyst", "Normal", "Stone", "Tumor")},
    ),
    "a rare finding": metrics(independent_per_class={"Normal": 400, "Tumor": 21}),
}  # fmt: skip


@pytest.mark.parametrize(("candidate", "why"), REFUSED.values(), ids=REFUSED)
def test_first_champions_that_are_refused(candidate: dict[str, Any], why: str) -> None:
    verdict = judged(candidate)
    assert not verdict.promoted
    assert [reason for reason in verdict.reasons if why in reason], verdict.reasons


@pytest.mark.parametrize("candidate", PASSED.values(), ids=PASSED)
def test_first_champions_that_pass(candidate: dict[str, Any]) -> None:
    assert judged(candidate).promoted, judged(candidate).reasons


@pytest.mark.parametrize(
    ("slices", "patients", "why"),
    [
        ({}, {}, None),
        ({"f1": 0.2, "recall": 0.2, "intervals": {}}, {}, None),
        ({}, {"f1": 0.5}, "There is no champion yet, and F1 by patient 0.5000 < the required 0.8500."),
        ({}, {"recall": 0.5}, "Sensitivity by patient 0.5000 < the required 0.8000."),
        ({}, {"intervals": {"recall": [0.5, 1.0]}}, "interval by patient 0.5000 < the required 0.7000."),
        ({}, {"per_class": {"Normal": 26, "Tumor": 3}}, "3 patients of Tumor < the required 20."),
    ],
)
def test_figures_by_patient_decide_where_there_are_some(
    slices: dict[str, Any], patients: dict[str, Any], why: str | None
) -> None:
    verdict = judged(metrics(**slices, by_patient=by_patient(**patients)))
    assert verdict.promoted == (why is None)
    assert why is None or any(why in reason for reason in verdict.reasons)


def test_first_champion_needs_the_required_f1() -> None:
    enough = judged(metrics(f1=0.85))
    assert enough.promoted
    assert enough.reasons == [*TESTED, "There is no champion yet, and F1 0.8500 ≥ the required 0.8500.", *FIGURES]
    below = judged(metrics(f1=0.8499))
    assert not below.promoted
    assert below.reasons[2] == "There is no champion yet, and F1 0.8499 < the required 0.8500."


# --- against a champion ---

AGAINST = [
    # ours, theirs, reach of the interval, promoted?
    (0.946, 0.946, 0.03, True),
    (0.940, 0.946, 0.03, True),
    (0.925, 0.946, 0.03, False),
    (0.946, 0.946, 0.0501, False),
    (0.990, 0.946, 0.08, True),
    (0.960, 0.946, 0.08, False),
    (0.920, 0.946, 0.010, False),  # within the margin, and worse beyond chance
    (0.930, 0.946, 0.020, True),
]


@pytest.mark.parametrize(("ours", "theirs", "reach", "promoted"), AGAINST)
def test_the_interval_of_the_difference_decides(ours: float, theirs: float, reach: float, promoted: bool) -> None:
    assert judged(metrics(), against(ours, theirs, reach)).promoted is promoted


def test_the_reason_shows_both_figures_the_difference_and_its_interval() -> None:
    worse = judged(metrics(), against(0.925, 0.946))
    assert not worse.promoted
    assert worse.reasons == [
        *TESTED,
        "F1 0.9250, the champion's 0.9460 (version 3) on the same 93 test scans in 60 independent groups: difference "
        "-0.0210, 95 % interval -0.0510 to +0.0090; its lower end is < the allowed -0.0500.",
        *FIGURES,
        "For information, by groups: McNemar's test of the errors p = 0.480.",
    ]
    assert "its lower end is ≥ the allowed -0.0500." in judged(metrics(), against(0.946, 0.946)).reasons[2]


def test_a_difference_beyond_chance_is_refused_though_it_is_within_the_margin() -> None:
    verdict = judged(metrics(), against(0.920, 0.946, 0.01))
    assert not verdict.promoted
    assert "That is worse than the champion (version 3) beyond chance." in verdict.reasons


def test_the_difference_on_shared_scans_decides_and_not_the_figure_on_all() -> None:
    assert judged(metrics(f1=0.10), against(0.95, 0.94)).promoted
    assert not judged(metrics(f1=1.00), against(0.90, 0.94)).promoted


def test_other_paired_tests_are_told_and_decide_nothing() -> None:
    tests = paired(0.95, 0.95)
    area = {"ours": 0.98, "theirs": 0.99, "difference": -0.01, "low": -0.2, "high": 0.1}
    tests["differences"]["roc_auc"], tests["delong"] = area, {"statistic": 9.0, "p": 0.003}
    verdict = judged(metrics(), against(0.95, 0.95, paired=tests))
    assert verdict.promoted
    assert any("ROC-AUC 0.9800" in reason and "-0.2000 to +0.1000" in reason for reason in verdict.reasons)
    assert any("p = 0.480, DeLong's of the areas p = 0.003" in reason for reason in verdict.reasons)


def test_too_few_groups_for_an_interval_refuse() -> None:
    tests = paired(0.95, 0.90)
    tests["differences"]["f1"] |= {"low": None, "high": None}
    verdict = judged(metrics(), against(0.95, 0.90, paired=tests))
    assert not verdict.promoted
    assert "too few groups for an interval" in verdict.reasons[2]


def test_a_margin_of_one_allows_any_difference() -> None:
    policy = GatePolicy(margin=1.0)
    assert gate(metrics(), against(0.5, 0.95), "auto", policy).promoted


@pytest.mark.parametrize("why", ["its classes are Cyst, Stone, not Normal, Tumor", "its file cannot be read"])
def test_missing_shared_scans_refuse_with_reason_and_remedy(why: str) -> None:
    verdict = judged(metrics(), ChampionComparison(3, why=why))
    assert not verdict.promoted
    assert verdict.reasons[2] == (
        f"It cannot be compared with the champion (version 3): {why}. "
        "Train anew, or promote it with `force` and a `reason`."
    )


def test_scores_of_an_earlier_release_without_paired_tests_refuse() -> None:
    verdict = judged(metrics(), against(0.99, 0.5, paired=None))
    assert not verdict.promoted
    assert "F1 has no paired test. Train anew" in verdict.reasons[2]


# --- figures of pipelines that count no groups ---

PLAIN = Gate(leads=Bound(figure="error", title="Error", most=0.3))


@pytest.mark.parametrize(
    ("ours", "theirs", "promoted"), [(0.1, None, True), (0.4, None, False), (0.1, 0.1, True), (0.11, 0.1, False)]
)
def test_a_pipeline_without_groups_goes_by_the_figure_alone(ours: float, theirs: float | None, promoted: bool) -> None:
    versus = None if theirs is None else ChampionComparison(1, 5, {"error": ours}, {"error": theirs})
    verdict = gate({"error": ours}, versus, "auto", POLICY, PLAIN)
    assert (verdict.promoted, verdict.reported) == (promoted, None)


def test_different_figures_are_shown_with_enough_digits() -> None:
    versus = ChampionComparison(1, 5, {"error": 0.10000002}, {"error": 0.10000001})
    verdict = gate({"error": 0.1}, versus, "auto", POLICY, PLAIN)
    assert verdict.reasons[0].startswith("Error 0.10000002 > the champion's 0.10000001")


# --- sensitivity and calibration ---


@pytest.mark.parametrize("champion", [None, against(0.96, 0.95)])
def test_low_sensitivity_is_refused_whatever_the_f1(champion: ChampionComparison | None) -> None:
    assert judged(metrics(recall=0.80), champion).promoted
    verdict = judged(metrics(recall=0.79), champion)
    assert not verdict.promoted
    assert "Sensitivity 0.7900 < the required 0.8000." in verdict.reasons


def test_a_required_lower_end_of_zero_needs_no_interval() -> None:
    policy = GatePolicy(min_sensitivity_low=0.0, min_positives=1, min_negatives=1)
    assert gate(perfect_on(1, 1), None, "auto", policy).promoted


@pytest.mark.parametrize("champion", [None, against(0.96, 0.95)])
def test_poor_calibration_is_refused(champion: ChampionComparison | None) -> None:
    verdict = judged(metrics(ece=0.16, ece_chance=0.05), champion)
    assert not verdict.promoted
    assert "Calibration error beyond chance 0.1100 > the allowed 0.1000." in verdict.reasons


def test_calibration_error_within_chance_is_accepted() -> None:
    verdict = judged(metrics(ece=0.12, ece_chance=0.13))
    assert verdict.promoted
    assert "Calibration error beyond chance 0.0000 ≤ the allowed 0.1000." in verdict.reasons


@pytest.mark.parametrize("name", ["f1", "recall", "ece", "ece_chance", "independent_per_class"])
def test_unknown_metrics_of_older_versions_are_refused(name: str) -> None:
    candidate = metrics()
    del candidate[name]
    verdict = judged(candidate)
    assert not verdict.promoted
    assert sum("not known" in reason for reason in verdict.reasons) == 1


def test_an_unknown_recall_of_one_class_is_refused() -> None:
    candidate = four_classes()
    candidate["per_class"]["Stone"] = {"recall": None}
    verdict = judged(candidate)
    assert not verdict.promoted
    assert "The recall of Stone is not known." in verdict.reasons


def test_policy_comes_from_the_settings() -> None:
    assert GatePolicy.of(Settings()) == GatePolicy() == POLICY
    strict = Settings(promote_min_f1=0.9, promote_min_positives=60, promote_unknown_patients=False, promote_margin=0.01)
    assert GatePolicy.of(strict) == GatePolicy(min_f1=0.9, min_positives=60, unknown_patients=False, margin=0.01)
    assert not gate(metrics(), None, "auto", GatePolicy.of(strict)).promoted


# --- unknown patients ---


def test_unknown_patients_are_warned_of_before_anything_else() -> None:
    verdict = judged(metrics(patients_known=False))
    assert verdict.promoted
    assert verdict.reasons[0].startswith("WARNING: the figures may be too good. Neither names nor DICOM tell")
    assert "24 independent groups of scans of Tumor" in verdict.reasons[1]


def test_a_setting_refuses_unknown_patients() -> None:
    verdict = gate(metrics(patients_known=False), None, "auto", GatePolicy(unknown_patients=False))
    assert not verdict.promoted
    (warned,) = (reason for reason in verdict.reasons if "WARNING" in reason)
    assert "list the patients in patients.csv" in warned
    assert gate(metrics(), None, "auto", GatePolicy(unknown_patients=False)).promoted


# --- how often the test scans have chosen ---

REPORTED = [
    # ours, theirs, the champion's reported F1, reach, choices: reported
    (0.95, 0.94, 0.91, 0.03, 1, 0.95),  # test scans that never chose before
    (0.95, 0.94, 0.91, 0.03, 2, 0.91),  # a difference within chance
    (0.99, 0.90, 0.88, 0.03, 2, 0.99),  # beyond chance
    (0.99, 0.95, 0.88, 0.03, 40, 0.88),  # beyond chance once, not among forty
    (0.93, 0.94, 0.91, 0.03, 5, 0.91),
    (0.95, 0.94, None, 0.03, 2, 0.94),  # the champion is an earlier release's
]


@pytest.mark.parametrize(("ours", "theirs", "known", "reach", "choices", "expected"), REPORTED)
def test_a_version_is_reported_without_the_luck_of_selection(
    ours: float, theirs: float, known: float | None, reach: float, choices: int, expected: float
) -> None:
    verdict = gate(metrics(f1=ours), against(ours, theirs, reach, reported=known), "auto", POLICY, None, choices)
    assert verdict.reported is not None
    assert (verdict.reported.value, verdict.reported.choices) == (expected, choices)
    assert verdict.as_dict()["reported"]["test_digest"] == ONE_SET
    told = [reason for reason in verdict.reasons if "such decisions" in reason]
    assert told == ([f"Its test scans have now been used for {choices} such decisions."] if choices > 1 else [])


def test_the_first_champion_is_reported_with_its_own_figure() -> None:
    verdict = judged(metrics(f1=0.93))
    assert verdict.as_dict()["reported"] == {"figure": "f1", "value": 0.93, "choices": 1, "test_digest": ONE_SET}


# --- never ---


def test_promote_never_reports_the_hypothetical_verdict() -> None:
    good = judged(metrics(), wanted="never")
    assert not good.promoted
    assert good.reasons == [
        "The job asked for no promotion (promote: never). The gate would have promoted it:",
        *judged(metrics()).reasons,
    ]
    bad = judged(metrics(), against(0.85, 0.95), wanted="never")
    assert not bad.promoted
    assert "would have refused it" in bad.reasons[0]


# --- leaks ---


@pytest.mark.parametrize(
    ("leaks", "words"),
    [
        ({"patients": 3}, "3 test scans are of patients that the network has learnt from."),
        ({"patients": 1}, "1 test scan is of a patient that the network has learnt from."),
        ({"duplicates": 2}, "2 test scans are copies of scans that the network has learnt from."),
        ({"near_duplicates": 1}, "1 test scan looks almost the same as scans that the network has learnt from."),
    ],
)
@pytest.mark.parametrize("champion", [None, against(1.0, 0.5)])
def test_leaks_are_refused_whatever_the_f1(
    leaks: dict[str, int], words: str, champion: ChampionComparison | None
) -> None:
    verdict = judged(metrics(f1=1.0, leaks={**NO_LEAKS, **leaks}), champion)
    assert not verdict.promoted
    assert verdict.reasons[0] == words
    assert "mend the dataset" in verdict.reasons[1]


def test_every_leak_is_named() -> None:
    verdict = judged(metrics(leaks={"patients": 1, "duplicates": 2, "near_duplicates": 3}))
    assert len([reason for reason in verdict.reasons if "learnt from" in reason]) == 3


def test_all_failed_rules_are_listed() -> None:
    bad = metrics(f1=0.5, recall=0.4, ece=0.3, leaks={**NO_LEAKS, "patients": 2}, patients_known=False)
    verdict = judged(bad, against(0.5, 0.9))
    assert [reason.split()[0] for reason in verdict.reasons] == [
        "WARNING:", "2", "Its", "It", "It", "F1", "That", "Sensitivity", "The", "Calibration", "For",
    ]  # fmt: skip


# --- any metrics at all ---

figure = st.none() | st.floats(0, 1) | st.just(math.nan)
counts = st.none() | st.dictionaries(st.sampled_from(["Cyst", "Normal", "Tumor"]), st.integers(0, 60))
any_metrics = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("f1", "recall", "ece", "ece_chance"), figure),
        "leaks": st.none() | st.dictionaries(st.sampled_from(sorted(NO_LEAKS)), st.none() | st.integers(0, 3)),
        "patients_known": st.none() | st.booleans(),
        "independent_per_class": counts,
        "positive": st.sampled_from([None, "Tumor", ["Cyst", "Tumor"]]),
        "intervals": st.just({"recall": None}) | st.floats(0, 1).map(lambda low: {"recall": [low, 1.0]}),
    },
)
wishes = st.sampled_from(["auto", "never"])
shares = st.floats(0, 1)
policies = st.builds(
    GatePolicy, shares, shares, shares, shares, shares, st.integers(0, 50), st.integers(0, 50), st.floats(0.01, 0.5)
)
comparisons = st.builds(
    ChampionComparison, st.integers(1, 9), st.just(50), any_metrics, any_metrics,
    paired=st.none() | st.builds(paired, shares, shares, shares),
)  # fmt: skip


@given(any_metrics, shares, shares, st.floats(0, 0.3), wishes, policies)
def test_worse_than_champion_by_the_margin_is_never_promoted(
    candidate: dict[str, Any], one: float, other: float, reach: float, wanted: str, policy: GatePolicy
) -> None:
    low, high = sorted((one, other))
    verdict = gate(candidate, against(low, high, reach), wanted, policy)
    assert not verdict.promoted or high - low + reach <= policy.margin + 1e-9


@given(any_metrics, st.none() | comparisons, policies)
def test_promoted_version_meets_every_rule(
    candidate: dict[str, Any], champion: ChampionComparison | None, policy: GatePolicy
) -> None:
    verdict = gate(candidate, champion, "auto", policy)
    assert len(verdict.reasons) >= 3, "each rule has its sentence"
    if verdict.promoted:
        assert not any((candidate.get("leaks") or {}).values())
        assert candidate["recall"] >= policy.min_sensitivity
        assert candidate["ece"] - candidate["ece_chance"] <= policy.max_calibration_error
        assert sum(candidate["independent_per_class"].values()) >= policy.min_positives
        if champion is None:
            assert candidate["f1"] >= policy.min_f1
        else:
            assert champion.paired is not None
            assert champion.paired["differences"]["f1"]["low"] >= -policy.margin


@given(any_metrics, st.none() | comparisons, policies)
def test_never_promotes_nothing(
    candidate: dict[str, Any], champion: ChampionComparison | None, policy: GatePolicy
) -> None:
    assert not gate(candidate, champion, "never", policy).promoted
