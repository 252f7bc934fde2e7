"""The operating point of a version, set anew: figures, reference, history, and what jobs are pinned to."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from jobs.db import Sessions
from jobs.errors import Invalid, WrongState
from jobs.models import cards, feedback, operating_points
from jobs.models.figures import figures_at, reference_at
from jobs.models.patient_figures import by_patient_at, pooling_at
from jobs.tables import Job, ModelEvaluation, ModelVersion, OperatingPointChange
from ml.evaluation.by_patient import by_patient
from ml.evaluation.calibration import Calibration
from ml.evaluation.metrics import score
from ml.evaluation.operating import Choosing, calibrate_at, kept_scores
from ml.image.serving.drift_reference import drift_reference
from ml.spec.pooling import Pooling
from ml.spec.positive_class import of_metrics
from tests import builders
from tests.ml.test_operating import make_outputs

FOLLOWING = (
    "accuracy", "precision", "recall", "specificity", "f1", "confusion_matrix", "per_class", "macro",
)  # fmt: skip


def choosing(outputs: Any) -> Choosing:
    labels = outputs.validation_labels
    return Choosing(labels, outputs.validation_logits, np.arange(len(labels)))


def trained(session: Session, classes: int = 2, **more: Any) -> ModelVersion:
    """A version of a real evaluation, at F1's threshold."""
    outputs = make_outputs(classes)
    chosen = choosing(outputs)
    calibration, point = calibrate_at("f1", chosen, outputs.findings)
    metrics = score(outputs, calibration).as_dict() | {"test_digest": "e" * 64, "leaks": {}, "patients_known": True}
    assert point is not None
    metrics["operating_point"] = point.as_dict()
    new: dict[str, Any] = {"classes": list(outputs.classes), "scan_scores": kept_scores(outputs, calibration, chosen)}
    new["reference"] = reference_of(outputs, calibration)
    return builders.make_model(session, metrics, **new | more)


def reference_of(outputs: Any, calibration: Calibration) -> Any:
    decided = calibration.decide(outputs.test_logits, outputs.findings)
    confidence = calibration.probabilities(outputs.test_logits)[np.arange(len(decided)), decided]
    from ml.image.pixels.statistics import MEANINGS

    seen = [dict.fromkeys(MEANINGS, float(number)) for number in range(len(decided))]
    labels = [outputs.classes[index] for index in decided]
    return drift_reference(seen, confidence.tolist(), labels, outputs.classes, 3, np.arange(len(labels)))


# --- figures ---


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5, 0.9, 0.999])
def test_figures_at_another_threshold_are_those_that_an_evaluation_computes(classes: int, threshold: float) -> None:
    outputs = make_outputs(classes)
    kept = kept_scores(outputs, Calibration(1.3, 0.5), choosing(outputs))
    truth = score(outputs, Calibration(1.3, threshold)).as_dict()
    assert kept is not None
    found = figures_at(kept, threshold, score(outputs, Calibration(1.3, 0.5)).as_dict())
    for name in FOLLOWING:
        assert _flat(found[name]) == pytest.approx(_flat(truth[name])), name
    assert {name: one["roc_auc"] for name, one in found["per_class"].items()} == {
        name: one["roc_auc"] for name, one in truth["per_class"].items()
    }
    low, high = found["intervals"]["recall"]
    assert low <= found["recall"] <= high
    assert found["intervals"]["f1"] is None


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
def test_figures_by_patient_at_another_threshold_are_those_that_an_evaluation_computes(
    classes: int, threshold: float
) -> None:
    outputs = make_outputs(classes)
    of_one_class = np.arange(120) // (3 * classes) * classes + outputs.test_labels  # three scans each
    outputs = replace(outputs, groups=of_one_class)
    kept = kept_scores(outputs, Calibration(1.3, 0.5), choosing(outputs))
    assert kept is not None
    truth, old = (patients(outputs, Pooling("top", 2, each)) for each in (threshold, 0.7))
    found = by_patient_at(kept, Pooling("top", 2, threshold), old)
    for name in ("recall", "specificity", "precision", "f1", "patients", "per_class", "roc_auc", "pooling"):
        assert _flat(found[name]) == pytest.approx(_flat(truth[name])), name
    assert found["intervals"]["recall"] == pytest.approx(truth["intervals"]["recall"], abs=1e-3)
    same = (truth["accuracy"], truth["confusion_matrix"]) if classes == 2 else (None, None)
    assert (found["accuracy"], found["confusion_matrix"]) == same


