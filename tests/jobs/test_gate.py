"""The gate's verdict for any metrics."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.models.gate import ChampionComparison, GatePolicy, Verdict, gate
from jobs.settings import Settings

POLICY = GatePolicy(min_f1=0.85, min_sensitivity=0.80, max_calibration_error=0.10)
NO_LEAKS = {"patients": 0, "duplicates": 0, "near_duplicates": 0}
SENSITIVE = "Sensitivity 0.9100 ≥ the required 0.8000."
CALIBRATED = "Calibration error beyond chance 0.0200 ≤ the allowed 0.1000."


def metrics(**more: Any) -> dict[str, Any]:
    """Metrics of a good network, tested without leaks."""
    figures = {"f1": 0.95, "recall": 0.91, "ece": 0.05, "ece_chance": 0.03}
    return {**figures, "leaks": NO_LEAKS, "patients_known": True, **more}


def against(ours: float | None, theirs: float | None) -> ChampionComparison:
    """Both networks' F1 on the same 93 test scans, of which the champion is version 3."""
    return ChampionComparison(3, 93, metrics(f1=ours), metrics(f1=theirs))


def judged(candidate: dict[str, Any], champion: ChampionComparison | None = None, wanted: str = "auto") -> Verdict:
    """The gate's verdict by the policy above."""
    return gate(candidate, champion, wanted, POLICY)


# --- F1 ---


def test_first_champion_needs_the_required_f1() -> None:
    enough = judged(metrics(f1=0.85))
    assert enough.promoted
    assert enough.reasons == [
        "There is no champion yet, and F1 0.8500 ≥ the required 0.8500.",
        SENSITIVE,
        CALIBRATED,
    ]
    below = judged(metrics(f1=0.8499))
    assert not below.promoted
    assert below.reasons[0] == "There is no champion yet, and F1 0.8499 < the required 0.8500."


def test_next_champion_must_not_be_worse_on_shared_scans() -> None:
    assert judged(metrics(), against(0.946, 0.946)).promoted
    worse = judged(metrics(), against(0.925, 0.946))
    assert not worse.promoted
    assert worse.reasons == [
        "F1 0.9250 < the champion's 0.9460 (version 3) on the same 93 test scans.",
        SENSITIVE,
        CALIBRATED,
    ]


def test_f1_on_shared_scans_decides() -> None:
    assert judged(metrics(f1=0.10), against(0.95, 0.94)).promoted
    assert not judged(metrics(f1=1.00), against(0.93, 0.94)).promoted


def test_different_figures_are_shown_with_enough_digits() -> None:
    worse = judged(metrics(), against(0.94600001, 0.94600002))
    assert not worse.promoted
    assert worse.reasons[0].startswith("F1 0.94600001 < the champion's 0.94600002")


def test_missing_shared_scans_refuse_with_reason_and_remedy() -> None:
    verdict = judged(metrics(), ChampionComparison(3, why="its classes are Cyst, Stone, not Normal, Tumor"))
    assert not verdict.promoted
    assert verdict.reasons[0] == (
        "It cannot be compared with the champion (version 3): its classes are Cyst, Stone, not Normal, Tumor. "
        "Train anew, or promote it with `force` and a `reason`."
    )


@pytest.mark.parametrize(("ours", "theirs"), [(None, 0.9), (0.9, None), (math.nan, 0.9), (0.9, math.nan)])
def test_unknown_f1_is_refused(ours: float | None, theirs: float | None) -> None:
    verdict = judged(metrics(), against(ours, theirs))
    assert not verdict.promoted
    assert "not known" in verdict.reasons[0]


# --- sensitivity and calibration ---


@pytest.mark.parametrize("champion", [None, against(0.96, 0.95)])
def test_low_sensitivity_is_refused_whatever_the_f1(champion: ChampionComparison | None) -> None:
    assert judged(metrics(recall=0.80), champion).promoted
    verdict = judged(metrics(recall=0.79), champion)
    assert not verdict.promoted
    assert verdict.reasons[1] == "Sensitivity 0.7900 < the required 0.8000."


@pytest.mark.parametrize("champion", [None, against(0.96, 0.95)])
def test_poor_calibration_is_refused(champion: ChampionComparison | None) -> None:
    verdict = judged(metrics(ece=0.16, ece_chance=0.05), champion)
    assert not verdict.promoted
    assert verdict.reasons[2] == "Calibration error beyond chance 0.1100 > the allowed 0.1000."


