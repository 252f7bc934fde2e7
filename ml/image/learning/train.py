"""The training loop: the head learns from features of the frozen backbone; then, optionally, the top blocks learn too.

All randomness is a function of seed and epoch, and an epoch ends in a complete state. So a training can stop after an
epoch and continue in another process with the same results (ml.image.learning.checkpoints).
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
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

HEAD_COST = 0.1  # of a scan in the head relative to the backbone's forward pass; for the progress only
FINE_TUNE_COST = 3.0  # of a scan with unfrozen blocks
BACKBONE = "backbone"
COSTS = {BACKBONE: 1.0, "head": HEAD_COST, "fine_tune": FINE_TUNE_COST}
MEASURED_SECONDS = 2.0
_BEST = "best."


@dataclass(frozen=True)
class ResumePoint:
    """Where a training continues: after the last epoch of `history`, with the learner's `state` from then.

    The default is the beginning.
    """

    history: tuple[Epoch, ...] = ()
    state: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class TrainConfig:
    """The model to train, which is changed in place, and how.

    `on_progress` is called with the fraction done. `on_step` is called with epoch, loss and learning rate of each step.
    `on_checkpoint` is called after each epoch but the last, when the caller has received it: with the epoch and a
    function that returns the state to continue from.
    """

    model: Model
    params: Params
    on_progress: Callable[[float], None] = lambda fraction: None
    on_step: Callable[[int, float, float], None] = lambda epoch, loss, rate: None
    on_checkpoint: Callable[[int, Callable[[], Tensors]], None] = lambda epoch, state: None
    start: ResumePoint = ResumePoint()
    group: ProcessGroup = SINGLE_PROCESS


@dataclass(frozen=True)
class TrainData:
    """Features by number of unfrozen blocks, labels int64 [scans], and the split."""

    features: Callable[[int], Features]
    labels: np.ndarray
    split: Split
    positive: tuple[int, ...] = ()  # the classes whose F1, as of one finding, is reported; none: the mean over all


def train(config: TrainConfig, data: TrainData) -> Iterator[Epoch]:
    """Train the network and yield each epoch. To cancel, stop iterating; to finish, iterate to the end.

    In the end the model is a plain torchvision network with the weights of the epoch that is kept.

    Raises:
        DeviceOutOfMemory: features or a step do not fit into memory.
        BadParams: the loss became infinite.
    """
    history = list(config.start.history)
    progress = _Progress(config, data, history)
    for phase in phases(config.params):
        if phase.name == "head" and any(epoch.phase == "fine_tune" for epoch in history):
            continue  # the checkpoint is of the next phase
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
            history.append(_run_epoch(learner, data, config, phase, history, progress))
        more = not is_over(params, phase, history)
        if more and params.keep == "best" and best_epoch(params, history) == len(history):
            best = cloned(learner.weights())
        yield history[-1]
        if more or not last:
            config.on_checkpoint(len(history), partial(_state, learner, best, params, tuple(history)))
    if best_epoch(params, history) != len(history):
        learner.set_weights(best)
    learner.finish()


def _run_epoch(
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
    """The learner of this phase in its state after `history`, and the best weights of the phase so far."""
    params, features = config.params, data.features(phase.top)
    learner = _learner(config, data, phase)
    sampler = sampler_of(params, data, phase)
    if params.augmentation is False:
        # All at once and in one order, whatever the windows are: rounding may depend on which scans share a batch.
        features.keep(data.split.train)
    if config.start.history and config.start.history[-1].phase == phase.name:
        window = torch.from_numpy(features.plain(data.split.train)) if sampler.one_window else None
        learner.restore({n: v for n, v in config.start.state.items() if not n.startswith(_BEST)}, window)
        best = strip_prefix(config.start.state, _BEST)
        return learner, best or cloned(learner.weights())
    return learner, cloned(learner.weights()) if history and params.keep == "best" else {}


def _state(learner: Learner, best: Tensors, params: Params, history: Sequence[Epoch]) -> Tensors:
    kept = {} if best_epoch(params, history) == len(history) else add_prefix(_BEST, best)
    return {**learner.state(), **kept}


def _learner(config: TrainConfig, data: TrainData, phase: Phase) -> Learner:
    params, model = config.params, config.model
    _, above = model.cut(phase.top)
    criterion = Criterion(class_weights(params, data), params.label_smoothing)
    new_head = bool(model.metadata.get("new_head", True))
    if (phase.top, model.head, params.optimizer, config.group.size) == (0, "vgg", "sgd", 1):
        head = above[0]
        assert isinstance(head, nn.Sequential)
        return VggHeadLearner(head, params, criterion, new_head)
    return TorchLearner(above, params, phase, criterion, config.group, new_head)


def class_weights(params: Params, data: TrainData) -> torch.Tensor | None:
    """n / (classes · n of the class), as scikit-learn's `balanced`: float32 [classes]. None for equal weights."""
    if params.balance != "weights":
        return None
    counts = np.bincount(data.labels[data.split.train])
    return torch.from_numpy((counts.sum() / (len(counts) * counts)).astype(np.float32))


