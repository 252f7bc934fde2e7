"""Pipelines as plug-ins: what workers and their children ask of one, whatever it learns from."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ml.runtime.errors import ItemError
from ml.runtime.events import Emit
from ml.spec import registry
from ml.spec.pipeline import load as imported

Report = Callable[[float], None]
"""Is told the fraction done, 0 to 1; it may raise to stop the work."""
Source = bytes | Path | Callable[[], bytes | Path]
"""An item's bytes, its file, or a function that brings either when it is asked."""
Opened = TypeVar("Opened")
Result = TypeVar("Result")


class SharedFile:
    """A file of which several items are frames: it is brought and opened once, and let go after the last frame.

    Frames are read one after the other, in whatever thread. Called, it brings the file itself, as a `Source` does.
    """

    def __init__(self, source: Callable[[], bytes | Path], frames: int) -> None:
        self._source, self._left = source, frames
        self._lock, self._opened = threading.Lock(), list[Any]()

    def __call__(self) -> bytes | Path:
        return self._source()

    def read(self, open_: Callable[[bytes | Path], Opened], frame: Callable[[Opened], Result]) -> Result:
        """What `frame` reads of what `open_` opens. An error of opening it is raised for each frame again."""
        with self._lock:
            if not self._opened:
                self._opened.append(_outcome_of(lambda: open_(self._source())))
            (opened,) = self._opened
            self._left -= 1
            if self._left <= 0:
                self._opened.clear()
            if isinstance(opened, ItemError):
                raise opened
            return frame(opened)


def _outcome_of(open_: Callable[[], Any]) -> Any:
    try:
        return open_()
    except ItemError as error:
        return error


@dataclass(frozen=True)
class TrainingJob:
    """One training, as the worker hands it to its child: all of it is read from one JSON file (`python -m ml run`).

    `params` are complete and checked. The dataset is `archive` (a zip); what is written lies below `folder`.
    Checkpoints go to `checkpoints`, at least `checkpoint_seconds` apart, and the training goes on from `resume`.
    `base_model`: the file that the parameters' `weights` stands for. `champion`: a model file to score on the same test
    items, with `champion_threshold` and `champion_pooling` where they were set anew. `test_archive`: a zip of the items
    to test on, and on nothing else. `cache`: a folder for what the next training can use again, of `cache_bytes` at
    most; its new entries name `cache_owners`, ids of what they must go with. `titles`: name → value of what a report's
    head names, such as the job.
    """

    pipeline: str
    params: Mapping[str, Any]
    folder: Path
    archive: Path | None = None
    checkpoints: Path | None = None
    checkpoint_seconds: float = 60.0
    resume: Path | None = None
    base_model: Path | None = None
    champion: Path | None = None
    champion_threshold: float | None = None
    champion_pooling: Mapping[str, Any] | None = None
    test_archive: Path | None = None
    cache: Path | None = None
    cache_bytes: int = 0
    cache_owners: Sequence[str] = ()
    weights_dir: Path | None = None
    revision: str | None = None
    titles: Mapping[str, str] = field(default_factory=dict)

    _PATHS = (
        *("folder", "archive", "checkpoints", "resume", "base_model", "champion"),
        *("test_archive", "cache", "weights_dir"),
    )

    def as_json(self) -> dict[str, Any]:
        """Plain values; paths are absolute."""
        plain = asdict(self)
        return plain | {name: str(plain[name].absolute()) for name in self._PATHS if plain[name] is not None}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> TrainingJob:
        """The training of `as_json`'s values."""
        given: dict[str, Any] = {
            name: Path(value) if name in cls._PATHS and value else value for name, value in plain.items()
        }
        return cls(**given)


@dataclass(frozen=True)
class DatasetCheck:
    """What a dataset holds: `classes` with their number of items, and a digest of contents and labels.

    `problems` forbid training; `warnings` say what spoils it or its scores; `inspection` has all that was seen.
    """

    classes: dict[str, int]
    digest: str
    problems: Sequence[str] = ()
    warnings: Sequence[str] = ()
    inspection: dict[str, Any] = field(default_factory=dict)

    @property
    def items(self) -> int:
        """How many there are in all classes."""
        return sum(self.classes.values())


@dataclass(frozen=True)
class Item:
    """One thing to predict: an id of the caller's choosing, and where its bytes come from."""

    id: str
    source: Source

    def content(self) -> bytes | Path:
        """The bytes, or the file. Raises ItemError."""
        return self.source() if callable(self.source) else self.source

    def bytes(self) -> bytes:
        """The bytes. Raises ItemError."""
        content = self.content()
        return content.read_bytes() if isinstance(content, Path) else content


