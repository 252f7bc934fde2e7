"""Training, on a screen: the head learns from features that the frozen backbone computed once; then, where it is asked
for, the backbone's top blocks learn with it.

Everything random is a function of seed and epoch, and an epoch ends in a state that can be told in full: so a training
can stop after an epoch and go on in another process to the same numbers (ml.image.learning.checkpoints).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ml.image.dataset.splits import Split
from ml.image.engines.features import Features
from ml.image.learning.learner import Batch, Criterion, Learner, Tensors, add_prefix, cloned, strip_prefix
from ml.image.learning.sampling import FINE_TUNE_WINDOW, WINDOW, Sampler
from ml.image.learning.schedules import Phase, best_epoch, is_over, learning_rate, phases
from ml.image.learning.torch_learner import TorchLearner
from ml.image.learning.vgg_head import VggHeadLearner
from ml.image.networks.network import Model
from ml.runtime.errors import BadParams, naming_out_of_memory
from ml.runtime.events import Epoch
from ml.runtime.process_group import SINGLE_PROCESS, ProcessGroup
from ml.spec.image import Params

HEAD_SHARE = 0.1  # of a scan's step in the head, of its time in the backbone: for the progress only
TUNE_SHARE = 3.0  # of a scan's step with unfrozen blocks
_BEST = "best."


@dataclass(frozen=True)
class ResumePoint:
    """Where a training goes on: after the last epoch of `history`, with the `state` of that moment. The default: at the
    beginning."""

    history: tuple[Epoch, ...] = ()
    state: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class TrainConfig:
    """What learns, and how: a model (changed in place) and the parameters.

    `on_step` hears each step's epoch, loss and learning rate. `keep` hears of each epoch that others follow, after the
    caller got it, with a function that gives the state to go on from.
    """

    model: Model
    params: Params
    on_progress: Callable[[float], None] = lambda fraction: None
    on_step: Callable[[int, float, float], None] = lambda epoch, loss, rate: None
    keep: Callable[[int, Callable[[], Tensors]], None] = lambda epoch, state: None
    start: ResumePoint = ResumePoint()
    group: ProcessGroup = SINGLE_PROCESS


@dataclass(frozen=True)
class TrainData:
    """What is learned from: features below a number of unfrozen blocks, int64 labels by scan, and the split."""

    features: Callable[[int], Features]
    labels: np.ndarray
    split: Split
    positive: int | None = None  # the class whose F1 is told; None: the mean over all


def train(config: TrainConfig, data: TrainData) -> Iterator[Epoch]:
    """Train the network, epoch by epoch. To cancel: stop iterating. To finish: iterate to the end.

    Then the network is a plain one of torchvision's kind, with the weights of the epoch that is kept.
    Raises DeviceOutOfMemory where the features, or a step, find too little memory; BadParams for an infinite loss.
    """
    history = list(config.start.history)
    progress = _Progress(config, data, history)
    for phase in phases(config.params):
        if phase.name == "head" and any(epoch.phase == "fine_tune" for epoch in history):
            continue  # a checkpoint came after it
        yield from _train_phase(config, data, phase, history, progress)


def _train_phase(
    config: TrainConfig, data: TrainData, phase: Phase, history: list[Epoch], progress: _Progress
) -> Iterator[Epoch]:
    params = config.params
    last = phase == phases(params)[-1]
    with naming_out_of_memory():
        learner, best = start_phase(config, data, phase, history)
    while not is_over(params, phase, history):
        with naming_out_of_memory():
            history.append(_told_epoch(learner, data, config, phase, history, progress))
        more = not is_over(params, phase, history)
        if more and params.keep == "best" and best_epoch(params, history) == len(history):
            best = cloned(learner.place())
        yield history[-1]
        if more or not last:
            config.keep(len(history), partial(_state, learner, best, params, tuple(history)))
    if best_epoch(params, history) != len(history):
        learner.put(best)
    learner.finish()


def _told_epoch(
    learner: Learner, data: TrainData, config: TrainConfig, phase: Phase, history: Sequence[Epoch], progress: _Progress
) -> Epoch:
    started, total = time.perf_counter(), config.params.total_epochs
    loss, accuracy, rate = train_one_epoch(learner, data, config, phase, history, progress)
    val_loss, val_accuracy, val_f1 = evaluate(learner, data, phase, config.group)
    if not (math.isfinite(loss) and math.isfinite(val_loss)):
        rate_of = "fine_tune_learning_rate" if phase.top else "learning_rate"
        raise BadParams(f"{rate_of}: the loss became infinite; choose a smaller one, or set clip_norm.")
    seconds = time.perf_counter() - started
    return Epoch(
        len(history) + 1, total, loss, accuracy, val_loss, val_accuracy, rate, seconds, val_f1, phase.name
    )  # fmt: skip


def start_phase(
    config: TrainConfig, data: TrainData, phase: Phase, history: Sequence[Epoch]
) -> tuple[Learner, Tensors]:
    """What learns in this phase, as it stands after `history`; and the best that was kept of it so far."""
    params, features = config.params, data.features(phase.top)
    learner = _learner(config, data, phase)
    sampler = sampler_of(params, data, phase)
    if params.augmentation is False:
        # All at once and in one order, whatever the windows: an engine may round by what shares a batch.
        features.keep(data.split.train)
    if config.start.history and config.start.history[-1].phase == phase.name:
        window = torch.from_numpy(features.plain(data.split.train)) if sampler.one_window else None
        learner.restore({n: v for n, v in config.start.state.items() if not n.startswith(_BEST)}, window)
        best = strip_prefix(config.start.state, _BEST)
        return learner, best or cloned(learner.place())
    return learner, cloned(learner.place()) if history and params.keep == "best" else {}


def _state(learner: Learner, best: Tensors, params: Params, history: Sequence[Epoch]) -> Tensors:
    kept = {} if best_epoch(params, history) == len(history) else add_prefix(_BEST, best)
    return {**learner.state(), **kept}


def _learner(config: TrainConfig, data: TrainData, phase: Phase) -> Learner:
    params, model = config.params, config.model
    _, above = model.cut(phase.top)
    criterion = Criterion(class_weights(params, data), params.label_smoothing)
    if (phase.top, model.head, params.optimizer, config.group.size) == (0, "vgg", "sgd", 1):
        head = above[0]
        assert isinstance(head, nn.Sequential)
        return VggHeadLearner(head, params, criterion)
    return TorchLearner(above, params, phase, criterion, config.group)


def class_weights(params: Params, data: TrainData) -> torch.Tensor | None:
    """n / (classes · n of the class), as scikit-learn's `balanced`: float32 [classes]. None where all count alike."""
    if params.balance != "weights":
        return None
    counts = np.bincount(data.labels[data.split.train])
    return torch.from_numpy((counts.sum() / (len(counts) * counts)).astype(np.float32))


