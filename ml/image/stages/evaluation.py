"""Stage 4, evaluation: the trained network on test scans, which played no part in its training.

Writes scores.json, the plots and the report.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from platform import python_version
from typing import Any

import numpy as np

from ml.evaluation.by_patient import by_patient
from ml.evaluation.calibration import Calibration
from ml.evaluation.metrics import ModelOutputs, Scores, calibration_of, decide, finding, score
from ml.evaluation.operating import kept_scores
from ml.evaluation.out_of_fold import DoubtfulLabel, OutOfFold, doubtful_labels, summary
from ml.evaluation.subgroups import Subgroup, subgroups
from ml.image.dataset.grouping import group_scans
from ml.image.dataset.lineage import Leaks, leaks
from ml.image.dataset.splits import LOCKED
from ml.image.dataset.traits import subgroup_values
from ml.image.learning.schedules import best_epoch
from ml.image.networks import weights
from ml.image.networks.network import Model
from ml.image.networks.ood import OodDetector
from ml.image.pixels.statistics import input_statistics
from ml.image.serving.drift_reference import drift_reference
from ml.image.stages import champion
from ml.image.stages.run import Run, write_json
from ml.image.stages.training import choosing_scans, scan_descriptors, scan_logits
from ml.runtime.errors import BadParams
from ml.runtime.events import Epoch, Evaluated
from ml.runtime.versions import installed_versions
from ml.spec.pooling import Pooling

PACKAGES = ("torch", "torchvision", "openvino", "numpy", "scikit-learn", "scipy", "pillow", "pydicom", "safetensors")


def evaluation(run: Run) -> None:
    """Run the stage; see the module's docstring."""
    started, outlook = time.perf_counter(), run.outlook
    model = run.load_model(run.config.training.trained_model_path)
    run.features(model, 0).on_images(_count_images(run, model, outlook.begin("test")))
    outputs, folds = _model_outputs(run, model), _folds(run, model)
    _cache_features(run)
    outlook.begin("scores")
    leaked = leaks(run.report, run.split, model.metadata.get("begun_lineage", ()))
    context = _counts(run), _patients_known(run), asdict(leaked), folds, _subgroups(run, outputs)
    scores = score(outputs).with_context(*context)
    comparison = champion.compare_with_champion(run, model, outputs, outlook.begin("champion"))
    outlook.begin("report")
    run.device_seconds += time.perf_counter() - started
    metrics = scores.as_dict() | {
        "test_digest": run.report.digest_of(run.split.test),
        "engines": model.metadata.get("engines", {}),
        "origins": model.metadata.get("origins", []),
        "operating_point": model.metadata.get("operating_point"),
        "pooling": Pooling.of(model.metadata).as_dict(),
        "by_patient": _by_patient(model, outputs),
    }
    write_json(run.config.evaluation.scores_path, metrics)
    _write_report(run, model, outputs, scores, leaked)
    reference = _reference(run, model, outputs)
    chosen = choosing_scans(run, lambda _: outputs.validation_logits)
    kept = kept_scores(outputs, calibration_of(outputs), chosen)
    run.emit(Evaluated(metrics, reference, comparison.as_dict() if comparison else None, kept))


def _own(model: Model) -> Calibration | None:
    """The model's own calibration, which its predictions use."""
    return Calibration.from_metadata(model.metadata) if "calibration" in model.metadata else None


def _folds(run: Run, model: Model) -> dict[str, Any] | None:
    """What the folds of the training tell, if there were any; the labels to doubt become an artifact."""
    path, report = _doubtful_path(run), run.report
    path.unlink(missing_ok=True)  # of an earlier run
    if not run.params.folds:
        return None
    found = run.out_of_fold = run.out_of_fold or _out_of_fold(run)
    write_json(path, [asdict(one) | {"path": report.scans[one.scan].path} for one in _doubtful(run, model)])
    groups, labels = group_scans([report.scans[scan] for scan in found.scans]), report.labels[found.scans]
    own = Calibration.from_metadata(model.metadata)
    told = summary(found, labels, groups, model.classes, own, run.params.seed, model.positive)
    return told | {"ensemble": run.params.ensemble == "folds"}


