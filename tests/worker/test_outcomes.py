"""A prediction, or what is known from before, becomes an outcome by the policy of now."""

from jobs.results.cache import CachedResult
from jobs.settings import Settings
from ml.image.pipeline import ImagePipeline
from ml.pipelines import Decider, Prediction
from worker.handlers.outcomes import UNPLACED, DispositionPolicy

KIDNEYS = ("Normal", "Tumor")


def judge(classes: tuple[str, ...] = KIDNEYS, **policy: float) -> DispositionPolicy:
    return DispositionPolicy.of(Settings(**policy), ImagePipeline(), classes, "torch-fp32")  # type: ignore[arg-type]


def predicted(tumor: float, ood_score: float | None = 0.5, ood_reason: str | None = None) -> Prediction:
    label, confidence = ("Tumor", tumor) if tumor >= 0.5 else ("Normal", 1 - tumor)
    probabilities, statistics = {"Normal": 1 - tumor, "Tumor": tumor}, {"brightness": 90.0}
    seen = {"ood_score": ood_score, "ood_reason": ood_reason, "statistics": statistics}
    return Prediction("7", label, confidence, probabilities, **seen)  # type: ignore[arg-type]


def test_a_prediction_has_a_disposition() -> None:
    words = [judge().from_prediction(predicted(tumor)).disposition for tumor in (0.0, 0.3, 0.31, 0.69, 0.7, 1.0)]
    assert words == ["normal", "normal", "indeterminate", "indeterminate", "tumor", "tumor"]
    outcome = judge().from_prediction(predicted(0.5))
    assert outcome.reason is not None
    assert "0.30" in outcome.reason
    assert (outcome.ordinal, outcome.engine, outcome.cached) == (UNPLACED, "torch-fp32", False)
    assert (outcome.ood_score, outcome.statistics) == (0.5, {"brightness": 90.0})


def test_the_policy_of_the_settings_decides() -> None:
    strict = judge(indeterminate_above=0.1, indeterminate_below=0.9)
    assert strict.from_prediction(predicted(0.8)).disposition == "indeterminate"
    assert judge().from_prediction(predicted(0.8)).disposition == "tumor"


def test_an_out_of_distribution_scan_is_rejected_with_a_reason() -> None:
    outcome = judge().from_prediction(predicted(0.99, 2.3, "it is brighter than they are"))
    assert (outcome.disposition, outcome.label) == ("rejected", "Tumor")
    assert "2.3 times" in str(outcome.reason)
    assert "brighter" in str(outcome.reason)
    assert judge().from_prediction(predicted(0.99, None)).disposition == "tumor", "an older file cannot tell"


def test_a_scan_that_could_not_be_read_is_no_prediction() -> None:
    broken = Prediction("7", error_code="BAD_IMAGE", error_detail="This is no image.")
    outcome = judge().from_prediction(broken)
    assert outcome.error == {"code": "BAD_IMAGE", "detail": "This is no image.", "retryable": False}
    assert (outcome.disposition, outcome.statistics) == (None, None)


def test_a_cached_result_gets_the_current_policys_disposition() -> None:
    known = CachedResult("Tumor", 0.8, {"Normal": 0.2, "Tumor": 0.8}, 0.4)
    assert judge().from_cached(known).disposition == "tumor"
    outcome = judge(indeterminate_below=0.9).from_cached(known)
    assert (outcome.disposition, outcome.cached, outcome.ood_score) == ("indeterminate", True, 0.4)
    assert outcome.statistics is None, "it was counted when it was computed"


def test_a_cached_rejection_keeps_its_reason() -> None:
    known = CachedResult("Tumor", 0.8, {"Normal": 0.2, "Tumor": 0.8}, 2.3, "It is brighter than they are.")
    outcome = judge().from_cached(known)
    assert (outcome.disposition, outcome.reason) == ("rejected", "It is brighter than they are.")


def test_the_positive_class_does_not_depend_on_how_postgres_sorts_the_classes() -> None:
    """Neither is called Tumor, so the second one is positive; Postgres gives the shorter name first."""
    stone = judge(("Healthy", "Stone"))
    known = CachedResult("Stone", 0.9, {"Stone": 0.9, "Healthy": 0.1})
    assert stone.from_cached(known).disposition == "stone"
    assert list(stone.from_cached(known).probabilities or ()) == ["Healthy", "Stone"]


def test_the_models_positive_class_counts_and_not_its_name() -> None:
    """By the names alone Healthy was positive: a sure cancer was `healthy` between the limits of the other."""
    classes, sure = ("Cancer", "Healthy"), {"Cancer": 0.75, "Healthy": 0.25}
    policy = DispositionPolicy.of(
        Settings(indeterminate_above=0.1, indeterminate_below=0.7), ImagePipeline(), classes, "x", ["Cancer"]
    )
    assert policy.from_prediction(Prediction("1", "Cancer", 0.75, sure)).disposition == "cancer"
    low = {"Cancer": 0.2, "Healthy": 0.8}
    outcome = policy.from_prediction(Prediction("1", "Healthy", 0.8, low))
    assert outcome.disposition == "indeterminate"
    assert outcome.reason == "The network is unsure: Cancer 0.20 lies between 0.10 and 0.70."


def test_a_jobs_threshold_decides_new_and_cached_predictions_alike() -> None:
    values, decider = {"Normal": 0.8, "Tumor": 0.2}, Decider(("Tumor",), 0.15)
    policy = DispositionPolicy.of(Settings(), ImagePipeline(), KIDNEYS, "x", ["Tumor"], decider)
    new = policy.from_prediction(Prediction("7", "Normal", 0.8, values))
    cached = policy.from_cached(CachedResult("Normal", 0.8, values))
    for outcome in (new, cached):
        assert (outcome.label, outcome.confidence, outcome.disposition) == ("Tumor", 0.2, "indeterminate")


def test_of_several_positive_classes_the_likeliest_is_the_label_from_the_threshold_of_their_sum_on() -> None:
    values = {"Cyst": 0.2, "Normal": 0.45, "Stone": 0.05, "Tumor": 0.3}
    for threshold, label in ((0.5, "Tumor"), (0.51, "Normal")):
        decided = Decider(("Cyst", "Tumor"), threshold).decide(Prediction("1", "Stone", 0.05, values))
        assert (decided.label, decided.confidence) == (label, values[label])
    unknown = Prediction("1", "A", 0.9, {"A": 0.9, "B": 0.1})
    assert Decider(("Cyst",), 0.5).decide(unknown) == unknown