def train_one_epoch(
    learner: Learner, data: TrainData, config: TrainConfig, phase: Phase, history: Sequence[Epoch], progress: _Progress
) -> tuple[float, float, float]:
    """One pass over the training scans: (mean loss, accuracy, last learning rate), measured while learning."""
    params, epoch, group = config.params, len(history) + 1, config.group
    phase_history = [one for one in history if one.phase == phase.name]
    sampler, features = sampler_of(params, data, phase), data.features(phase.top)
    loss_sum, correct, seen, step_loss, rate = 0.0, 0.0, 0, 0.0, 0.0
    with _seeded_dropout(params, epoch, group):
        for scans, batches in sampler.windows(epoch):
            if not (learner.in_window and sampler.one_window):
                learner.enter_window(torch.from_numpy(sampler.features(features, scans, epoch)))
            labels = torch.from_numpy(data.labels[scans])
            for number, rows in enumerate(batches):
                rate = learning_rate(params, phase, len(phase_history) + seen / sampler.count, phase_history)
                completes, share = step_share(number, len(batches), params.accumulate)
                logits, loss = learner.learn(Batch(rows, labels[rows], share, rate if completes else None))
                loss_sum, step_loss, seen = loss_sum + loss * len(rows), step_loss + loss * share, seen + len(rows)
                correct += float((logits.argmax(1) == group.own_rows(labels[rows])).sum())
                if completes:
                    config.on_step(epoch, group.sum([step_loss])[0], rate)
                    step_loss = 0.0
                progress.add_learned(len(rows), phase)
    if not sampler.one_window:
        learner.leave_window()
    loss_sum, correct = group.sum([loss_sum, correct])
    return loss_sum / seen, correct / seen, rate


@contextmanager
def _seeded_dropout(params: Params, epoch: int, group: ProcessGroup) -> Iterator[None]:
    """Seed dropout by seed, epoch and process, so that training can be resumed; the global generator is untouched."""
    with torch.random.fork_rng():
        torch.manual_seed((params.seed * 1_000_003 + epoch) * 64 + group.rank)
        yield


def sampler_of(params: Params, data: TrainData, phase: Phase) -> Sampler:
    """The order and the windows in which a phase sees its scans."""
    return Sampler(params, data.split.train, data.labels, FINE_TUNE_WINDOW if phase.top else WINDOW)


def step_share(number: int, batches: int, accumulate: int) -> tuple[bool, float]:
    """Whether batch `number` of a window completes an optimizer step, and its share in it; the last may be shorter."""
    first = number - number % accumulate
    size = min(accumulate, batches - first)
    return number == first + size - 1, 1 / size


def evaluate(
    learner: Learner, data: TrainData, phase: Phase, group: ProcessGroup = SINGLE_PROCESS
) -> tuple[float, float, float]:
    """(mean loss, accuracy, F1) on the validation scans, without dropout."""
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
    """Logits of unchanged scans, float32 [len(scans), classes]; features are computed on first use."""
    features.keep(scans)
    own = group.rows_to_compute(scans)
    parts = [head(torch.from_numpy(features.plain(own[start : start + 512]))) for start in range(0, len(own), 512)]
    return torch.from_numpy(group.gather_rows(torch.cat(parts).numpy(), len(scans)))


def _f1(labels: torch.Tensor, predicted: torch.Tensor, data: TrainData) -> float:
    groups = [data.positive] if data.positive else [(one,) for one in range(int(data.labels.max()) + 1)]
    found = []
    for classes in groups:
        ours, true = (torch.isin(each, torch.tensor(classes)) for each in (predicted, labels))
        hits, total = float((ours & true).sum()), float(ours.sum() + true.sum())
        found.append(2 * hits / total if total else 0.0)
    return sum(found) / len(found)


class _Progress:
    """The fraction of a training that is done, by time: what a scan costs in the backbone, and in what learns, is
    measured as soon as both have taken `MEASURED_SECONDS`."""

    def __init__(self, config: TrainConfig, data: TrainData, history: Sequence[Epoch]) -> None:
        params, trained = config.params, len(data.split.train)
        changes = params.augmentation is not False
        once = len(data.split.validation) + (0 if changes else trained)
        self._scans, self._done, self._heard = Counter[str](), Counter[str](), Counter[str]()
        self._seconds: dict[str, float] = defaultdict(float)
        for phase in phases(params):
            done = sum(epoch.phase == phase.name for epoch in history)
            self._scans += Counter(
                {BACKBONE: once + trained * changes * phase.epochs, phase.name: trained * phase.epochs}
            )
            over = done and is_over(params, phase, history)  # a restarted last phase only evaluates
            epochs = phase.epochs if over else done
            self._done += Counter({BACKBONE: trained * changes * epochs, phase.name: trained * epochs})
            if over:
                last = history[-1].phase == phase.name
                self._done[BACKBONE] += len(data.split.validation) if last else once
            data.features(phase.top).on_images(lambda scans: self._add(BACKBONE, scans))
        self._on_progress, self._fraction, self._last = config.on_progress, 0.0, time.perf_counter()

    def add_learned(self, scans: int, phase: Phase) -> None:
        self._add(phase.name, scans)

    def _add(self, kind: str, scans: int) -> None:
        now = time.perf_counter()
        self._seconds[kind] += now - self._last
        self._last = now
        self._heard[kind] += scans
        self._done[kind] += scans
        done = sum(number * self._cost(kind) for kind, number in self._done.items())
        total = sum(number * self._cost(kind) for kind, number in self._scans.items())
        self._fraction = max(self._fraction, min(done / total, 1.0))
        self._on_progress(self._fraction)

    def _cost(self, kind: str) -> float:
        """Of a scan, in passes through the backbone."""
        if all(self._seconds[each] >= MEASURED_SECONDS for each in (kind, BACKBONE)):
            mine, backbone = (self._seconds[each] / self._heard[each] for each in (kind, BACKBONE))
            return mine / backbone
        return COSTS[kind]