def patients(outputs: Any, pooling: Pooling) -> Any:
    probabilities = Calibration(1.3, 0.5).probabilities(outputs.test_logits)
    given = outputs.classes, outputs.test_labels, probabilities, outputs.groups, outputs.positive
    return by_patient(*given, pooling, 0)


@pytest.mark.parametrize(
    ("rule", "chosen", "expected"),
    [
        ("f1", True, 0.42),
        ({"threshold": 0.2}, True, 0.2),
        ({"sensitivity": 1.0}, True, 0.45),  # midway between the positive patients' 0.6 and the others' 0.3
        ("f1", False, 0.33),
        ({"sensitivity": 1.0}, False, 0.33),
    ],
)
def test_the_patients_threshold_follows_the_rule(rule: Any, chosen: bool, expected: float) -> None:
    """Two patients of two scans: the higher one decides. Where they were too few to choose by, that of the scans."""
    sides = {"label": [0, 1, 1, 1], "score": [0.6, 0.1, 0.3, 0.2], "group": [0, 0, 1, 1]}
    scores = {"classes": ["Cancer", "Healthy"], "positive": ["Cancer"], "validation": sides}
    old = Pooling("max", 1, 0.5, chosen, 0.42)
    assert pooling_at(rule, scores, old, 0.33).threshold == pytest.approx(expected)


def _flat(value: Any) -> list[float | None]:
    if isinstance(value, dict):
        return [each for key in sorted(value) for each in _flat(value[key])]
    if isinstance(value, str | bool):
        return [float(len(str(value)))]
    return [each for one in value for each in _flat(one)] if isinstance(value, list) else [value]


@pytest.mark.parametrize("classes", [2, 4])
def test_the_drift_reference_follows(classes: int) -> None:
    outputs = make_outputs(classes)
    kept = kept_scores(outputs, Calibration(1.0, 0.5), choosing(outputs)) or {}
    old = reference_of(outputs, Calibration(1.0, 0.5))
    assert reference_at(kept, 0.5, old) == old, "the same threshold changes nothing"
    found, truth = reference_at(kept, 0.9, old), reference_of(outputs, Calibration(1.0, 0.9))
    assert found["classes"] == truth["classes"] != old["classes"]
    assert sum(found["statistics"]["confidence"]["counts"]) == old["scans"]
    assert found["rejected"] == 3


# --- a version ---


def test_a_point_is_set_anew_with_its_figures_its_reason_and_a_count(sessions: Sessions) -> None:
    with sessions.begin() as session:
        before = dict(trained(session).metrics)
        found = operating_points.set_point(session, builders.TENANT, "1", {"sensitivity": 0.97}, "Screening.")
        point = found.metrics["operating_point"]
        assert (point["rule"], point["wanted"], point["changes"]) == ("sensitivity", 0.97, 1)
        assert point["sensitivity"]["value"] >= 0.97
        assert found.metrics["threshold"] == point["threshold"] < before["threshold"]
        assert found.metrics["recall"] > before["recall"]
        assert found.metrics["roc_auc"] == before["roc_auc"]
        assert session.get_one(Job, found.job_id).metrics == before, "the training's own stays as it was"
        (change,) = session.scalars(select(OperatingPointChange)).all()
        assert (change.reason, change.replaced) == ("Screening.", before["operating_point"])
        assert cards.model_card_data(session, found).point_changes == [change]


def test_patients_are_answered_at_the_new_point_and_jobs_of_before_at_theirs(sessions: Sessions) -> None:
    chosen = Pooling("top", 2, 0.5, True, 0.5, "By patients. Threshold 0.5: no other was better.")
    with sessions.begin() as session:
        version = trained(session)
        by_patient = patients(make_outputs(2), chosen)
        version.metrics = {**version.metrics, "pooling": chosen.as_dict(), "by_patient": by_patient}
        version.metrics["calibration"] = "Temperature 1: few scans. Threshold 0.5: as few cannot move it either."
        pinned = operating_points.pin(version)
        found = operating_points.set_point(session, builders.TENANT, "1", {"threshold": 0.2}, "Screening.").metrics
        assert pinned is not None
        assert (pinned["threshold"], pinned["pooling"]["threshold"]) == (0.5, 0.5)
        assert found["pooling"] == found["by_patient"]["pooling"]
        assert (found["pooling"]["threshold"], found["pooling"]["reason"]) == (0.2, "By patients.")
        assert found["calibration"] == "Temperature 1: few scans."
        assert found["by_patient"]["recall"] >= by_patient["recall"]


