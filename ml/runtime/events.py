"""What a training child says to its parent: one JSON object a line on stdout, and nothing else there.

The whole protocol between `python -m ml train --events` and the worker is in this file.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, get_args


@dataclass(frozen=True)
class StageStarted:
    """One of the four stages begins."""

    event: ClassVar[str] = "stage_started"
    stage: str


@dataclass(frozen=True)
class StageFinished:
    """A stage is done, after `seconds` of wall-clock time."""

    event: ClassVar[str] = "stage_finished"
    stage: str
    seconds: float


@dataclass(frozen=True)
class Progress:
    """`fraction` (0–1) of this STAGE is done; at most about two of these a second.

    `left`: seconds until the whole run ends, if the pipeline reckons them.
    """

    event: ClassVar[str] = "progress"
    stage: str
    fraction: float
    left: float | None = None


@dataclass(frozen=True)
class Epoch:
    """One finished epoch: mean losses (cross-entropy, nats), accuracies and F1 0–1, `seconds` of wall-clock time.

    `phase`: head (the backbone is frozen) or fine_tune. `learning_rate`: of its last step.
    """

    event: ClassVar[str] = "epoch"
    epoch: int
    epochs: int
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    learning_rate: float
    seconds: float
    val_f1: float | None = None
    phase: str = "head"

    def row(self) -> dict[str, Any]:
        """The epoch as a job's events and metrics have it."""
        return asdict(self)


@dataclass(frozen=True)
class Round:
    """One finished pass over the data of a pipeline that has other figures than `Epoch`'s; they go by their names."""

    event: ClassVar[str] = "round"
    epoch: int
    epochs: int
    figures: dict[str, Any] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """See `Epoch.row`."""
        return {"epoch": self.epoch, "epochs": self.epochs, **self.figures}


@dataclass(frozen=True)
class Steps:
    """Consecutive steps of the optimizer: the loss of each, counted from `first_step` (1 is the training's first)."""

    event: ClassVar[str] = "steps"
    epoch: int
    first_step: int
    losses: list[float]
    learning_rate: float


@dataclass(frozen=True)
class Resumed:
    """A training goes on from a checkpoint: the epochs up to this one were done, and told, before."""

    event: ClassVar[str] = "resumed"
    epoch: int


@dataclass(frozen=True)
class Checkpointed:
    """The training can go on after `epoch` from the file at `path`, which took `seconds` to write.

    The file is the reader's: it may be moved away at once.
    """

    event: ClassVar[str] = "checkpointed"
    epoch: int
    path: str
    seconds: float


@dataclass(frozen=True)
class Evaluated:
    """The scores on the held-out scans: see `ml.evaluation.metrics.Scores.as_dict`.

    `reference`: what the test scans are like, for drift (see ml.image.serving.drift_reference). `champion`: how the
    champion that the run was given did on the same scans (see ml.image.stages.champion). `scan_scores`: for
    choosing another operating point (see ml.evaluation.operating.kept_scores).
    """

    event: ClassVar[str] = "evaluated"
    metrics: dict[str, Any]
    reference: dict[str, Any] | None = None
    champion: dict[str, Any] | None = None
    scan_scores: dict[str, Any] | None = None


@dataclass(frozen=True)
class Finished:
    """All stages are done; `artifacts` maps a name to a path. `environment`: what the model's numbers depend on, beside
    code, data, parameters and the versions of packages."""

    event: ClassVar[str] = "finished"
    model_path: str
    artifacts: dict[str, str] = field(default_factory=dict)
    device_seconds: float = 0.0
    dataset_digest: str | None = None
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Failed:
    """The run ended without a model; exit code 1 follows."""

    event: ClassVar[str] = "failed"
    code: str
    detail: str
    retryable: bool = False


Event = (
    StageStarted
    | StageFinished
    | Progress
    | Steps
    | Epoch
    | Round
    | Resumed
    | Checkpointed
    | Evaluated
    | Finished
    | Failed
)
Emit = Callable[[Event], None]
_KINDS: dict[str, type[Any]] = {kind.event: kind for kind in get_args(Event)}


def reporter(emit: Emit, stage: str, every: float = 0.5) -> Callable[[float], None]:
    """A function of the fraction done that emits at most one `progress` event in `every` seconds."""
    last = time.monotonic()

    def tell(fraction: float) -> None:
        nonlocal last
        if time.monotonic() - last >= every:
            last = time.monotonic()
            emit(Progress(stage, round(fraction, 4)))

    return tell


def to_json(event: Event) -> str:
    """One line without its newline. NaN is refused: JSON has none, and a diverged run must fail by name."""
    return json.dumps({"event": event.event, **asdict(event)}, allow_nan=False, separators=(",", ":"))


def from_json(line: str) -> Event:
    """The event of a line; ValueError for anything else."""
    try:
        fields = json.loads(line)
        return _KINDS[fields.pop("event")](**fields)  # type: ignore[no-any-return]
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError("This line is not an event of ml.runtime.events.") from error
