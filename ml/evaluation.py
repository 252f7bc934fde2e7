"""Stage 4, evaluation: the trained network on scans that nothing of its making has seen; writes scores.json, the plots,
and the report."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from platform import python_version
from typing import Any

import numpy as np

from ml import crossvalidation, weights
from ml.errors import BadParams
from ml.events import Epoch, Evaluated, reporter
from ml.fitting import test_logits
from ml.lineage import Leaks, leaks
from ml.metrics import Judged, Scores, score
from ml.network import Model
from ml.run import Run, write_json
from ml.schedules import best_epoch
from ml.splits import group_scans
from ml.versions import installed

PACKAGES = ("torch", "torchvision", "openvino", "numpy", "scikit-learn", "scipy", "pillow", "pydicom", "safetensors")
FOLD_SHARE = 0.9  # of the stage's progress, where there are folds


def evaluation(state: Run) -> None:
    """See the module."""
    started, tell = time.perf_counter(), reporter(state.emit, "evaluation")
    model = state.model_of(state.config.training.trained_model_path)
    if state.params.folds:
        begin = 1 - FOLD_SHARE
        state.features(model, 0).on_images(_counting(state, lambda fraction: tell(begin * fraction)))
        judged = _judged(state, model)
        folds = crossvalidation.run(state, lambda fraction: tell(begin + FOLD_SHARE * fraction))
    else:
        state.features(model, 0).on_images(_counting(state, tell))
        judged, folds = _judged(state, model), None
    _remember(state)
    leaked = leaks(state.report, state.split, model.metadata.get("begun_lineage", ()))
    scores = score(judged).with_context(_counts(state), _patients_known(state), _as_counts(leaked), folds)
    state.device_seconds += time.perf_counter() - started
    metrics = scores.as_dict() | {"test_digest": _test_digest(state), "engines": model.metadata.get("engines", {})}
    write_json(state.config.evaluation.scores_path, metrics)
    _show(state, model, judged, scores, leaked)
    state.emit(Evaluated(metrics))


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


def _test_digest(state: Run) -> str:
    """Which scans were tested: two networks' scores are comparable where it is the same."""
    tested = sorted(f"{state.report.scans[scan].label}\0{state.report.scans[scan].sha256}" for scan in state.split.test)
    return hashlib.sha256("\n".join(tested).encode()).hexdigest()


# --- what people look at ---------------------------------------------------------------------------------------------


def _show(state: Run, model: Model, judged: Judged, scores: Scores, leaked: Leaks) -> None:
    from ml import plots
    from ml.report import ReportInputs, write_report

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