def test_the_same_point_again_changes_nothing(sessions: Sessions) -> None:
    with sessions.begin() as session:
        trained(session)
        for rule in ("f1", {"threshold": 0.3}, {"threshold": 0.3}):
            found = operating_points.set_point(session, builders.TENANT, "1", rule, "Why.")  # type: ignore[arg-type]
        assert found.metrics["operating_point"]["changes"] == 1
        back = operating_points.set_point(session, builders.TENANT, "1", "f1", "Back.")
        point = back.metrics["operating_point"]
        assert (point["rule"], point["threshold"], point["changes"]) == ("f1", point["best_f1"], 2)


def test_scores_beside_other_versions_are_of_the_point_of_now(sessions: Sessions) -> None:
    with sessions.begin() as session:
        first = trained(session)
        beside = {"tenant_id": builders.TENANT, "scans": 30, "metrics": {"f1": 0.9}}
        session.add(ModelEvaluation(model_id=first.id, test_digest="c" * 64, **beside))
        session.flush()
        of_first = select(ModelEvaluation.test_digest).where(ModelEvaluation.model_id == first.id)
        assert len(session.scalars(of_first).all()) == 2
        operating_points.set_point(session, builders.TENANT, "1", {"threshold": 0.9}, "Why.")
        assert session.scalars(of_first).all() == ["e" * 64]
        kept = session.scalars(select(ModelEvaluation).where(ModelEvaluation.model_id == first.id)).one()
        assert kept.metrics["threshold"] == 0.9


def test_the_history_is_kept(sessions: Sessions) -> None:
    with sessions.begin() as session:
        trained(session)
        operating_points.set_point(session, builders.TENANT, "1", {"threshold": 0.9}, "Why.")
    for statement in ("UPDATE operating_point_changes SET reason = 'other'", "DELETE FROM operating_point_changes"):
        with pytest.raises(IntegrityError, match="is history"), sessions.begin() as session:
            session.execute(text(statement))


def test_a_version_without_scores_or_without_a_positive_class_is_refused(sessions: Sessions) -> None:
    with sessions.begin() as session:
        trained(session, scan_scores=None)
        with pytest.raises(WrongState, match="train it again"):
            operating_points.set_point(session, builders.TENANT, "1", {"threshold": 0.9}, "Why.")
        builders.make_model(session, {"positive": []})
        with pytest.raises(Invalid, match="no positive class"):
            operating_points.set_point(session, builders.TENANT, "2", {"threshold": 0.9}, "Why.")


def test_a_page_of_versions_does_not_read_their_scores(sessions: Sessions) -> None:
    with sessions.begin() as session:
        trained(session)
    with sessions() as session:
        version = cards.list_versions(session, builders.TENANT, 10, None).data[0]
        assert "scan_scores" not in vars(version)


# --- positive classes ---


@pytest.mark.parametrize(
    ("metrics", "known"),
    [({"positive": ["A", "B"]}, ["A", "B"]), ({"positive": "A"}, ["A"]), ({"positive": None}, []), ({}, None)],
)
def test_positive_classes_of_this_and_of_earlier_releases(metrics: Any, known: Any) -> None:
    assert of_metrics(metrics) == known


def test_feedback_counts_by_all_positive_classes() -> None:
    counts = [feedback._counts(*row, 1, ["Cyst", "Tumor"]) for row in (
        ("Cyst", "Tumor"), ("Tumor", "Normal"), ("Normal", "Normal"), ("Stone", "Cyst")
    )]  # fmt: skip
    together = sum(counts, feedback.ConfusionCounts())
    assert (together.known, together.right, together.sensitivity, together.specificity) == (4, 1, 0.5, 0.5)