def test_calibration_error_within_chance_is_accepted() -> None:
    verdict = judged(metrics(ece=0.12, ece_chance=0.13))
    assert verdict.promoted
    assert verdict.reasons[2] == "Calibration error beyond chance 0.0000 ≤ the allowed 0.1000."


@pytest.mark.parametrize("name", ["f1", "recall", "ece", "ece_chance"])
def test_unknown_metrics_of_older_versions_are_refused(name: str) -> None:
    candidate = metrics()
    del candidate[name]
    verdict = judged(candidate)
    assert not verdict.promoted
    assert sum("not known" in reason for reason in verdict.reasons) == 1


def test_all_failed_rules_are_listed() -> None:
    bad = metrics(f1=0.5, recall=0.4, ece=0.3, leaks={**NO_LEAKS, "patients": 2}, patients_known=False)
    verdict = judged(bad, against(0.5, 0.9))
    assert [reason.split()[0] for reason in verdict.reasons] == [
        "2", "Its", "F1", "Sensitivity", "Calibration", "Neither",
    ]  # fmt: skip


def test_policy_comes_from_the_settings() -> None:
    assert GatePolicy.of(Settings()) == GatePolicy() == POLICY
    strict = Settings(promote_min_f1=0.9, promote_min_sensitivity=0.95, promote_max_calibration_error=0.02)
    assert GatePolicy.of(strict) == GatePolicy(0.9, 0.95, 0.02)
    assert not gate(metrics(), None, "auto", GatePolicy.of(strict)).promoted


# --- never ---


def test_promote_never_reports_the_hypothetical_verdict() -> None:
    good = judged(metrics(), wanted="never")
    assert not good.promoted
    assert good.reasons == [
        "The job asked for no promotion (promote: never). The gate would have promoted it:",
        *judged(metrics()).reasons,
    ]
    bad = judged(metrics(), against(0.9, 0.95), wanted="never")
    assert not bad.promoted
    assert "would have refused it" in bad.reasons[0]
    assert bad.reasons[1].startswith("F1 0.9000 < the champion's 0.9500")


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


def test_unknown_patients_are_noted_and_not_refused() -> None:
    verdict = judged(metrics(patients_known=False))
    assert verdict.promoted
    assert "patient" in verdict.reasons[-1]


# --- any metrics at all ---

figure = st.none() | st.floats(0, 1) | st.just(math.nan)
any_metrics = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("f1", "recall", "ece", "ece_chance"), figure),
        "leaks": st.none() | st.dictionaries(st.sampled_from(sorted(NO_LEAKS)), st.none() | st.integers(0, 3)),
        "patients_known": st.none() | st.booleans(),
    },
)
wishes = st.sampled_from(["auto", "never"])
policies = st.builds(GatePolicy, st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))


@given(any_metrics, any_metrics, any_metrics, st.floats(0, 1), st.floats(0, 1), wishes, policies)
def test_worse_than_champion_is_never_promoted(
    candidate: dict[str, Any],
    ours: dict[str, Any],
    theirs: dict[str, Any],
    one: float,
    other: float,
    wanted: str,
    policy: GatePolicy,
) -> None:
    low, high = sorted((one, other))
    verdict = gate(candidate, ChampionComparison(1, 50, {**ours, "f1": low}, {**theirs, "f1": high}), wanted, policy)
    assert not verdict.promoted or low == high


@given(
    any_metrics,
    st.none() | st.builds(ChampionComparison, st.integers(1, 9), st.just(50), any_metrics, any_metrics),
    policies,
)
def test_promoted_version_meets_every_rule(
    candidate: dict[str, Any], champion: ChampionComparison | None, policy: GatePolicy
) -> None:
    verdict = gate(candidate, champion, "auto", policy)
    assert len(verdict.reasons) >= 3, "each rule has its sentence"
    if verdict.promoted:
        assert not any((candidate.get("leaks") or {}).values())
        assert candidate["recall"] >= policy.min_sensitivity
        assert candidate["ece"] - candidate["ece_chance"] <= policy.max_calibration_error
        if champion is None:
            assert candidate["f1"] >= policy.min_f1
        else:
            assert champion.candidate is not None
            assert champion.champion is not None
            assert champion.candidate["f1"] >= champion.champion["f1"]


@given(
    any_metrics,
    st.none() | st.builds(ChampionComparison, st.integers(1, 9), st.just(50), any_metrics, any_metrics),
    policies,
)
def test_never_promotes_nothing(
    candidate: dict[str, Any], champion: ChampionComparison | None, policy: GatePolicy
) -> None:
    assert not gate(candidate, champion, "never", policy).promoted
