"""Stage 3, training: train the network, calibrate it, fit its OOD detector, try its engines.

Writes model.safetensors and history.json.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, replace

import numpy as np
import torch

from ml.evaluation.by_patient import choose_pooling
from ml.evaluation.calibration import Calibration, calibrate
from ml.evaluation.metrics import positive_index
from ml.image.dataset.grouping import group_scans
from ml.image.dataset.lineage import lineage
from ml.image.dataset.splits import Split
from ml.image.engines.admission import RANGE_SCANS, TRIAL_SCANS, Admission, admit
from ml.image.engines.backends import default_dtype, training_precision
from ml.image.engines.hardware import device_name
from ml.image.learning.checkpoints import CheckpointWriter, Origin, load_resume_checkpoint
from ml.image.learning.ddp_worker import training_group
from ml.image.learning.train import ResumePoint, TrainConfig, TrainData, logits_of, train
from ml.image.networks import network
from ml.image.networks.feature_descriptor import feature_descriptors
from ml.image.networks.network import Model
from ml.image.networks.ood import OodDetector, UnseenDescriptors, fit_detector
from ml.image.pixels.statistics import input_statistics
from ml.image.stages.run import Run, write_json
from ml.runtime.events import Resumed, Steps, reporter
from ml.runtime.process_group import ProcessGroup
from ml.spec.pooling import Pooling

STEPS_EVERY = 0.5  # seconds between two `steps` events
OOD_SCANS = 512  # scans of a side, at most, that the OOD detector is fitted to; more take time and change little


def training(run: Run) -> None:
    """Run the stage; see the module's docstring."""
    started = time.perf_counter()
    model = run.load_model(run.config.prepare_base_model.updated_base_model_path)
    if not run.in_one_process:
        network.own_memory(model)
    with _process_group(run, model) as group:
        _train(run, model, group)
    _drop_stale_features(run, group)
    calibration, ood = _calibrate(run, model), _fit_ood(run, model)
    admission = _admit(run, model, calibration, ood)
    metadata = _training_metadata(run, model, calibration) | admission.as_dict()
    metadata["pooling"] = _choose_pooling(run, model, calibration).as_dict()
    run.model = replace(model, metadata={**model.metadata, **metadata})
    run.device_seconds += time.perf_counter() - started
    network.save(run.model, run.config.training.trained_model_path)
    write_json(run.config.training.history_path, [asdict(epoch) for epoch in run.epochs])


def _process_group(run: Run, model: Model) -> AbstractContextManager[ProcessGroup]:
    """This process alone, or with DDP workers on the devices of this machine."""
    return training_group(
        run.params, model,
        pixels=run.config.data_ingestion.pixels_path, labels=run.report.labels, split=run.split,
        positive=positive_index(model.classes), resume=run.environment.checkpoints.resume,
        folder=run.config.data_ingestion.root_dir,
    )  # fmt: skip


def _train(run: Run, model: Model, group: ProcessGroup) -> None:
    data = train_data(run, model, run.split, group)
    origin = Origin.from_training(run.params, run.report, model.network, data.features(0).engine.name)
    writer = CheckpointWriter(run.environment.checkpoints, origin, run.epochs, run.emit)
    start = _resume_point(run, origin)
    steps, on_progress = _StepEvents(run), reporter(run.emit, "training")
    config = TrainConfig(model, run.params, on_progress, steps, writer, start, group)
    for epoch in train(config, data):
        steps.flush()
        run.epochs.append(epoch)
        run.emit(epoch)


def train_data(run: Run, model: Model, split: Split, group: ProcessGroup) -> TrainData:
    """The features, labels and split that this model is trained with."""
    return TrainData(
        lambda top: run.features(model, top, group), run.report.labels, split, positive_index(model.classes)
    )


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


def _calibrate(run: Run, model: Model) -> Calibration:
    """Temperature and threshold by the validation scans; predictions of this network use both."""
    scans = run.split.validation
    return calibrate(run.report.labels[scans], scan_logits(run, model, scans), positive_index(model.classes))


def _choose_pooling(run: Run, model: Model, calibration: Calibration) -> Pooling:
    """How the slices of a study become one answer, by the validation patients."""
    scans, positive = run.split.validation, positive_index(model.classes)
    groups = group_scans([run.report.scans[scan] for scan in scans])
    probabilities = calibration.probabilities(scan_logits(run, model, scans))
    return choose_pooling(run.report.labels[scans], probabilities, groups, [] if positive is None else [positive])


def _admit(run: Run, model: Model, calibration: Calibration, ood: OodDetector | None) -> Admission:
    """Try engines on some of the test scans; int8 gets its ranges from training scans."""
    tested, seen = _evenly(run.split.test, TRIAL_SCANS), _evenly(run.split.train, RANGE_SCANS)
    pixels, labels, fitted_in = run.pixels, run.report.labels[tested], default_dtype(training_precision(run.params))
    return admit(model, calibration, pixels[tested], labels, pixels[seen], ood, fitted_in)


def _evenly(scans: np.ndarray, most: int) -> np.ndarray:
    """At most `most` of the scans, evenly spaced."""
    return scans[np.unique(np.linspace(0, len(scans) - 1, min(len(scans), most)).astype(int))]


def _fit_ood(run: Run, model: Model) -> OodDetector | None:
    """The OOD detector for this network; see ml.image.networks.ood."""
    groups = group_scans(run.report.scans)  # of all scans: two in the sample may be linked by one outside of it
    scans, validation = (_evenly(side, OOD_SCANS) for side in (run.split.train, run.split.validation))
    statistics = [input_statistics(run.pixels[scan]) for scan in scans]
    unseen = UnseenDescriptors(scan_descriptors(run, model, validation), groups[validation])
    return fit_detector(scan_descriptors(run, model, scans), statistics, groups[scans], unseen)


def _training_metadata(run: Run, model: Model, calibration: Calibration) -> dict[str, object]:
    """What the model file says about the training."""
    seen = lineage(run.report, [*run.split.train, *run.split.validation])
    return {
        "params": run.params.model_dump(mode="json"),  # if stages run alone, they may have different parameters
        "lineage": sorted({*model.metadata.get("begun_lineage", ()), *seen}),
        "origins": _origins(run),
        "calibration": {"temperature": calibration.temperature, "threshold": calibration.threshold},
        "precision": training_precision(run.params),
        "engine": run.features(model, 0).engine.name,
        "device": device_name(),
    }


def _origins(run: Run) -> list[dict[str, str | None]]:
    """Each kind of training scan once; scans of other kinds are rejected (see `ml.image.pixels.picture.foreign`)."""
    found = {run.report.scans[scan].origin for scan in run.split.train}
    return sorted(map(asdict, found), key=str)


def _drop_stale_features(run: Run, group: ProcessGroup) -> None:
    """Features below unfrozen blocks stay valid, but those of the whole backbone do not if its top was fine-tuned.

    After a training on several devices all are dropped, since they are tied to the process group.
    """
    if group.size > 1:
        run.features_by_top.clear()
    elif any(epoch.phase == "fine_tune" for epoch in run.epochs):
        run.features_by_top.pop(0)


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
