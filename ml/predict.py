"""Scans in, predictions out, in the same order. A broken scan gets a prediction that says so; nothing raises for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ml import network
from ml.admission import form_of, whole
from ml.ahead import ahead, in_rounds
from ml.calibration import Calibration
from ml.engines import Engine, Precision, open_engine
from ml.errors import ImageError, naming_out_of_memory
from ml.images import decode
from ml.metrics import positive_index
from ml.transforms import Transform

_THREADS = 2


@dataclass(frozen=True)
class ScanInput:
    """One scan: an id of the caller's choosing, and the file's bytes or its path; or a function that brings either,
    called ahead of the device. It may raise ImageError."""

    id: str
    source: bytes | Path | Callable[[], bytes | Path]

    def content(self) -> bytes | Path:
        """What is to be decoded."""
        return self.source() if callable(self.source) else self.source


@dataclass(frozen=True)
class Prediction:
    """What the network says of a scan, or (`error_code` set) why it could not look at it.

    Probabilities are calibrated and sum to 1; `label` is decided by the network's threshold, so with two classes it may
    be the less probable one. `confidence` is its probability.
    """

    id: str
    label: str | None = None
    confidence: float | None = None
    probabilities: dict[str, float] = field(default_factory=dict)
    error_code: str | None = None
    error_detail: str | None = None
    retryable: bool = False


@dataclass(frozen=True)
class Predictor:
    """A model that stays loaded, whole on the fastest engine that it is admitted for. Not for two threads at once.

    `calibration`: temperature and threshold, as the model's validation scans gave them."""

    classes: tuple[str, ...]
    transform: Transform
    engine: Engine
    calibration: Calibration = field(default_factory=Calibration)

    @classmethod
    def load(cls, path: Path, precision: Precision = "auto") -> Predictor:
        """Load a model file once. ModelFileError for any other file, DeviceOutOfMemory where it finds no room,
        EngineNotAdmitted for a precision that this machine or this network is not made for."""
        return cls.of(network.load(path), precision)

    @classmethod
    def of(cls, model: network.Model, precision: Precision = "auto") -> Predictor:
        """A predictor of a model that is in memory; raises as `load`. `precision`: see `ml.admission.form_of`."""
        form = form_of(model.metadata, precision)
        with naming_out_of_memory():
            engine = open_engine(whole(model), model.transform, form, model.metadata.get("ranges"))
        return cls(model.classes, model.transform, engine, Calibration.of(model.metadata))

    def predict(self, scans: Iterable[ScanInput]) -> Iterator[Prediction]:
        """Predictions in the order of `scans`, which may be endless: at most eight batches of them are in memory.

        DeviceOutOfMemory where the device has too little memory, also for half a batch (see ml.halving).
        """
        decoded = ahead(self._decode, scans, threads=_THREADS, depth=2 * self.engine.batch * self.engine.streams)
        waiting: deque[list[_Decoded]] = deque()

        def batches() -> Iterator[np.ndarray]:
            for chunk in in_rounds(decoded, self.engine.batch, self.engine.streams):
                waiting.append(chunk)
                pixels = [one.pixels for one in chunk if one.pixels is not None]
                if pixels:
                    yield np.stack(pixels)

        for logits in self.engine.stream(batches()):
            answers = iter(self._answers(logits))
            while True:
                chunk = waiting.popleft()
                yield from (self._prediction(one, answers) for one in chunk)
                if any(one.pixels is not None for one in chunk):
                    break
        for chunk in waiting:  # chunks of broken scans alone at the end
            yield from (self._prediction(one, iter(())) for one in chunk)

    def _decode(self, scan: ScanInput) -> _Decoded:
        try:
            return _Decoded(scan.id, self.transform.resize(decode(scan.content(), self.transform.window)), None)
        except ImageError as error:
            return _Decoded(scan.id, None, error)

    def _answers(self, logits: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """Class index and probabilities float64 [classes] of each scan."""
        decided = self.calibration.decide(logits, positive_index(self.classes))
        return list(zip(decided.tolist(), self.calibration.probabilities(logits), strict=True))

    def _prediction(self, one: _Decoded, answers: Iterator[tuple[int, np.ndarray]]) -> Prediction:
        if one.pixels is None:
            error = one.error or ImageError()
            return Prediction(one.id, error_code=error.code, error_detail=str(error), retryable=error.retryable)
        decided, values = next(answers)
        named = {name: float(value) for name, value in zip(self.classes, values, strict=True)}
        return Prediction(one.id, self.classes[decided], float(values[decided]), named)


@dataclass(frozen=True)
class _Decoded:
    id: str
    pixels: np.ndarray | None
    error: ImageError | None


def predict(model: Predictor | network.Model, scans: Iterable[ScanInput]) -> Iterator[Prediction]:
    """Predictions of a model or of a predictor that stays loaded; see `Predictor.predict`."""
    predictor = model if isinstance(model, Predictor) else Predictor.of(model)
    return predictor.predict(scans)
