"""Model cards (Mitchell et al. 2019, "Model Cards for Model Reporting") as JSON.

A card has no file names, names of datasets or patient data. Unknown values are null.
`api.views.model_card_markdown` renders it as Markdown.
"""

import datetime as dt
from typing import Any

from jobs.models.cards import ModelCardData
from jobs.tables import Json, ModelEvaluation, ModelVersion, Promotion
from ml.spec.operating_point import sentence
from ml.spec.pipeline import Card
from ml.spec.positive_class import of_metrics
from ml.spec.registry import spec_of

FIGURES = ("accuracy", "precision", "recall", "specificity", "f1", "roc_auc", "pr_auc")
SHARED_FIGURES = ("f1", "recall", "specificity", "roc_auc")
LEAKS = {
    "patients": "test scans are of patients of whom others were learnt from",
    "studies": "test scans are of studies of which others were learnt from",
    "duplicates": "test scans are copies of scans that were learnt from",
    "near_duplicates": "test scans look almost the same as scans that were learnt from",
}
CALIBRATION = ("calibration", "temperature", "threshold", "positive", "ece", "ece_before", "ece_chance")
ETHICS = [
    "It was trained on scans of patients. Whether they may be used so is for whoever uploaded them to ensure.",
    "The weights' file carries hashes of the scans and pseudonyms of the patients that it has learnt from, so that "
    "leaks are found: pass it on as you may pass on pseudonymous data.",
]


def build_card(story: ModelCardData) -> Json:
    """The model card of a version."""
    version, metrics = story.version, story.version.metrics
    declared = spec_of(version.pipeline).card
    return {
        "title": f"{declared.title}, version {version.version}",
        "details": _details(version, declared, story.base),
        "intended_use": _intended_use(version, declared),
        "factors": list(declared.factors),
        "training_data": _training_data(story),
        "evaluation": _evaluation(version, story.evaluations),
        "calibration": {name: metrics.get(name) for name in CALIBRATION} | {"positive": _positive(metrics)},
        "operating_point": _operating_point(story),
        "limits": _limits(version),
        "engines": metrics.get("engines") or {},
        "gate": version.gate,
        "promotions": [_promotion(row) for row in story.promotions],
        "ethical_considerations": [*ETHICS, *declared.ethics],
        "reproduction": _reproduction(version),
    }


def _details(version: ModelVersion, declared: Card, base: ModelVersion | None) -> Json:
    return {
        "version": str(version.version),
        "champion": version.champion,
        "made_at": _time(version.created_at),
        "promoted_at": _time(version.promoted_at),
        "pipeline": version.pipeline,
        "task": version.task,
        "classes": version.classes,
        **declared.details(version.params),
        "begun_with": f"version {base.version}" if base else version.params.get("weights"),
        "weights_sha256": version.weights_sha256,
        "code_revision": version.code_revision,
        "environment": version.environment,
        "params": version.params,
    }


def _intended_use(version: ModelVersion, declared: Card) -> Json:
    return {
        "use": declared.use.format(classes=_listed(version.classes)),
        "users": "Radiologists, radiographers, and engineers who build and check such pipelines.",
        "not_for": [
            "Not for diagnosis without a radiologist: it is no medical device, and nobody has approved it as one.",
            "Not for excluding disease: what it has not learnt, it cannot find.",
            *declared.not_for,
        ],
    }


def _training_data(story: ModelCardData) -> Json:
    dataset, metrics = story.dataset, story.version.metrics
    return {
        "digest": story.version.dataset_digest,
        "classes": dataset.classes if dataset else None,
        "split": metrics.get("counts"),
        "patients_known": metrics.get("patients_known"),
        "warnings": [str(text) for text in ((dataset.report or {}).get("warnings", []) if dataset else [])],
    }


def _evaluation(version: ModelVersion, evaluations: Any) -> Json:
    metrics = version.metrics
    return {
        "test_digest": metrics.get("test_digest"),
        "scans": metrics.get("held_out"),
        "independent_groups": metrics.get("independent"),
        "independent_per_class": metrics.get("independent_per_class"),
        "reported": version.gate.get("reported"),
        "warning": _warning(metrics),
        "positive": _positive(metrics),
        "figures": {name: _figure(metrics, name) for name in FIGURES if metrics.get(name) is not None},
        "by_patient": _by_patient(metrics),
        "per_class": metrics.get("per_class") or {},
        "sensitivity_at_specificity": metrics.get("sensitivity_at_specificity") or {},
        "confusion_matrix": metrics.get("confusion_matrix"),
        "classes": metrics.get("classes") or version.classes,
        "subgroups": metrics.get("subgroups") or [],
        "cross_validation": _cross_validation(metrics.get("cross_validation")),
        "other_test_sets": [
            _other_test_set(row) for row in evaluations if row.test_digest != metrics.get("test_digest")
        ],
    }