def _out_of_fold(run: Run) -> OutOfFold:
    """What the training wrote, for an evaluation that runs alone."""
    try:
        content = json.loads(run.config.training.out_of_fold_path.read_text(encoding="utf-8"))
        return OutOfFold.from_dict(content)
    except (OSError, ValueError, KeyError) as error:
        raise BadParams("folds: the training had none; run the stage training again.") from error


def _doubtful(run: Run, model: Model) -> list[DoubtfulLabel]:
    found = run.out_of_fold
    if found is None:
        return []
    temperature = Calibration.from_metadata(model.metadata).temperature
    return doubtful_labels(found, run.report.labels[found.scans], model.classes, temperature)


def _doubtful_path(run: Run) -> Path:
    return run.config.evaluation.root_dir / "doubtful_labels.json"


def _by_patient(model: Model, outputs: ModelOutputs) -> dict[str, Any]:
    """Figures of the test patients, by the calibration and the pooling that the model serves with."""
    probabilities = calibration_of(outputs).probabilities(outputs.test_logits)
    groups = np.arange(len(outputs.test_labels)) if outputs.groups is None else outputs.groups
    positive, pooling = outputs.positive or (), Pooling.of(model.metadata)
    return by_patient(model.classes, outputs.test_labels, probabilities, groups, positive, pooling, outputs.seed)


def _cache_features(run: Run) -> None:
    """Store features in the cache; not those of a fine-tuned backbone, which no other training can use."""
    tuned = any(epoch.phase == "fine_tune" for epoch in run.epochs)
    for top, features in run.features_by_top.items():
        if top or not tuned:
            features.store_in_cache()


def _model_outputs(run: Run, model: Model) -> ModelOutputs:
    report, split = run.report, run.split
    scans = np.concatenate([split.test, split.validation])
    logits = scan_logits(run, model, scans)
    groups = group_scans([report.scans[scan] for scan in split.test])
    tested = len(split.test)
    return ModelOutputs(
        model.classes, report.labels[split.test], logits[:tested],
        report.labels[split.validation], logits[tested:], groups, run.params.seed, model.positive, _own(model),
    )  # fmt: skip


def _reference(run: Run, model: Model, outputs: ModelOutputs) -> dict[str, Any]:
    """The reference for drift, on the engine that training uses; an admitted engine's predictions hardly differ."""
    scans = run.split.test
    calibration, ood = Calibration.from_metadata(model.metadata), OodDetector.from_metadata(model.metadata)
    statistics = [input_statistics(run.pixels[scan]) for scan in scans]
    decided = calibration.decide(outputs.test_logits, outputs.findings)
    confidences = calibration.probabilities(outputs.test_logits)[np.arange(len(decided)), decided]
    rejected = int((ood.scores(scan_descriptors(run, model, scans), statistics) > 1).sum()) if ood else None
    labels = [model.classes[index] for index in decided]
    groups = np.arange(len(scans)) if outputs.groups is None else outputs.groups
    return drift_reference(statistics, confidences.tolist(), labels, model.classes, rejected, groups)


def _count_images(run: Run, model: Model, on_progress: Callable[[float], None]) -> Callable[[int], None]:
    total = run.features(model, 0).missing(np.concatenate([run.split.test, run.split.validation]))
    done = 0

    def count(images: int) -> None:
        nonlocal done
        done += images
        on_progress(min(done / total, 1.0))

    return count


# --- context of the scores -------------------------------------------------------------------------------------------


def _counts(run: Run) -> dict[str, int]:
    split = run.split
    return {"train": len(split.train), "validation": len(split.validation), "test": len(split.test)}


def _subgroups(run: Run, outputs: ModelOutputs) -> list[Subgroup]:
    values = subgroup_values(run.report.scans)
    calibration = calibration_of(outputs)
    decisions = finding(decide(outputs, calibration), outputs, calibration)
    return subgroups(decisions, [values[scan] for scan in run.split.test])


