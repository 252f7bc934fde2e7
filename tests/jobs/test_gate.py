"""The gate's word, for any two sets of metrics."""

from typing import Any

import pytest

from jobs.gate import gate

TESTED = {"f1": 0.95, "leaks": {"patients": 0, "duplicates": 0, "near_duplicates": 0}, "patients_known": True}


def metrics(**more: Any) -> dict[str, Any]:
    """Metrics of a network that was tested as it should be."""
    return {**TESTED, "test_digest": "a" * 64, **more}


def test_the_first_champion_needs_the_required_f1() -> None:
    assert gate(metrics(f1=0.85), None, "auto", 0.85).promoted
    below = gate(metrics(f1=0.8499), None, "auto", 0.85)
    assert (below.promoted, below.reasons) == (
        False,
        ["There is no champion yet, and F1 0.8499 < the required 0.85."],
    )


def test_the_next_one_must_not_be_worse() -> None:
    assert gate(metrics(f1=0.95), metrics(f1=0.95), "auto", 0.85).promoted
    worse = gate(metrics(f1=0.949), metrics(f1=0.95), "auto", 0.85)
    assert (worse.promoted, worse.reasons) == (False, ["F1 0.9490 < the champion's 0.9500."])


def test_who_asks_for_no_promotion_gets_none() -> None:
    verdict = gate(metrics(f1=1.0), None, "never", 0.85)
    assert not verdict.promoted
    assert "promote: never" in verdict.reasons[0]


@pytest.mark.parametrize(
    ("leaks", "words"),
    [
        ({"patients": 3}, "3 test scans are of patients that the network has learnt from."),
        ({"patients": 1}, "1 test scan is of a patient that the network has learnt from."),
        ({"duplicates": 2}, "2 test scans are copies of scans that the network has learnt from."),
        ({"near_duplicates": 1}, "1 test scan looks almost the same as scans that the network has learnt from."),
    ],
)
@pytest.mark.parametrize("champion", [None, metrics(f1=0.5)])
def test_a_network_tested_on_what_it_has_learnt_is_refused_whatever_its_f1(
    leaks: dict[str, int], words: str, champion: dict[str, Any] | None
) -> None:
    verdict = gate(metrics(f1=1.0, leaks={**TESTED["leaks"], **leaks}), champion, "auto", 0.85)  # type: ignore[dict-item]
    assert not verdict.promoted
    assert verdict.reasons[0] == words
    assert "mend the dataset" in verdict.reasons[1]


def test_every_leak_is_named() -> None:
    verdict = gate(metrics(leaks={"patients": 1, "duplicates": 2, "near_duplicates": 3}), None, "auto", 0.85)
    assert len(verdict.reasons) == 4


def test_unknown_patients_are_noted_and_refused_nothing() -> None:
    verdict = gate(metrics(patients_known=False), None, "auto", 0.85)
    assert verdict.promoted
    assert "patient" in verdict.reasons[-1]
    assert len(verdict.reasons) == 2


def test_two_that_were_tested_on_different_scans_compare_roughly() -> None:
    verdict = gate(metrics(f1=0.96, test_digest="b" * 64), metrics(), "auto", 0.85)
    assert verdict.promoted
    assert verdict.reasons == [
        "F1 0.9600 ≥ the champion's 0.9500.",
        "The champion was tested on other scans: the two figures compare roughly at best.",
    ]
    assert not gate(metrics(f1=0.94, test_digest="b" * 64), metrics(), "auto", 0.85).promoted


def test_metrics_of_an_earlier_version_are_taken_as_they_are() -> None:
    verdict = gate({"f1": 0.96}, {"f1": 0.95}, "auto", 0.85)
    assert verdict.promoted
    assert "not known" in verdict.reasons[1]
