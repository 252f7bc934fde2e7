"""The report by patient: figures of their answers, and a table of them, worst first. Numbers, no names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ml.evaluation.by_patient import judged
from ml.evaluation.calibration import Calibration
from ml.evaluation.metrics import ModelOutputs, Scores
from ml.reporting.sections import Section, Table
from ml.spec.pooling import Pooling

MOST_ROWS = 40


@dataclass(frozen=True)
class PatientRow:
    """One group of test scans: a patient, if the patients are known, else scans that belong together.

    `answer`: what its scans, pooled, are called. `right`: scans whose class was found. `mean` and `highest`:
    probability of the positive classes or, without any, of the true one. `likeness`: mean probability of the true
    class, which the rows are sorted by.
    """

    number: int
    true: str
    scans: int
    right: int
    mean: float
    highest: float
    likeness: float
    answer: str = ""


def patient_rows(outputs: ModelOutputs, calibration: Calibration, pooling: Pooling) -> list[PatientRow]:
    """The rows of all test groups, the worst first; none if each scan is a group by itself."""
    if outputs.groups is None or len(np.unique(outputs.groups)) == len(outputs.test_labels):
        return []
    probabilities, labels = calibration.probabilities(outputs.test_logits), outputs.test_labels
    right = calibration.decide(outputs.test_logits, outputs.findings) == labels
    of_true = probabilities[np.arange(len(labels)), labels]
    told = probabilities[:, outputs.findings].sum(axis=1) if outputs.findings else of_true
    given = outputs.classes, labels, probabilities, outputs.groups, outputs.positive or (), pooling
    answers, rows = judged(*given).decisions.predicted, []
    for number, group in enumerate(np.unique(outputs.groups), 1):
        mine = outputs.groups == group
        true = " and ".join(outputs.classes[label] for label in np.unique(labels[mine]))
        numbers = float(told[mine].mean()), float(told[mine].max()), float(of_true[mine].mean())
        answer = outputs.classes[answers[number - 1]]
        rows.append(PatientRow(number, true, int(mine.sum()), int(right[mine].sum()), *numbers, answer))
    return sorted(rows, key=lambda row: (row.likeness, row.number))


def figures_by_patient(found: Mapping[str, Any] | None, scores: Scores, names: Mapping[str, str]) -> Iterator[Section]:
    """The section with the figures of the patients' answers; none if each scan is a patient. `found`: of the metrics.

    `names`: titles of the figures.
    """
    if not found or found["patients"] == scores.held_out:
        return
    what = "patients" if scores.patients_known else "groups of scans"
    rows = []
    for name, title in names.items():
        if (value := found.get(name)) is not None:
            known = found["intervals"].get(name)
            rows.append((title, f"{value:.3f}", f"{known[0]:.3f} to {known[1]:.3f}" if known else "too few to say"))
    told = f"The slices of each of the {found['patients']} {what} are pooled into one answer, as a study is answered. "
    counts = ", ".join(f"{name} {count}" for name, count in found["per_class"].items())
    table = Table(("Figure", "Value", "95 % interval"), tuple(rows), f"{what.capitalize()} of each class: {counts}.")
    yield Section(f"Figures by {what.split()[0].rstrip('s')}", (told + found["pooling"]["reason"],), (table,))


def verdict_by_patient(found: Mapping[str, Any] | None, scores: Scores) -> Iterator[str]:
    """The sentence that the verdict begins with."""
    if found and found["patients"] != scores.held_out and found.get("f1") is not None:
        known = found["intervals"].get("f1")
        between = f" (95 % interval {known[0]:.3f} to {known[1]:.3f})" if known else ""
        what = "test patients" if scores.patients_known else "groups of test scans that belong together"
        yield f"On {found['patients']} {what}, each with one answer, F1 is {found['f1']:.3f}{between}."


def patients(rows: Sequence[PatientRow], scores: Scores) -> Iterator[Section]:
    """The section; none without rows."""
    if not rows:
        return
    what = "Patient" if scores.patients_known else "Group"
    title = "Test patients" if scores.patients_known else "Groups of test scans that belong together"
    wrong = sum(row.right < row.scans for row in rows)
    told = [
        f"Of {len(rows)} {what.lower()}s, {len(rows) - wrong} have no wrong scan. The numbers are the report's own: "
        "they tell nobody."
    ]
    if not scores.patients_known:
        told.append("Not all patients are known: a group is a patient, a study, or scans that look almost the same.")
    yield Section(title, tuple(told), (_table(rows, what, scores),))


def _table(rows: Sequence[PatientRow], what: str, scores: Scores) -> Table:
    of = " or ".join(scores.positive) or "the true class"
    caption = f"Probabilities of {of}. Those with the lowest mean probability of their true class come first."
    if len(rows) > MOST_ROWS:
        caption += f" {len(rows) - MOST_ROWS} more are not listed."
    cells = tuple((f"{what} {row.number}", row.true, row.answer, *_numbers(row)) for row in rows[:MOST_ROWS])
    return Table((what, "True class", "Answer", "Scans", "Right", "Mean", "Highest"), cells, caption)


def _numbers(row: PatientRow) -> tuple[str, ...]:
    return str(row.scans), str(row.right), f"{row.mean:.2f}", f"{row.highest:.2f}"
