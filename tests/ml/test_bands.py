"""Bands of curves: they contain the true curve, are wider for fewer patients, and need some."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest

from ml.evaluation.bands import GRID, curve_bands
from ml.evaluation.intervals import Decisions, ranked

NORMAL = NormalDist()


def binormal(random: np.random.Generator, patients: int, each: int = 1, likeness: float = 0.0) -> Decisions:
    """Scores that are normal with variance 1, those of the second class 1.5 higher; a patient's are alike."""
    groups = np.repeat(np.arange(patients), each)
    labels = groups % 2
    score = np.sqrt(likeness) * random.normal(size=patients)[groups]
    score = score + np.sqrt(1 - likeness) * random.normal(size=len(groups)) + 1.5 * labels
    return Decisions(labels, (score > 0.75).astype(int), np.stack([-score, score], axis=1), groups, 1)


@pytest.mark.parametrize(("patients", "each", "likeness"), [(80, 1, 0.0), (60, 5, 0.7)])
def test_the_band_of_the_roc_curve_contains_the_true_curve(patients: int, each: int, likeness: float) -> None:
    """Pointwise, at three shares of false alarms; the truth of the binormal model is Phi(1.5 + Phi^-1(x))."""
    random, held = np.random.default_rng(patients), []
    for _ in range(60):
        bands = curve_bands(binormal(random, patients, each, likeness), 1, 0)
        assert bands is not None
        for place in (10, 20, 40):
            low, high = bands.roc[:, place]
            held.append(low - 1e-9 <= NORMAL.cdf(1.5 + NORMAL.inv_cdf(float(GRID[place]))) <= high + 1e-9)
    assert np.mean(held) >= 0.85


def test_the_bands_contain_the_curves_of_the_test_scans() -> None:
    decisions = binormal(np.random.default_rng(1), 200)
    bands = curve_bands(decisions, 1, 0)
    assert bands is not None
    hits, false = (counts[0] for counts in ranked(np.ones((1, 200)), decisions.labels == 1, decisions.margins[:, 1]))
    curve = np.interp(GRID, np.append(0, false / false[-1]), np.append(0, hits / hits[-1]))
    assert np.mean((bands.roc[0] <= curve + 1e-9) & (curve <= bands.roc[1] + 1e-9)) > 0.95
    recall, precision = hits / hits[-1], hits / (hits + false)
    at = np.array([precision[recall >= share - 1e-12][0] for share in GRID])
    assert np.mean((bands.precision[0] <= at + 1e-9) & (at <= bands.precision[1] + 1e-9)) > 0.95


def test_slices_of_few_patients_have_a_wider_band_than_as_many_patients() -> None:
    def width(decisions: Decisions) -> float:
        bands = curve_bands(decisions, 1, 0)
        assert bands is not None
        return float((bands.roc[1] - bands.roc[0]).mean())

    random = np.random.default_rng(2)
    assert width(binormal(random, 40, 10, 0.9)) > 1.5 * width(binormal(random, 400))


@pytest.mark.parametrize(("patients", "each", "has"), [(20, 1, True), (18, 1, False), (18, 20, False)])
def test_few_patients_have_no_band(patients: int, each: int, has: bool) -> None:
    assert (curve_bands(binormal(np.random.default_rng(3), patients, each), 1, 0) is not None) == has


def test_the_same_seed_gives_the_same_band() -> None:
    decisions = binormal(np.random.default_rng(4), 60)
    first, second = (curve_bands(decisions, 1, 5) for _ in range(2))
    assert first is not None
    assert second is not None
    assert (first.roc == second.roc).all()
