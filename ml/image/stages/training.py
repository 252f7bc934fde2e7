"""Stage 3, training: features once, then what learns; writes model.safetensors and history.json."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, replace

import numpy as np
import torch

from ml.evaluation.calibration import Calibration, calibrate
from ml.evaluation.metrics import positive_index
from ml.image.dataset.lineage import lineage
from ml.image.dataset.splits import Split, group_scans
from ml.image.engines.admission import SEEN, TRIED, Admission, admit
from ml.image.engines.engines import device_name, plain_form
from ml.image.learning.checkpoints import Keeper, Origin, resumed
from ml.image.learning.train import Start, TrainConfig, TrainData, logits_of, train
from ml.image.networks import network
from ml.image.networks.descriptor import descriptors_of
from ml.image.networks.network import Model
from ml.image.networks.ood import Outliers, Unseen, learn
from ml.image.pixels.statistics import input_statistics
from ml.image.stages.ddp_worker import training_team
from ml.image.stages.run import Run, precision_of, write_json
from ml.runtime.events import Resumed, Steps, reporter
from ml.runtime.process_group import Team

STEPS_EVERY = 0.5  # seconds between two events of steps
RESEMBLED = 512  # training scans, at most, that others are compared with; more would take time and tell little


def training(state: Run) -> None:
    """See the module."""
    started = time.perf_counter()
    model = state.model_of(state.config.prepare_base_model.updated_base_model_path)
    if not state.whole:
        network.own_memory(model)
    with _together(state, model) as members:
        _train(state, model, members)
    _forget_what_moved(state, members)
    calibration, outliers = _calibrate(state, model), _outliers(state, model)
    admission = _admit(state, model, calibration, outliers)
    learned = _learned(state, model, calibration) | admission.as_dict()
    state.model = replace(model, metadata={**model.metadata, **learned})
    state.device_seconds += time.perf_counter() - started
    network.save(state.model, state.config.training.trained_model_path)
    write_json(state.config.training.history_path, [asdict(epoch) for epoch in state.epochs])


def _together(state: Run, model: Model) -> AbstractContextManager[Team]:
    """Who trains: this process, or several on the devices of this machine."""
    return training_team(
        state.params, model,
        pixels=state.config.data_ingestion.pixels_path, labels=state.report.labels, split=state.split,
        positive=positive_index(model.classes), resume=state.around.checkpoints.resume,
        folder=state.config.data_ingestion.root_dir,
    )  # fmt: skip


def _train(state: Run, model: Model, members: Team) -> None:
    data = data_of(state, model, state.split, members)
    origin = Origin.of(state.params, state.report, model.network, data.features(0).engine.name)
    keeper = Keeper(state.around.checkpoints, origin, state.epochs, state.emit)
    start = _start(state, origin)
    steps, tell = _StepTeller(state), reporter(state.emit, "training")
    config = TrainConfig(model, state.params, tell, steps, keeper, start, members)
    for epoch in train(config, data):
        steps.flush()
        state.epochs.append(epoch)
        state.emit(epoch)


def data_of(state: Run, model: Model, split: Split, members: Team) -> TrainData:
    """What a training of this model learns from."""
    return TrainData(
        lambda top: state.features(model, top, members), state.report.labels, split, positive_index(model.classes)
    )


def head_of(model: Model) -> Callable[[torch.Tensor], torch.Tensor]:
    """Features to logits, float32 [n, classes]."""
    _, above = model.cut()
    above.eval()

    @torch.inference_mode()
    def logits(features: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = above(features)
        return result

    return logits


def test_logits(state: Run, model: Model, scans: np.ndarray) -> np.ndarray:
    """Logits of scans by the whole network, on the engine that training uses: float32 [len(scans), classes].
    Predictions may use another, which was admitted for saying nearly the same."""
    return logits_of(head_of(model), state.features(model, 0), scans).numpy()


def descriptors(state: Run, model: Model, scans: np.ndarray) -> np.ndarray:
    """Descriptors of scans (see ml.image.networks.descriptor), some at a time: their features may be fifty times as
    large."""
    features = state.features(model, 0)
    features.keep(scans)
    parts = (scans[start : start + 512] for start in range(0, len(scans), 512))
    return np.concatenate([descriptors_of(model, features.plain(part)) for part in parts])


def _calibrate(state: Run, model: Model) -> Calibration:
    """Temperature and threshold, by the validation scans: a prediction of this network has to use them."""
    scans = state.split.validation
    return calibrate(state.report.labels[scans], test_logits(state, model, scans), positive_index(model.classes))


def _admit(state: Run, model: Model, calibration: Calibration, outliers: Outliers | None) -> Admission:
    """Which engines may predict with this network, by some of its test scans; int8 is fitted to training scans."""
    tested, seen = _evenly(state.split.test, TRIED), _evenly(state.split.train, SEEN)
    pictures, labels, learnt_in = state.pixels, state.report.labels[tested], plain_form(precision_of(state.params))
    return admit(model, calibration, pictures[tested], labels, pictures[seen], outliers, learnt_in)


def _evenly(scans: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the scans, from all over."""
    return scans[np.unique(np.linspace(0, len(scans) - 1, min(len(scans), most)).astype(int))]


