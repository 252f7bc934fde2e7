"""Stage 3, training: train the network (and the folds), calibrate it, fit its OOD detector, try its engines.

Writes model.safetensors and history.json; with folds also out_of_fold.json.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, replace

import numpy as np
import torch

from ml.evaluation.by_patient import choose_pooling
from ml.evaluation.calibration import Calibration
from ml.evaluation.operating import Choosing, calibrate_at, require_choice
from ml.image.dataset.grouping import group_scans
from ml.image.dataset.lineage import lineage
from ml.image.engines.admission import CANDIDATES, RANGE_SCANS, Admission, admit, evenly, most_telling
from ml.image.engines.backends import default_dtype, training_precision
from ml.image.engines.features import repetitions
from ml.image.engines.hardware import device_name
from ml.image.learning.checkpoints import CheckpointWriter, Origin, load_resume_checkpoint
from ml.image.learning.ddp_worker import training_group
from ml.image.learning.train import ResumePoint, TrainConfig, logits_of, train
from ml.image.networks import network
from ml.image.networks.feature_descriptor import feature_descriptors
from ml.image.networks.network import Model
from ml.image.networks.ood import OodDetector, UnseenDescriptors, fit_detector
from ml.image.pixels.statistics import input_statistics
from ml.image.stages.costs import costs
from ml.image.stages.crossvalidation import cross_validate, folds_of, take_mean_head
from ml.image.stages.run import Run, train_data, write_json
from ml.runtime.events import Resumed, Steps
from ml.runtime.process_group import ProcessGroup
from ml.spec.pooling import Pooling

STEPS_EVERY = 0.5  # seconds between two `steps` events
OOD_SCANS = 512  # scans of a side, at most, that the OOD detector is fitted to; more take time and change little
OOD_SCANS_ANEW = 64  # training scans, at most, whose features are computed for it alone; see `_ood_scans`


def training(run: Run) -> None:
    """Run the stage; see the module's docstring."""
    started = time.perf_counter()
    model = _with_positive(run, run.load_model(run.config.prepare_base_model.updated_base_model_path))
    run.require_fitting_params()
    choosing = (run.split.train, run.split.validation) if run.params.folds else (run.split.validation,)
    require_choice(run.params.operate_at, run.report.labels[np.concatenate(choosing)], model.findings)
    if not run.in_one_process:
        network.own_memory(model)
    outlook = run.outlook
    outlook.expect(costs(run.params, run.split, run.environment.champion is not None))
    if run.params.folds:
        folds_of(run)  # refuses too few patients before anything is trained
    on_progress = outlook.begin("learn")
    with _process_group(run, model) as group:
        _train(run, model, group, on_progress)
    if group.size > 1:  # features are tied to the process group
        run.features_by_top.clear()
    _cross_validate(run, model, outlook.begin("folds"))
    outlook.begin("fit")
    _drop_stale_features(run)
    chosen, ood = choosing_scans(run, lambda scans: scan_logits(run, model, scans)), _fit_ood(run, model)
    calibration, point = calibrate_at(run.params.operate_at, chosen, model.findings)
    admission = _admit(run, model, calibration, ood, outlook.begin("admit"))
    outlook.begin("save")
    metadata = _training_metadata(run, model, calibration) | admission.as_dict()
    metadata["operating_point"] = point and point.as_dict()
    metadata["pooling"] = _choose_pooling(run, model, calibration, chosen).as_dict()
    run.model = replace(model, metadata={**model.metadata, **metadata})
    run.device_seconds += time.perf_counter() - started
    network.save(run.model, run.config.training.trained_model_path)
    write_json(run.config.training.history_path, [asdict(epoch) for epoch in run.epochs])


def _process_group(run: Run, model: Model) -> AbstractContextManager[ProcessGroup]:
    """This process alone, or with DDP workers on the devices of this machine."""
    return training_group(
        run.params, model,
        pixels=run.config.data_ingestion.pixels_path, labels=run.report.labels, split=run.split,
        positive=tuple(model.findings), resume=run.environment.checkpoints.resume,
        folder=run.config.data_ingestion.root_dir,
    )  # fmt: skip