def _patients_known(run: Run) -> bool:
    return all(scan.patient for scan in run.report.scans)


# --- report ----------------------------------------------------------------------------------------------------------


def _write_report(run: Run, model: Model, outputs: ModelOutputs, scores: Scores, leaked: Leaks) -> None:
    from ml.reporting import plots
    from ml.reporting.patients import patient_rows
    from ml.reporting.report import ReportInputs, write_report

    epochs, root, params = run.epochs or _history(run), run.config.evaluation.root_dir, run.params
    best = best_epoch(params, epochs)
    for old in root.glob("*.png"):  # of an earlier run, which may have had more of them
        old.unlink()
    tested = run.split.test
    all_plots = plots.all_plots(outputs, scores, epochs, best, lambda chosen: run.pixels[tested[chosen]])
    for plot in all_plots:
        plot.save(root)
    inputs = ReportInputs(
        scores=scores,
        plots=all_plots,
        made_at=datetime.now(UTC),
        parameters=params.model_dump(mode="json"),
        dataset={
            "images": run.report.images,
            "classes": run.report.classes,
            "warnings": list(run.report.warnings),
        },
        dataset_digest=run.report.digest,
        network=f"{model.architecture}, head {model.head}",
        engine=str(model.metadata.get("engine", "")),
        device=str(model.metadata.get("device", "")),
        seed=params.seed,
        epochs=len(epochs),
        training_seconds=sum(epoch.seconds for epoch in epochs),
        best_epoch=best,
        weights_sha256=(model.metadata.get("weights") or {}).get("sha256"),
        model_sha256=weights.sha256(run.config.training.trained_model_path),
        revision=run.environment.revision,
        versions={"python": python_version(), **installed_versions(PACKAGES)},
        leak_reasons=leaked.reasons(),
        split_notes=_split_notes(run),
        operating_point=model.metadata.get("operating_point"),
        doubtful_labels=_doubtful(run, model),
        patients=patient_rows(outputs, calibration_of(outputs), Pooling.of(model.metadata)),
        by_patient=_by_patient(model, outputs),
        head=run.environment.titles,
    )
    write_report(inputs, root / "report.html", root / "report.pdf")


def _split_notes(run: Run) -> list[str]:
    params, groups = run.params, len(np.unique(group_scans(run.report.scans)))
    if any(scan.side == LOCKED for scan in run.report.scans):
        left_out = run.report.images - sum(map(len, (run.split.train, run.split.validation, run.split.test)))
        return [
            "The test scans are a dataset of their own, which was locked for testing: it decides nothing else.",
            f"{left_out} scans are on no side: they belong together with a test scan, or are blank.",
        ]
    if params.split == "folders":
        return [
            f"The {run.report.images} scans stay on the sides that the dataset's folders or patients.csv say: "
            "whether a patient is on one side only was its maker's choice."
        ]
    return [
        f"Of {run.report.images} scans, {groups} groups were drawn by lot with seed {params.seed}, by class: "
        f"{params.test_size:g} for the test, {params.validation_size:g} for validation.",
        "Scans of one patient or study, copies, and near-duplicates are one group and stay together.",
    ]


def _history(run: Run) -> list[Epoch]:
    try:
        content: list[dict[str, Any]] = json.loads(run.config.training.history_path.read_text(encoding="utf-8"))
        return [Epoch(**fields) for fields in content]
    except (OSError, ValueError) as error:
        raise BadParams("There is no training yet: run the stage training first.") from error


def artifacts(run: Run) -> dict[str, str]:
    """Name → path of the files that the run writes, without the model file."""
    config, root = run.config, run.config.evaluation.root_dir
    paths = [config.evaluation.scores_path, config.training.history_path]
    paths += [config.data_ingestion.manifest_path, config.data_ingestion.report_path]
    paths += [config.training.out_of_fold_path] if run.params.folds else []
    paths += [_doubtful_path(run), root / "report.html", root / "report.pdf", *sorted(root.glob("*.png"))]
    return {path.name: str(path) for path in paths if path.exists()}