def _outliers(state: Run, model: Model) -> Outliers | None:
    """What the training scans are like, for those that are not: see ml.image.networks.ood."""
    groups = group_scans(state.report.scans)  # of all: what links two of the sample may be outside of it
    scans, unseen = (_evenly(side, RESEMBLED) for side in (state.split.train, state.split.validation))
    statistics = [input_statistics(state.pixels[scan]) for scan in scans]
    beside = Unseen(descriptors(state, model, unseen), groups[unseen])
    return learn(descriptors(state, model, scans), statistics, groups[scans], beside)


def _learned(state: Run, model: Model, calibration: Calibration) -> dict[str, object]:
    """What a model file says of its learning."""
    seen = lineage(state.report, [*state.split.train, *state.split.validation])
    return {
        "params": state.params.model_dump(mode="json"),  # a stage of its own may have got others than the one before
        "lineage": sorted({*model.metadata.get("begun_lineage", ()), *seen}),
        "calibration": {"temperature": calibration.temperature, "threshold": calibration.threshold},
        "precision": precision_of(state.params),
        "engine": state.features(model, 0).engine.name,
        "device": device_name(),
    }


def _forget_what_moved(state: Run, members: Team) -> None:
    """Features below unfrozen blocks are still true, but the whole backbone's are not once its top has learned; and
    nothing is computed together any more."""
    if members.size > 1:
        state.opened.clear()
    elif any(epoch.phase == "fine_tune" for epoch in state.epochs):
        state.opened.pop(0)


def _start(state: Run, origin: Origin) -> Start:
    checkpoint = resumed(state.around.checkpoints, origin)
    if checkpoint is None:
        return Start()
    state.epochs.extend(checkpoint.history)
    state.emit(Resumed(checkpoint.epoch))
    return Start(checkpoint.history, checkpoint.state)


class _StepTeller:
    """Gathers steps into one event for each half second."""

    def __init__(self, state: Run) -> None:
        self._emit = state.emit
        self._losses: list[float] = []
        batches = -(-len(state.split.train) // state.params.batch_size)
        self._epoch, self._rate = 0, 0.0
        self._done = len(state.epochs) * -(-batches // state.params.accumulate)  # of the attempt before
        self._last = time.monotonic()

    def __call__(self, epoch: int, loss: float, rate: float) -> None:
        if epoch != self._epoch:
            self.flush()
        self._epoch, self._rate = epoch, rate
        self._losses.append(loss)
        if time.monotonic() - self._last >= STEPS_EVERY:
            self.flush()

    def flush(self) -> None:
        """Tell what is gathered."""
        if self._losses:
            self._emit(Steps(self._epoch, self._done + 1, self._losses, self._rate))
            self._done += len(self._losses)
            self._losses, self._last = [], time.monotonic()