@dataclass(frozen=True)
class Prediction:
    """What a model says of an item, or (`error_code` set) why it could not look at it.

    Probabilities sum to 1; `confidence` is that of `label`. `ood_score`: above 1 the item is unlike what was learnt
    from, and `ood_reason` says in what. `statistics`: figures of the item that drift is measured by. `output`: whatever
    else the pipeline answers, as plain JSON. `identity`: whose item it is and where it lies (study_uid, series_uid,
    sop_uid, instance_number, accession, patient, position_mm), as far as the file says; it has no place in a log.
    """

    id: str
    label: str | None = None
    confidence: float | None = None
    probabilities: dict[str, float] = field(default_factory=dict)
    error_code: str | None = None
    error_detail: str | None = None
    retryable: bool = False
    ood_score: float | None = None
    ood_reason: str | None = None
    statistics: dict[str, float] = field(default_factory=dict)
    output: dict[str, Any] | None = None
    identity: dict[str, Any] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Decider:
    """How a model version's probabilities become a class: from `threshold` of the sum of the `positive` classes'
    probabilities on the likeliest of these, below it the likeliest of the others."""

    positive: tuple[str, ...]
    threshold: float

    def decide(self, prediction: Prediction) -> Prediction:
        """The prediction with the label and confidence of this threshold; unchanged if it has no probabilities."""
        values = prediction.probabilities
        if not {*self.positive} < values.keys():
            return prediction
        is_found = sum(values[name] for name in self.positive) >= self.threshold
        label = max((name for name in values if (name in self.positive) == is_found), key=values.__getitem__)
        return replace(prediction, label=label, confidence=values[label])


REJECTED, INDETERMINATE = "rejected", "indeterminate"


@dataclass(frozen=True)
class Disposition:
    """What may be done with a prediction, in one word; `reason`: why it is none of the classes."""

    word: str
    reason: str | None = None


@dataclass(frozen=True)
class Explanation:
    """Why an item got `label`: files by their suffix (`.png`, `.heatmap.png`); none where it cannot be read."""

    label: str | None
    files: Mapping[str, bytes]


class Engine(Protocol):
    """What a model is computed by."""

    @property
    def name(self) -> str:
        """A short name that results carry, such as openvino-bf16."""
        ...


class Predictor(Protocol):
    """A model that stays loaded. Not for two threads at once."""

    @property
    def engine(self) -> Engine:
        """What computes it."""
        ...

    def predict(self, items: Iterable[Any]) -> Iterator[Prediction]:
        """Predictions in the order of the items, which `Pipeline.item` has made. A broken item gets an error of its
        own; `ml.runtime.errors.DeviceOutOfMemory` where the device has too little memory."""
        ...


class Explainer(Protocol):
    """A model that stays loaded to explain what it predicts."""

    @property
    def classes(self) -> Sequence[str]:
        """The model's classes, in its order."""
        ...

    def explanations(self, item: Any, label: str, every_class: bool) -> Iterator[Explanation]:
        """Of the class `label`; with `every_class` then those of all others, each made when it is asked for."""
        ...


def one_at_a_time(items: Iterable[Item], answer: Callable[[Item], Prediction]) -> Iterator[Prediction]:
    """Predictions of items that are answered singly; one that cannot be read gets its error."""
    for item in items:
        try:
            yield answer(item)
        except ItemError as error:
            yield Prediction(item.id, error_code=error.code, error_detail=str(error), retryable=error.retryable)


class Pipeline(ABC):
    """What a pipeline does. Modules that are expensive to import are imported inside its methods."""

    @abstractmethod
    def check(self, archive: Path, folder: Path, report: Report) -> DatasetCheck:
        """Look through a dataset's zip; `folder` is scratch space. What is wrong with it is no exception, but told."""

    @abstractmethod
    def train(self, job: TrainingJob, emit: Emit) -> None:
        """Run all stages and emit the events of `ml.runtime.events`, the last of them `Finished`.

        Raises:
            PipelineError: whatever goes wrong by name.
        """

    @abstractmethod
    def open(self, model: Path, options: Mapping[str, Any]) -> Predictor:
        """Load a model file. `options`: the prediction job's parameters.

        Raises:
            ModelFileError, DeviceOutOfMemory, EngineNotAdmitted
        """

    def item(self, id_: str, source: Source, keep: bool = False) -> Any:
        """What `Predictor.predict` takes. `keep`: it will be looked at more than once."""
        return Item(id_, source)

    def frame(self, id_: str, source: SharedFile, frame: int) -> Any:
        """One frame of a file as `Predictor.predict` takes it, counted from 0. Only for what `Inputs.inspect` says has
        several frames."""
        raise NotImplementedError

    def readable_weights(self, folder: Path) -> Sequence[str] | None:
        """The weights on this machine, or within its reach, that a training could begin from, by the names of the
        spec's `needed_weights`. None where the pipeline does not say; the default. Workers ask every few seconds.

        `folder`: of the workers' weights; perhaps it does not exist.
        """
        return None

    def explainer(self, model: Path, options: Mapping[str, Any]) -> Explainer:
        """Load a model file to explain with; raises as `open`."""
        raise NotImplementedError

    def dispose(
        self, prediction: Prediction, low: float, high: float, positive: Sequence[str] | None = None
    ) -> Disposition | None:
        """What may be done with a prediction, by the policy of now: `low` and `high` are the limits of what is called
        indeterminate. `positive`: the model's positive classes, where it is known that it has any. None where the
        pipeline does not say; the default."""
        return None


@cache
def pipeline_of(name: str) -> Pipeline:
    """An installed pipeline, its code imported.

    Raises:
        UnknownPipeline
    """
    found: Pipeline = imported(registry.spec_of(name).runtime)()
    return found
