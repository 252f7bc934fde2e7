"""Training, on a screen: the head learns by SGD from features that the frozen backbone computed once.

Everything random is a function of seed and epoch, and an epoch ends in a state that can be told in full (Head.state):
so a training can stop after an epoch and go on in another process to the same numbers (ml.checkpoints).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ml.data import Split
from ml.errors import BadParams, naming_out_of_memory
from ml.events import Epoch
from ml.features import Features
from ml.head import Head, Tensors
from ml.params import Params
from ml.transforms import Augmentation

WINDOW = 2048  # most training scans whose features are in memory at once (4 × 25088 bytes each)
HEAD_SHARE = 0.1  # of a scan's step in the head, of its time in the backbone: for the progress only


@dataclass(frozen=True)
class Start:
    """Where a training goes on: after `epoch`, with the `Head.state` of that moment. The default: at the beginning."""

    epoch: int = 0
    head: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class TrainConfig:
    """What learns, and how: a VGG16 (its classifier is changed in place) and the parameters.

    `keep` hears of each epoch but the last, after the caller got it, with a function that gives the head's state.
    """

    network: nn.Module
    params: Params
    on_progress: Callable[[float], None] = lambda fraction: None
    keep: Callable[[int, Callable[[], Tensors]], None] = lambda epoch, head: None
    start: Start = Start()


@dataclass(frozen=True)
class TrainData:
    """What is learned from: features by scan, int64 labels by scan, and which scans are held out."""

    features: Features
    labels: np.ndarray
    split: Split


def train(config: TrainConfig, data: TrainData) -> Iterator[Epoch]:
    """Train the network's classifier, epoch by epoch. To cancel: stop iterating. To finish: iterate to the end.

    After the last epoch the network is a plain VGG16 again: the standardization is folded into its first Linear.
    Raises DeviceOutOfMemory where the features, or a step of the head, find too little memory.
    """
    params, progress, started = config.params, _Progress(config, data), time.perf_counter()
    with naming_out_of_memory():
        head = begin(config, data)
    for epoch in range(config.start.epoch + 1, params.epochs + 1):
        with naming_out_of_memory():
            train_loss, train_accuracy = train_one_epoch(head, data, params, epoch, progress)
            val_loss, val_accuracy = evaluate(head, data)
        seconds = time.perf_counter() - started
        if epoch == params.epochs:
            head.finish()
        yield Epoch(
            epoch, params.epochs, train_loss, train_accuracy, val_loss, val_accuracy, params.learning_rate, seconds
        )  # fmt: skip
        if epoch < params.epochs:
            config.keep(epoch, head.state)
        started = time.perf_counter()


def begin(config: TrainConfig, data: TrainData) -> Head:
    """The head at the beginning, or as it stood after the epoch that the training goes on from."""
    head, params = Head(config.network, config.params), config.params
    if not params.augmentation:
        # All at once and in one order, whatever the windows: an engine may round by what shares a batch.
        data.features.keep(data.split.train)
    if config.start.epoch:
        window = window_features(data, params, 1, data.split.train) if one_window(data, params) else None
        head.restore(config.start.head, window)
    return head


def train_one_epoch(
    head: Head, data: TrainData, params: Params, epoch: int, progress: _Progress
) -> tuple[float, float]:
    """One pass over the training scans; mean loss and accuracy as they were while learning (with dropout)."""
    loss_sum, correct = 0.0, 0
    with torch.random.fork_rng():
        torch.manual_seed(params.seed * 1_000_003 + epoch)  # dropout: a function of seed and epoch, so a run can resume
        for scans, batches in windows(data, params, epoch):
            if not (head.in_window and one_window(data, params)):
                head.enter(window_features(data, params, epoch, scans))
            labels = torch.from_numpy(data.labels[scans]).to(head.device)
            for rows in batches:
                logits, loss = head.learn(rows.to(head.device), labels[rows])
                loss_sum += loss * len(rows)
                correct += int((logits.argmax(1) == labels[rows]).sum())
                progress.head_done(len(rows))
    if not one_window(data, params):
        head.leave(last=epoch == params.epochs)
    count = len(data.split.train)
    if not math.isfinite(loss_sum):
        raise BadParams("learning_rate: the loss became infinite; choose a smaller one.")
    return loss_sum / count, correct / count


def evaluate(head: Head, data: TrainData) -> tuple[float, float]:
    """Mean loss and accuracy on the held-out scans, without dropout."""
    loss_sum, correct = 0.0, 0
    held_out = data.split.held_out
    for scans in (held_out[start : start + 512] for start in range(0, len(held_out), 512)):
        logits = head.logits(torch.from_numpy(data.features.plain(scans)))
        labels = torch.from_numpy(data.labels[scans]).to(head.device)
        loss_sum += float(F.cross_entropy(logits, labels, reduction="sum"))
        correct += int((logits.argmax(1) == labels).sum())
    return loss_sum / len(held_out), correct / len(held_out)


def windows(data: TrainData, params: Params, epoch: int) -> Iterator[tuple[np.ndarray, list[torch.Tensor]]]:
    """An epoch as windows of (scans, batches of rows of that window), shuffled by seed and epoch.

    Without augmentation a small dataset is one window that stays the same in every epoch: only its batches change.
    """
    train_scans, size = data.split.train, window_size(params)
    order = np.random.default_rng((params.seed, epoch)).permutation(len(train_scans))
    if len(train_scans) <= size:
        yield train_scans, _batches(order, params.batch_size)
        return
    for start in range(0, len(order), size):
        scans = train_scans[order[start : start + size]]
        yield scans, _batches(np.arange(len(scans)), params.batch_size)


def one_window(data: TrainData, params: Params) -> bool:
    """Whether one window serves the whole training: the features are the same in each epoch, and few enough."""
    return not params.augmentation and len(data.split.train) <= window_size(params)


def window_size(params: Params) -> int:
    """Scans in a window: whole batches."""
    return max(1, WINDOW // params.batch_size) * params.batch_size


def window_features(data: TrainData, params: Params, epoch: int, scans: np.ndarray) -> torch.Tensor:
    """float32 [len(scans), 25088], augmented anew for this epoch where the parameters say so."""
    if params.augmentation:
        return torch.from_numpy(data.features.augmented(scans, params.seed, epoch, Augmentation()))
    return torch.from_numpy(data.features.plain(scans))


def _batches(rows: np.ndarray, size: int) -> list[torch.Tensor]:
    return [torch.from_numpy(rows[start : start + size]) for start in range(0, len(rows), size)]


class _Progress:
    """The fraction of a training that is done, counted in scans through the backbone."""

    def __init__(self, config: TrainConfig, data: TrainData) -> None:
        params, trained, held = config.params, len(data.split.train), len(data.split.held_out)
        passes = params.epochs if params.augmentation else 1
        self._total = trained * passes + held + HEAD_SHARE * trained * params.epochs
        self._done = config.start.epoch * trained * (HEAD_SHARE + params.augmentation)
        self._tell = config.on_progress
        data.features.on_images(self._add)

    def head_done(self, scans: int) -> None:
        self._add(HEAD_SHARE * scans)

    def _add(self, amount: float) -> None:
        self._done += amount
        self._tell(min(self._done / self._total, 1.0))
