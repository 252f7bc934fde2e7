"""Training, on a screen: the head learns by SGD from features that the frozen backbone computed once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ml.data import Split
from ml.errors import BadParams
from ml.events import Epoch
from ml.features import Features
from ml.params import Params
from ml.span import SpanLinear
from ml.transforms import Augmentation

WINDOW = 2048  # most training scans whose features are in memory at once (4 × 25088 bytes each)
SPREAD = 0.3  # std that standardized features are given: a step of SGD grows with |x|² = 25088·SPREAD², and at 1 the
# documented learning rate of 0.01 diverges on scans that a fifth of it would have learned
FLOOR = 0.3  # of the mean std, added in quadrature: a feature that hardly moved in training, but fires on an unseen
# patient, would else be blown up until it drowns the others
HEAD_SHARE = 0.1  # of a scan's step in the head, of its time in the backbone: for the progress only


@dataclass(frozen=True)
class TrainConfig:
    """What learns, and how: a VGG16 (its classifier is changed in place) and the parameters."""

    network: nn.Module
    params: Params
    on_progress: Callable[[float], None] = lambda fraction: None


@dataclass(frozen=True)
class TrainData:
    """What is learned from: features by scan, int64 labels by scan, and which scans are held out."""

    features: Features
    labels: np.ndarray
    split: Split


def train(config: TrainConfig, data: TrainData) -> Iterator[Epoch]:
    """Train the network's classifier, epoch by epoch. To cancel: stop iterating. To finish: iterate to the end.

    After the last epoch the network is a plain VGG16 again: the standardization is folded into its first Linear.
    """
    params, head = config.params, Head(config.network, config.params)
    progress = _Progress(config, data)
    for epoch in range(1, params.epochs + 1):
        started = time.perf_counter()
        train_loss, train_accuracy = train_one_epoch(head, data, params, epoch, progress)
        val_loss, val_accuracy = evaluate(head, data)
        seconds = time.perf_counter() - started
        if epoch == params.epochs:
            head.finish()
        yield Epoch(
            epoch, params.epochs, train_loss, train_accuracy, val_loss, val_accuracy, params.learning_rate, seconds
        )  # fmt: skip


def train_one_epoch(
    head: Head, data: TrainData, params: Params, epoch: int, progress: _Progress
) -> tuple[float, float]:
    """One pass over the training scans; mean loss and accuracy as they were while learning (with dropout)."""
    loss_sum, correct = 0.0, 0
    with torch.random.fork_rng():
        torch.manual_seed(params.seed * 1_000_003 + epoch)  # dropout: a function of seed and epoch, so a run can resume
        for scans, batches in windows(data, params, epoch):
            if epoch == 1 or params.augmentation or len(data.split.train) > window_size(params):
                head.enter(window_features(data, params, epoch, scans))
            labels = torch.from_numpy(data.labels[scans]).to(head.device)
            for rows in batches:
                logits, loss = head.learn(rows.to(head.device), labels[rows])
                loss_sum += loss * len(rows)
                correct += int((logits.argmax(1) == labels[rows]).sum())
                progress.head_done(len(rows))
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


class Head:
    """The classifier in training: its first Linear in the span of its inputs (see ml.span), the rest by torch."""

    def __init__(self, network: nn.Module, params: Params) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        classifier = network.get_submodule("classifier").to(self.device)
        self._network, self._standardizes = network, params.standardizes
        self._linear: nn.Linear = classifier[0]  # type: ignore[index]
        self._first = SpanLinear(self._linear, params.learning_rate, params.momentum)
        self._rest: nn.Sequential = classifier[2:]  # type: ignore[index]
        self._optimizer = torch.optim.SGD(
            self._rest.parameters(), params.learning_rate, params.momentum, fused=True
        )  # fmt: skip
        self._mean: torch.Tensor | None = None
        self._scale: torch.Tensor | None = None

    def enter(self, features: torch.Tensor) -> None:
        """Begin a window of raw features [n, 25088]. The first window's mean and std standardize all that follow."""
        features = features.to(self.device)
        if self._standardizes and self._mean is None:
            std, self._mean = torch.std_mean(features, dim=0)
            self._scale = torch.hypot(std, FLOOR * std.mean() + 1e-12) / SPREAD
        self._first.enter(self._standardized(features))

    def learn(self, rows: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, float]:
        """One step of SGD on rows of the window: their logits and mean loss from before the step."""
        self._rest.train()
        hidden = self._first.forward(rows).requires_grad_()
        logits = self._rest(F.relu(hidden))
        loss = F.cross_entropy(logits, labels)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        assert hidden.grad is not None
        self._first.step(rows, hidden.grad)
        return logits.detach(), float(loss.detach())

    @torch.inference_mode()
    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Logits of raw features [n, 25088], without dropout."""
        self._rest.eval()
        hidden = self._first.outputs(self._standardized(features.to(self.device)))
        return self._rest(F.relu(hidden))  # type: ignore[no-any-return]

    @torch.no_grad()
    def finish(self) -> None:
        """Write the span back and fold the standardization: W(x - mean)/scale + b is a Linear of x itself."""
        self._first.settle()
        if self._mean is not None and self._scale is not None:
            self._linear.weight.div_(self._scale)
            self._linear.bias.sub_(self._linear.weight @ self._mean)
        self._optimizer.zero_grad()
        self._optimizer.state.clear()
        self._network.cpu().eval()

    def _standardized(self, features: torch.Tensor) -> torch.Tensor:
        if self._mean is None or self._scale is None:
            return features
        return (features - self._mean).div_(self._scale)


class _Progress:
    """The fraction of a training that is done, counted in scans through the backbone."""

    def __init__(self, config: TrainConfig, data: TrainData) -> None:
        params, trained, held = config.params, len(data.split.train), len(data.split.held_out)
        passes = params.epochs if params.augmentation else 1
        self._total = trained * passes + held + HEAD_SHARE * trained * params.epochs
        self._done, self._tell = 0.0, config.on_progress
        data.features.on_images(self._add)

    def head_done(self, scans: int) -> None:
        self._add(HEAD_SHARE * scans)

    def _add(self, amount: float) -> None:
        self._done += amount
        self._tell(min(self._done / self._total, 1.0))