def _by_patient(metrics: Json) -> Json | None:
    """The figures of the patients' answers, and how many patients there are; null where each scan is a patient."""
    found = metrics.get("by_patient")
    if not found or found["patients"] == metrics.get("held_out"):
        return None
    figures = {name: _figure(found, name) for name in FIGURES if found.get(name) is not None}
    return {"patients": found["patients"], "figures": figures, "pooling": found["pooling"]["reason"]}


def _positive(metrics: Json) -> str | None:
    """The positive classes as one text; null where there is none."""
    return " or ".join(of_metrics(metrics) or ()) or None


def _operating_point(story: ModelCardData) -> Json | None:
    point = story.version.metrics.get("operating_point")
    changes = [{"at": _time(row.at), "reason": row.reason, "point": row.point} for row in story.point_changes]
    return point and {**point, "sentence": sentence(point), "history": changes}


def _figure(metrics: Json, name: str) -> Json:
    low, high = (metrics.get("intervals") or {}).get(name) or (None, None)
    method = (metrics.get("interval_methods") or {}).get(name)
    return {"value": metrics[name], "low": low, "high": high, "method": method}


def _cross_validation(scores: Json | None) -> Json | None:
    if not scores:
        return None
    whole = scores.get("pooled")  # versions of earlier releases have none
    figures = whole and {name: _figure(whole, name) for name in FIGURES if whole.get(name) is not None}
    pooled = whole and {"scans": whole["held_out"], "independent_groups": whole["independent"], "figures": figures}
    return {"folds": len(scores["folds"]), "mean": scores["mean"], "std": scores["std"], "pooled": pooled}


def _other_test_set(row: ModelEvaluation) -> Json:
    figures = {name: row.metrics.get(name) for name in SHARED_FIGURES}
    return {"test_digest": row.test_digest, "scans": row.scans, "at": _time(row.created_at), **figures}


def _limits(version: ModelVersion) -> Json:
    leaks = version.metrics.get("leaks") or {}
    return {
        "leaks": [f"{leaks[kind]} {words}." for kind, words in LEAKS.items() if leaks.get(kind)],
        "subgroups": [
            f"{one['trait']} {one['value']}: {one['warning']}"
            for one in version.metrics.get("subgroups") or ()
            if one["warning"]
        ],
        "patients": _patients(version.metrics.get("patients_known")),
        "out_of_distribution": _out_of_distribution(version.reference),
        "of_inputs": list(spec_of(version.pipeline).card.limits(version.metrics)),
        "dispositions": "A probability between the two limits of the server's settings is called indeterminate: no "
        "answer is better than a guess.",
    }


def _patients(known: bool | None) -> str:
    if known:
        return "The patients are known, and each is on one side of the split only."
    return "The patients are not all known: one patient's scans may lie on both sides, which makes figures too good."


def _warning(metrics: Json) -> str | None:
    """What stands before all figures."""
    if metrics.get("patients_known") is not False:
        return None
    return "WARNING: the figures may be too good."


def _out_of_distribution(reference: Json | None) -> str:
    if reference is None or reference.get("rejected") is None:
        return "This version carries nothing to tell a scan unlike its training scans by: it answers to any picture."
    rejected, scans = reference["rejected"], reference.get("scans", 0)
    return (
        "A scan that is unlike the training scans is rejected. That is a distance in what the network sees, and no "
        f"proof: a picture of something else may pass. Of its own {scans} test scans, {rejected} would be rejected."
    )


def _promotion(row: Promotion) -> Json:
    why = {"how": row.how, "reason": row.reason, "verdict": row.verdict}
    return {"at": _time(row.at), "replaced": None if row.replaced is None else str(row.replaced), **why}


def _reproduction(version: ModelVersion) -> Json:
    return {
        "job_id": str(version.job_id),
        "seed": version.params.get("seed"),
        "weights": f"GET /models/{version.version}/weights",
        "again": f"POST /jobs/{version.job_id}/reproduce",
    }


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _time(at: dt.datetime | None) -> str | None:
    return None if at is None else at.astimezone(dt.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
