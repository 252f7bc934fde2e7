"""Stage 4, evaluation: the trained network on scans that nothing of its making has seen; writes scores.json, the plots,
and the report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from platform import python_version
from typing import Any

import numpy as np

from ml.evaluation.calibration import Calibration
from ml.evaluation.metrics import Judged, Scores, score
from ml.image.dataset.lineage import Leaks, leaks
from ml.image.dataset.splits import group_scans
from ml.image.learning.schedules import best_epoch
from ml.image.networks import weights
from ml.image.networks.network import Model
from ml.image.networks.ood import Outliers
from ml.image.pixels.statistics import input_statistics
from ml.image.serving.drift_reference import reference_of
from ml.image.stages import champion, crossvalidation
from ml.image.stages.run import Run, write_json
from ml.image.stages.training import descriptors, test_logits
from ml.runtime.errors import BadParams
from ml.runtime.events import Epoch, Evaluated, reporter
from ml.runtime.versions import installed

PACKAGES = ("torch", "torchvision", "openvino", "numpy", "scikit-learn", "scipy", "pillow", "pydicom", "safetensors")
FOLD_SHARE = 0.9  # of the new network's share of the stage's progress, where there are folds
CHAMPION_SHARE = 0.5  # of the stage's progress, where a champion is scored too


def evaluation(state: Run) -> None:
    """See the module."""
    started, tell = time.perf_counter(), reporter(state.emit, "evaluation")
    own = 1.0 - (CHAMPION_SHARE if state.around.champion else 0.0)
    model = state.model_of(state.config.training.trained_model_path)
    judged, folds = _tested(state, model, lambda fraction: tell(own * fraction))
    _remember(state)
    leaked = leaks(state.report, state.split, model.metadata.get("begun_lineage", ()))
    scores = score(judged).with_context(_counts(state), _patients_known(state), _as_counts(leaked), folds)
    beside = champion.compare(state, model, judged, lambda fraction: tell(own + (1 - own) * fraction))
    state.device_seconds += time.perf_counter() - started
    metrics = scores.as_dict() | {
        "test_digest": state.report.digest_of(state.split.test),
        "engines": model.metadata.get("engines", {}),
    }
    write_json(state.config.evaluation.scores_path, metrics)
    _show(state, model, judged, scores, leaked)
    reference = _reference(state, model, judged)
    state.emit(Evaluated(metrics, reference, beside.as_dict() if beside else None))


def _tested(state: Run, model: Model, tell: Callable[[float], None]) -> tuple[Judged, dict[str, Any] | None]:
    """The network's answers to the test scans, and the folds' figures, if they are wanted."""
    begin = 1 - FOLD_SHARE if state.params.folds else 1.0
    state.features(model, 0).on_images(_counting(state, lambda fraction: tell(begin * fraction)))
    judged = _judged(state, model)
    if not state.params.folds:
        return judged, None
    return judged, crossvalidation.run(state, lambda fraction: tell(begin + FOLD_SHARE * fraction))


def _remember(state: Run) -> None:
    """Leave features in the cache, but for those of a backbone whose top has learned: no other training has it."""
    tuned = any(epoch.phase == "fine_tune" for epoch in state.epochs)
    for top, features in state.opened.items():
        if top or not tuned:
            features.remember()


def _judged(state: Run, model: Model) -> Judged:
    report, split = state.report, state.split
    scans = np.concatenate([split.test, split.validation])
    logits = test_logits(state, model, scans)
    groups = group_scans([report.scans[scan] for scan in split.test])
    tested = len(split.test)
    return Judged(
        model.classes, report.labels[split.test], logits[:tested],
        report.labels[split.validation], logits[tested:], groups, state.params.seed,
    )  # fmt: skip


def _reference(state: Run, model: Model, judged: Judged) -> dict[str, Any]:
    """What the test scans are like, by the engine that training uses: predictions of an admitted one hardly differ."""
    scans, calibration, outliers = state.split.test, Calibration.of(model.metadata), Outliers.of(model.metadata)
    statistics = [input_statistics(state.pixels[scan]) for scan in scans]
    decided = calibration.decide(judged.test_logits, judged.positive)
    confidences = calibration.probabilities(judged.test_logits)[np.arange(len(decided)), decided]
    rejected = int((outliers.scores(descriptors(state, model, scans), statistics) > 1).sum()) if outliers else None
    labels = [model.classes[place] for place in decided]
    return reference_of(statistics, confidences.tolist(), labels, model.classes, rejected)


def _counting(state: Run, tell: Callable[[float], None]) -> Callable[[int], None]:
    total, done = len(state.split.test) + len(state.split.validation), 0

    def count(images: int) -> None:
        nonlocal done
        done += images
        tell(min(done / total, 1.0))

    return count


# --- what the answers alone cannot tell ------------------------------------------------------------------------------


def _counts(state: Run) -> dict[str, int]:
    split = state.split
    return {"train": len(split.train), "validation": len(split.validation), "test": len(split.test)}


def _patients_known(state: Run) -> bool:
    return all(scan.patient for scan in state.report.scans)


def _as_counts(found: Leaks) -> dict[str, int]:
    return {
        "patients": found.patients,
        "duplicates": found.duplicates,
        "near_duplicates": found.near_duplicates,
    }


# --- what people look at ---------------------------------------------------------------------------------------------


def _show(state: Run, model: Model, judged: Judged, scores: Scores, leaked: Leaks) -> None:
    from ml.reporting import plots
    from ml.reporting.report import ReportInputs, write_report

    epochs, root, params = state.epochs or _history(state), state.config.evaluation.root_dir, state.params
    best = best_epoch(params, epochs)
    for old in root.glob("*.png"):  # of an earlier run: this one may have fewer
        old.unlink()
    drawn = plots.all_plots(judged, scores, epochs, best, lambda places: state.pixels[state.split.test[places]])
    for plot in drawn:
        plot.save(root)
    inputs = ReportInputs(
        scores=scores,
        plots=drawn,
        made_at=datetime.now(UTC),
        parameters=params.model_dump(mode="json"),
        dataset={
            "images": state.report.images,
            "classes": state.report.classes,
            "warnings": list(state.report.warnings),
        },
        dataset_digest=state.report.digest,
        network=f"{model.architecture}, head {model.head}",
        engine=str(model.metadata.get("engine", "")),
        device=str(model.metadata.get("device", "")),
        seed=params.seed,
        epochs=len(epochs),
        training_seconds=sum(epoch.seconds for epoch in epochs),
        best_epoch=best,
        weights_sha256=(model.metadata.get("weights") or {}).get("sha256"),
        model_sha256=weights.sha256(state.config.training.trained_model_path),
        revision=state.around.revision,
        versions={"python": python_version(), **installed(PACKAGES)},
        leak_reasons=leaked.reasons(),
        split_notes=_split_notes(state),
    )
    write_report(inputs, root / "report.html", root / "report.pdf")


def _split_notes(state: Run) -> list[str]:
    params, groups = state.params, len(np.unique(group_scans(state.report.scans)))
    return [
        f"Of {state.report.images} scans, {groups} groups were drawn by lot with seed {params.seed}, by class: "
        f"{params.test_size:g} for the test, {params.validation_size:g} for validation.",
        "Scans of one patient, copies, and near-duplicates are one group and stay together.",
    ]


def _history(state: Run) -> list[Epoch]:
    try:
        content: list[dict[str, Any]] = json.loads(state.config.training.history_path.read_text(encoding="utf-8"))
        return [Epoch(**fields) for fields in content]
    except (OSError, ValueError) as error:
        raise BadParams("There is no training yet: run the stage training first.") from error


def artifacts(state: Run) -> dict[str, str]:
    """Name → path of what the run leaves, but for the network."""
    config, root = state.config, state.config.evaluation.root_dir
    paths = [config.evaluation.scores_path, config.training.history_path]
    paths += [config.data_ingestion.manifest_path, config.data_ingestion.report_path]
    paths += [root / "report.html", root / "report.pdf", *sorted(root.glob("*.png"))]
    return {path.name: str(path) for path in paths if path.exists()}
