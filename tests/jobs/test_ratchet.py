"""Twenty equally good retrainings, one after another: a champion is not reported better than it is."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from scipy.special import ndtr

from jobs.models.gate import ChampionComparison, GatePolicy, gate
from jobs.tables import Json
from ml.evaluation import intervals
from ml.evaluation.intervals import Decisions, figures
from ml.evaluation.paired import paired

RETRAININGS, SEQUENCES = 20, 12
DIGEST = "1" * 64
POLICY = GatePolicy(min_f1=0.0, min_sensitivity=0.0, min_sensitivity_low=0.0)


@dataclasses.dataclass(frozen=True)
class TestSet:
    """Patients of each class, slices of each, and the share of the noise that all networks have in common."""

    __test__ = False
    patients: int
    slices: int
    shared: float


SETS = [TestSet(24, 2, 0.5), TestSet(45, 1, 0.5), TestSet(45, 1, 0.9)]
SEPARATION = 3.0
RATE = float(ndtr(SEPARATION / 2))
TRUTH = 2 * RATE / (2 * RATE + 2 * (1 - RATE))
"""F1 of each network on infinitely many patients, half of them positive."""


def networks(test: TestSet, seed: int) -> list[Decisions]:
    """Equally good networks on one test set."""
    random, patients = np.random.default_rng(seed), 2 * test.patients
    groups = np.repeat(np.arange(patients), test.slices)
    labels = groups % 2

    def noise() -> np.ndarray:
        return (random.standard_normal(patients)[groups] + random.standard_normal(len(groups))) / np.sqrt(2)

    common, made = noise(), []
    for _ in range(RETRAININGS + 1):
        scores = SEPARATION * (labels - 0.5) + np.sqrt(test.shared) * common + np.sqrt(1 - test.shared) * noise()
        made.append(Decisions(labels, (scores > 0).astype(int), np.stack([-scores, scores], axis=1), groups, 1))
    return made


def metrics(decisions: Decisions, patients: int) -> Json:
    """What the gate reads."""
    found = {name: float(values[0]) for name, values in figures(np.ones((1, len(decisions.labels))), decisions).items()}
    tested: dict[str, Any] = {"independent_per_class": {"Normal": patients, "Tumor": patients}, "positive": "Tumor"}
    return {**found, **tested, "ece": 0.0, "ece_chance": 0.0, "patients_known": True, "test_digest": DIGEST}


def last_champion(test: TestSet, seed: int) -> tuple[float, float, int]:
    """After all retrainings: the champion's own F1, the one that it is reported with, and how many were promoted."""
    made = networks(test, seed)
    scores = [metrics(each, test.patients) for each in made]
    first = gate(scores[0], None, "auto", POLICY)
    assert first.promoted
    assert first.reported is not None
    champion, reported, promotions = 0, first.reported.value, 0
    for number in range(1, len(made)):
        tests = paired(made[number], made[champion], number)
        versus = ChampionComparison(
            champion + 1, len(made[0].labels), scores[number], scores[champion],
            paired=tests, reported=reported, test_digest=DIGEST,
        )  # fmt: skip
        verdict = gate(scores[number], versus, "auto", POLICY, choices=number + 1)
        if verdict.promoted:
            assert verdict.reported is not None
            champion, reported, promotions = number, verdict.reported.value, promotions + 1
    assert reported is not None
    return scores[champion]["f1"], reported, promotions


@pytest.mark.parametrize("test", [SETS[0], *(pytest.param(each, marks=pytest.mark.full) for each in SETS[1:])], ids=str)
def test_after_twenty_retrainings_the_reported_f1_is_at_most_two_hundredths_above_the_truth(
    monkeypatch: pytest.MonkeyPatch, test: TestSet
) -> None:
    monkeypatch.setattr(intervals, "RESAMPLES", 200)
    own, reported, promotions = np.mean([last_champion(test, seed) for seed in range(SEQUENCES)], axis=0)
    assert promotions >= 1, "the gate does not refuse all of them"
    assert reported - TRUTH <= 0.02
    assert reported - TRUTH >= -0.03, "nor is it reported much worse"
    if test.shared < 0.9:
        assert own - TRUTH > 0.02, "its own figure has climbed by selection alone"