def train_one_epoch(
    learner: Learner, data: TrainData, config: TrainConfig, phase: Phase, history: Sequence[Epoch], progress: _Progress
) -> tuple[float, float, float]:
    """One pass over the training scans; mean loss and accuracy as they were while learning, and the last rate."""
    params, epoch, group = config.params, len(history) + 1, config.group
    mine = [one for one in history if one.phase == phase.name]
    sampler, features = sampler_of(params, data, phase), data.features(phase.top)
    loss_sum, correct, seen, step_loss, rate = 0.0, 0.0, 0, 0.0, 0.0
    with _dropout_of(params, epoch, group):
        for scans, batches in sampler.windows(epoch):
            if not (learner.in_window and sampler.one_window):
                learner.enter(torch.from_numpy(sampler.features(features, scans, epoch)))
            labels = torch.from_numpy(data.labels[scans])
            for number, rows in enumerate(batches):
                rate = learning_rate(params, phase, len(mine) + seen / sampler.count, mine)
                completes, share = step_share(number, len(batches), params.accumulate)
                logits, loss = learner.learn(Batch(rows, labels[rows], share, rate if completes else None))
                loss_sum, step_loss, seen = loss_sum + loss * len(rows), step_loss + loss * share, seen + len(rows)
                correct += float((logits.argmax(1) == group.own_rows(labels[rows])).sum())
                if completes:
                    config.on_step(epoch, group.sum([step_loss])[0], rate)
                    step_loss = 0.0
                progress.learned(len(rows), phase)
    if not sampler.one_window:
        learner.leave()
    loss_sum, correct = group.sum([loss_sum, correct])
    return loss_sum / seen, correct / seen, rate


