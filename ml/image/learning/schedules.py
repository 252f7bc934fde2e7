"""Learning rate schedules, best epoch and early stopping, as functions of the parameters and the epochs so far.

They have no state, so checkpoints need not store any.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ml.runtime.events import Epoch
from ml.spec.image import Params

MIN_GAIN = 1e-4  # of the monitored figure; smaller gains are noise


@dataclass(frozen=True)
class Phase:
    """Consecutive epochs: with the whole backbone frozen (head), or with its `top` blocks unfrozen (fine_tune)."""

    name: str
    top: int
    epochs: int
    rate: float


def phases(params: Params) -> tuple[Phase, ...]:
    """The head phase and, if the parameters ask for it, the fine-tuning phase."""
    head = Phase("head", 0, params.epochs, params.learning_rate)
    if not params.fine_tune_epochs:
        return (head,)
    return head, Phase("fine_tune", params.fine_tune_blocks, params.fine_tune_epochs, params.tuning_rate)


def learning_rate(params: Params, phase: Phase, progress: float, history: Sequence[Epoch]) -> float:
    """The learning rate at `progress`, in epochs of this phase, given the phase's epochs so far.

    Warm-up is linear (Goyal et al. 2017). cosine falls to 0 at the end of the phase (Loshchilov and Hutter 2017); step
    and plateau multiply by gamma.
    """
    warm = min(params.warmup_epochs, max(phase.epochs - 1, 0))
    if progress < warm:
        return phase.rate * max(progress, 0.01) / warm
    done = progress - warm
    if params.schedule == "cosine":
        return phase.rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done / max(phase.epochs - warm, 1e-9))))
    if params.schedule == "step":
        return phase.rate * float(params.gamma ** (int(done) // params.step_epochs))
    if params.schedule == "plateau":
        return phase.rate * float(params.gamma ** _plateaus(params, history))
    return phase.rate


def _plateaus(params: Params, history: Sequence[Epoch]) -> int:
    plateaus, best, waited = 0, -math.inf, 0
    for epoch in history:
        value = gain(params, epoch)
        best, waited = (value, 0) if value > best + MIN_GAIN else (best, waited + 1)
        if waited >= params.step_epochs:
            plateaus, waited = plateaus + 1, 0
    return plateaus


def gain(params: Params, epoch: Epoch) -> float:
    """The monitored figure of an epoch; larger is better."""
    if params.monitor == "val_loss":
        return -epoch.val_loss
    return epoch.val_accuracy if params.monitor == "val_accuracy" else (epoch.val_f1 or 0.0)


def best_epoch(params: Params, history: Sequence[Epoch]) -> int:
    """The number of the epoch whose weights are kept: the first of the best ones, or the last. 0 without epochs."""
    if not history or params.keep == "last":
        return len(history)
    return max(history, key=lambda epoch: (gain(params, epoch), -epoch.epoch)).epoch


def is_over(params: Params, phase: Phase, history: Sequence[Epoch]) -> bool:
    """Whether the phase is over: all its epochs are done, or its patience is exhausted."""
    phase_history = [epoch for epoch in history if epoch.phase == phase.name]
    if len(phase_history) >= phase.epochs:
        return True
    if not params.patience or not phase_history:
        return False
    best = max(range(len(phase_history)), key=lambda index: (gain(params, phase_history[index]), -index))
    return len(phase_history) - 1 - best >= params.patience