def _train(run: Run, model: Model, group: ProcessGroup, on_progress: Callable[[float], None]) -> None:
    data = train_data(run, model, run.split, group)
    origin = Origin.from_training(run.params, run.report, model.network, data.features(0).engine.name)
    writer = CheckpointWriter(run.environment.checkpoints, origin, run.epochs, run.emit)
    start = _resume_point(run, origin)
    steps = _StepEvents(run)
    config = TrainConfig(model, run.params, on_progress, steps, writer, start, group)
    for epoch in train(config, data):
        steps.flush()
        run.epochs.append(epoch)
        run.emit(epoch)


def _cross_validate(run: Run, model: Model, on_progress: Callable[[float], None]) -> None:
    """Train the folds, if the parameters ask for them; they see the backbone as it was before any fine-tuning."""
    if not run.params.folds:
        return
    run.out_of_fold, heads = cross_validate(run, on_progress)
    write_json(run.config.training.out_of_fold_path, run.out_of_fold.as_dict())
    if heads:
        take_mean_head(model, heads)


def head_forward(model: Model) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from features to logits, float32 [n, classes]."""
    _, above = model.cut()
    above.eval()

    @torch.inference_mode()
    def logits(features: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = above(features)
        return result

    return logits


def scan_logits(run: Run, model: Model, scans: np.ndarray) -> np.ndarray:
    """Logits of scans on the engine that training uses: float32 [len(scans), classes].

    Predictions may use another engine, which was admitted because its outputs are nearly the same.
    """
    return logits_of(head_forward(model), run.features(model, 0), scans).numpy()


def scan_descriptors(run: Run, model: Model, scans: np.ndarray) -> np.ndarray:
    """Feature descriptors of scans, float32 [len(scans), maps].

    They are computed in batches, since the features below them can be fifty times as large.
    """
    features = run.features(model, 0)
    features.keep(scans)
    parts = (scans[start : start + 512] for start in range(0, len(scans), 512))
    return np.concatenate([feature_descriptors(model, features.plain(part)) for part in parts])


def _with_positive(run: Run, model: Model) -> Model:
    return replace(model, metadata={**model.metadata, "positive": list(run.positive)})


def choosing_scans(run: Run, logits: Callable[[np.ndarray], np.ndarray]) -> Choosing:
    """The scans that temperature and threshold are chosen on; `logits` of validation scans are asked for by index."""
    found = run.out_of_fold
    scans = run.split.validation if found is None else found.scans
    groups, labels = group_scans([run.report.scans[scan] for scan in scans]), run.report.labels[scans]
    if found is None:
        return Choosing(labels, logits(scans), groups)
    return Choosing(labels, found.logits, groups, "out_of_fold")


def _choose_pooling(run: Run, model: Model, calibration: Calibration, chosen: Choosing) -> Pooling:
    """How the slices of a study become one answer, by the patients that choose."""
    probabilities, threshold = calibration.probabilities(chosen.logits), calibration.threshold
    given = chosen.labels, probabilities, chosen.groups, model.findings
    return choose_pooling(*given, run.params.operate_at, threshold or 0.5, chosen.chosen_on)


def _admit(
    run: Run, model: Model, calibration: Calibration, ood: OodDetector | None, on_progress: Callable[[float], None]
) -> Admission:
    """Try engines on some of the validation scans; int8 gets its ranges from training scans.

    A test scan chooses nothing. Without validation scans the tried ones are training scans.
    """
    known = run.split.validation if len(run.split.validation) else run.split.train
    candidates, seen = evenly(known, CANDIDATES), evenly(run.split.train, RANGE_SCANS)
    tried = candidates[most_telling(scan_logits(run, model, candidates), calibration, model.findings)]
    fitted_in = default_dtype(training_precision(run.params))
    scans = run.pixels[tried], run.report.labels[tried], run.pixels[seen]
    return admit(model, calibration, *scans, ood, fitted_in, on_progress)


def _fit_ood(run: Run, model: Model) -> OodDetector | None:
    """The OOD detector for this network; see ml.image.networks.ood."""
    groups = group_scans(run.report.scans)  # of all scans: two in the sample may be linked by one outside of it
    scans, validation = _ood_scans(run, groups), evenly(run.split.validation, OOD_SCANS)
    statistics = [input_statistics(run.pixels[scan]) for scan in scans]
    unseen = UnseenDescriptors(scan_descriptors(run, model, validation), groups[validation])
    return fit_detector(scan_descriptors(run, model, scans), statistics, groups[scans], unseen)


def _ood_scans(run: Run, groups: np.ndarray) -> np.ndarray:
    """The training scans that the OOD detector is fitted to.

    If training has seen them augmented, or has changed the backbone since, their features are still to be computed.
    Then they are few, of as many `groups` as possible: on phantoms, detectors fitted to 48 to 128 of 260 scans reject
    as many OOD pictures as one fitted to all, and no more proper ones. Fitted to the augmented scans it would reject
    less: of pictures in another window 10 % instead of all by the descriptors of resnet18, of MR 40 % by vgg16's.
    """
    params, train = run.params, run.split.train
    if params.augmentation is False and not params.fine_tune_epochs:
        return evenly(train, OOD_SCANS)
    rank, chosen = repetitions(groups[train]), train[:0]
    for number in range(int(rank.max()) + 1):
        chosen = np.append(chosen, evenly(train[rank == number], OOD_SCANS_ANEW - len(chosen)))
    return np.sort(chosen)


def _training_metadata(run: Run, model: Model, calibration: Calibration) -> dict[str, object]:
    """What the model file says about the training."""
    seen = lineage(run.report, [*run.split.train, *run.split.validation])
    return {
        "params": run.params.model_dump(mode="json"),  # if stages run alone, they may have different parameters
        "lineage": sorted({*model.metadata.get("begun_lineage", ()), *seen}),
        "origins": _origins(run),
        "calibration": asdict(calibration),
        "precision": training_precision(run.params),
        "engine": run.features(model, 0).engine.name,
        "device": device_name(),
    }


def _origins(run: Run) -> list[dict[str, str | None]]:
    """Each kind of training scan once; scans of other kinds are rejected (see `ml.image.pixels.picture.foreign`)."""
    found = {run.report.scans[scan].origin for scan in run.split.train}
    return sorted(map(asdict, found), key=str)


def _drop_stale_features(run: Run) -> None:
    """Features below unfrozen blocks stay valid, but those of the whole backbone do not if its top was fine-tuned."""
    if any(epoch.phase == "fine_tune" for epoch in run.epochs):
        run.features_by_top.pop(0, None)


def _resume_point(run: Run, origin: Origin) -> ResumePoint:
    checkpoint = load_resume_checkpoint(run.environment.checkpoints, origin)
    if checkpoint is None:
        return ResumePoint()
    run.epochs.extend(checkpoint.history)
    run.emit(Resumed(checkpoint.epoch))
    return ResumePoint(checkpoint.history, checkpoint.state)


class _StepEvents:
    """Collects optimizer steps into one event per half second."""

    def __init__(self, run: Run) -> None:
        self._emit = run.emit
        self._losses: list[float] = []
        batches = -(-len(run.split.train) // run.params.batch_size)
        self._epoch, self._rate = 0, 0.0
        self._done = len(run.epochs) * -(-batches // run.params.accumulate)  # steps of the previous attempt
        self._last = time.monotonic()

    def __call__(self, epoch: int, loss: float, rate: float) -> None:
        if epoch != self._epoch:
            self.flush()
        self._epoch, self._rate = epoch, rate
        self._losses.append(loss)
        if time.monotonic() - self._last >= STEPS_EVERY:
            self.flush()

    def flush(self) -> None:
        """Emit the collected steps."""
        if self._losses:
            self._emit(Steps(self._epoch, self._done + 1, self._losses, self._rate))
            self._done += len(self._losses)
            self._losses, self._last = [], time.monotonic()