@contextmanager
def _dropout_of(params: Params, epoch: int, group: ProcessGroup) -> Iterator[None]:
    """Dropout as a function of seed and epoch (and of the process), so that a training can go on; the caller's random
    numbers are left as they are."""
    with torch.random.fork_rng():
        torch.manual_seed((params.seed * 1_000_003 + epoch) * 64 + group.rank)
        yield


def sampler_of(params: Params, data: TrainData, phase: Phase) -> Sampler:
    """In which order and in which windows a phase sees its scans."""
    return Sampler(params, data.split.train, data.labels, FINE_TUNE_WINDOW if phase.top else WINDOW)


def step_share(number: int, batches: int, accumulate: int) -> tuple[bool, float]:
    """Whether a window's batch completes a step, and its share in it; the last step may be of fewer batches."""
    first = number - number % accumulate
    size = min(accumulate, batches - first)
    return number == first + size - 1, 1 / size


def evaluate(
    learner: Learner, data: TrainData, phase: Phase, group: ProcessGroup = SINGLE_PROCESS
) -> tuple[float, float, float]:
    """Mean loss, accuracy and F1 on the validation scans, without dropout."""
    scans = data.split.validation
    logits = logits_of(learner.logits, data.features(phase.top), scans, group)
    labels = torch.from_numpy(data.labels[scans])
    loss, predicted = F.cross_entropy(logits, labels), logits.argmax(1)
    return float(loss), float((predicted == labels).float().mean()), _f1(labels, predicted, data)


def logits_of(
    head: Callable[[torch.Tensor], torch.Tensor],
    features: Features,
    scans: np.ndarray,
    group: ProcessGroup = SINGLE_PROCESS,
) -> torch.Tensor:
    """float32 [len(scans), classes] of scans as they are; their features are computed on first use."""
    features.keep(scans)
    mine = group.rows_to_compute(scans)
    parts = [head(torch.from_numpy(features.plain(mine[start : start + 512]))) for start in range(0, len(mine), 512)]
    return torch.from_numpy(group.gather_rows(torch.cat(parts).numpy(), len(scans)))


def _f1(labels: torch.Tensor, predicted: torch.Tensor, data: TrainData) -> float:
    classes = range(int(data.labels.max()) + 1) if data.positive is None else [data.positive]
    found = []
    for one in classes:
        hits = float(((predicted == one) & (labels == one)).sum())
        total = float((predicted == one).sum() + (labels == one).sum())
        found.append(2 * hits / total if total else 0.0)
    return sum(found) / len(found)


class _Progress:
    """The fraction of a training that is done, counted in scans through the backbone."""

    def __init__(self, config: TrainConfig, data: TrainData, history: Sequence[Epoch]) -> None:
        params, trained = config.params, len(data.split.train)
        changes = params.augmentation is not False
        once = len(data.split.validation) + (0 if changes else trained)
        self._total, self._done = 0.0, 0.0
        for phase in phases(params):
            each = trained * ((TUNE_SHARE if phase.top else HEAD_SHARE) + changes)
            done = sum(epoch.phase == phase.name for epoch in history)
            self._total += once + each * phase.epochs
            self._done += each * done
            if done and is_over(params, phase, history):  # where it is the last one, only its own scans are looked at
                last = history[-1].phase == phase.name
                self._done += each * (phase.epochs - done) + (len(data.split.validation) if last else once)
            data.features(phase.top).on_images(self._add)
        self._tell = config.on_progress

    def learned(self, scans: int, phase: Phase) -> None:
        self._add((TUNE_SHARE if phase.top else HEAD_SHARE) * scans)

    def _add(self, amount: float) -> None:
        self._done += amount
        self._tell(min(self._done / self._total, 1.0))
