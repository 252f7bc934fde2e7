"""Events and scores as MLflow's metrics."""

from ml.runtime.events import Epoch, Steps
from worker.tracking.runs import flattened, points_of_epoch, points_of_scores, points_of_steps, texts

SCORES = {
    "f1": 0.95,
    "roc_auc": None,
    "classes": ["Normal", "Tumor"],
    "confusion_matrix": [[5, 1], [0, 6]],
    "patients_known": True,
    "per_class": {"Tumor": {"f1": 0.9, "support": 6}},
    "sensitivity_at_specificity": {"0.90": 0.97},
    "intervals": {"f1": [0.9, 0.99]},
    "cross_validation": {"folds": [{"f1": 0.9}, {"f1": 0.94}], "mean": {"f1": 0.92}},
}

PHASES = ("head", "fine_tune")


def test_nested_scores_become_metrics_by_dotted_names() -> None:
    assert {point.name: point.value for point in points_of_scores(SCORES)} == {
        "test_f1": 0.95,
        "test_patients_known": 1.0,
        "test_per_class.Tumor.f1": 0.9,
        "test_per_class.Tumor.support": 6,
        "test_sensitivity_at_specificity.0.90": 0.97,
        "test_intervals.f1.low": 0.9,
        "test_intervals.f1.high": 0.99,
        "test_cross_validation.folds.1.f1": 0.9,
        "test_cross_validation.folds.2.f1": 0.94,
        "test_cross_validation.mean.f1": 0.92,
    }


def test_a_class_may_have_a_name_that_no_metric_may_have() -> None:
    assert dict(flattened({"per_class": {"<Cyst/Ö>": {"f1": 1}}})) == {"per_class._Cyst_Ö_.f1": 1.0}


def test_an_epoch_is_logged_at_its_number_with_its_phase_as_a_number() -> None:
    points = {point.name: point for point in points_of_epoch({**vars(Epoch(3, 9, *[0.1] * 6)), "attempt": 2}, PHASES)}
    assert {point.step for point in points.values()} == {3}
    assert points["phase"].value == 0
    assert not {"epoch", "epochs", "attempt", "val_f1"} & set(points), "val_f1 was not told"


def test_an_epoch_of_an_earlier_version_is_logged() -> None:
    assert [point.name for point in points_of_epoch({"epoch": 1, "train_loss": 0.5}, PHASES)] == ["train_loss"]


def test_steps_are_logged_at_their_global_numbers() -> None:
    points = points_of_steps(Steps(epoch=2, first_step=11, losses=[0.5, 0.4, 0.3], learning_rate=0.01))
    assert [(point.name, point.step, point.value) for point in points] == [
        ("train_loss_step", 11, 0.5),
        ("train_loss_step", 12, 0.4),
        ("train_loss_step", 13, 0.3),
        ("learning_rate_step", 13, 0.01),
    ]
    assert points_of_steps(Steps(1, 1, [], 0.01)) == []


def test_every_parameter_is_a_text_of_its_own() -> None:
    params = {"epochs": 2, "window": {"center": 40.0}, "classes": None}
    assert texts(params) == [("epochs", "2"), ("window.center", "40.0"), ("classes", "None")]
