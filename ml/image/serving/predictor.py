"""Scans in, predictions out, in the same order. A broken scan gets a prediction that says so; nothing raises for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ml.evaluation.calibration import Calibration
from ml.evaluation.metrics import positive_index
from ml.image.engines.admission import form_of
from ml.image.engines.base import Engine, Precision
from ml.image.engines.engines import open_engine
from ml.image.networks import network
from ml.image.networks.descriptor import served
from ml.image.networks.ood import Outliers
from ml.image.pixels.decoding import decode
from ml.image.pixels.statistics import input_statistics
from ml.image.pixels.transforms import Transform
from ml.runtime.errors import ImageError, naming_out_of_memory
from ml.runtime.prefetch import ahead, in_rounds

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

    def pixels(self, window: tuple[float, float] | None = None) -> np.ndarray:
        """The picture, uint8 [height, width, 3], with a CT in this window (see ml.image.pixels.decoding). Raises
        ImageError."""
        return decode(self.content(), window)


@dataclass(frozen=True)
class KeptScan(ScanInput):
    """A scan that several look at, one after another, each in the same window: it is read and decoded once, and what
    came of that stays in memory as long as it does, up to 150 MB."""

    _decoded: list[np.ndarray | ImageError] = field(default_factory=list, init=False, repr=False, compare=False)

    def pixels(self, window: tuple[float, float] | None = None) -> np.ndarray:
        """See `ScanInput.pixels`."""
        if not self._decoded:
            self._decoded.append(self._tried(window))
        (found,) = self._decoded
        if isinstance(found, ImageError):
            raise found
        return found

    def _tried(self, window: tuple[float, float] | None) -> np.ndarray | ImageError:
        try:
            return super().pixels(window)
        except ImageError as error:
            return error


@dataclass(frozen=True)
class Prediction:
    """What the network says of a scan, or (`error_code` set) why it could not look at it.

    Probabilities are calibrated and sum to 1; `label` is decided by the network's threshold, so with two classes it may
    be the less probable one. `confidence` is its probability. `ood_score`: how unlike the scans that were learnt from
    it is, above 1 too much to be trusted (see ml.image.networks.ood); None where the model file cannot tell.
    `oddity`: the input statistic that sets such a scan apart, in words. `statistics`: see ml.image.pixels.statistics.
    """

    id: str
    label: str | None = None
    confidence: float | None = None
    probabilities: dict[str, float] = field(default_factory=dict)
    error_code: str | None = None
    error_detail: str | None = None
    retryable: bool = False
    ood_score: float | None = None
    oddity: str | None = None
    statistics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Predictor:
    """A model that stays loaded, whole on the fastest engine that it is admitted for. Not for two threads at once.

    `engine` gives logits and descriptor (see ml.image.networks.descriptor). `calibration`: temperature and
    threshold, as the model's validation scans gave them. `outliers`: what its training scans are like."""

    classes: tuple[str, ...]
    transform: Transform
    engine: Engine
    calibration: Calibration = field(default_factory=Calibration)
    outliers: Outliers | None = None

    @classmethod
    def load(cls, path: Path, precision: Precision = "auto") -> Predictor:
        """Load a model file once. ModelFileError for any other file, DeviceOutOfMemory where it finds no room,
        EngineNotAdmitted for a precision that this machine or this network is not made for."""
        return cls.of(network.load(path), precision)

    @classmethod
    def of(cls, model: network.Model, precision: Precision = "auto") -> Predictor:
        """A predictor of a model that is in memory; raises as `load`. `precision`: see
        `ml.image.engines.admission.form_of`."""
        form = form_of(model.metadata, precision)
        with naming_out_of_memory():
            engine = open_engine(served(model), model.transform, form, model.metadata.get("ranges"))
        outliers = Outliers.of(model.metadata)
        seen = outliers.through(form) if outliers is not None else None
        return cls(model.classes, model.transform, engine, Calibration.of(model.metadata), seen)

    def logits(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Logits float32 [n, classes] of batches of resized pictures, uint8 [n, height, width, 3]."""
        return (outputs[:, : len(self.classes)] for outputs in self.engine.stream(batches))

    def predict(self, scans: Iterable[ScanInput]) -> Iterator[Prediction]:
        """Predictions in the order of `scans`, which may be endless: at most eight batches of them are in memory.

        DeviceOutOfMemory where the device has too little memory, also for half a batch (see
        ml.image.engines.oom_fallback).
        """
        decoded = ahead(self._decode, scans, threads=_THREADS, depth=2 * self.engine.batch * self.engine.streams)
        waiting: deque[list[_Decoded]] = deque()

        def batches() -> Iterator[np.ndarray]:
            for chunk in in_rounds(decoded, self.engine.batch, self.engine.streams):
                waiting.append(chunk)
                pixels = [one.pixels for one in chunk if one.pixels is not None]
                if pixels:
                    yield np.stack(pixels)

        for outputs in self.engine.stream(batches()):
            while True:
                chunk = waiting.popleft()
                yield from self._predictions(chunk, outputs)
                if any(one.pixels is not None for one in chunk):
                    break
        for chunk in waiting:  # chunks of broken scans alone at the end
            yield from self._predictions(chunk, np.empty(0))

    def _decode(self, scan: ScanInput) -> _Decoded:
        try:
            pixels = self.transform.resize(scan.pixels(self.transform.window))
        except ImageError as error:
            return _Decoded(scan.id, error=error)
        return _Decoded(scan.id, pixels, input_statistics(pixels))

    def _predictions(self, chunk: list[_Decoded], outputs: np.ndarray) -> Iterator[Prediction]:
        """Of a chunk whose readable scans got these outputs."""
        readable = [one for one in chunk if one.pixels is not None]
        answers = iter(self._answers(readable, outputs) if readable else ())
        for one in chunk:
            if one.pixels is None:
                error = one.error or ImageError()
                yield Prediction(one.id, error_code=error.code, error_detail=str(error), retryable=error.retryable)
            else:
                yield next(answers)

    def _answers(self, scans: list[_Decoded], outputs: np.ndarray) -> Iterator[Prediction]:
        logits, descriptors = np.split(outputs, [len(self.classes)], axis=1)
        decided = self.calibration.decide(logits, positive_index(self.classes))
        statistics = [one.statistics for one in scans]
        scores = self.outliers.scores(descriptors, statistics).tolist() if self.outliers else [None] * len(scans)
        for one, place, values, score in zip(
            scans, decided, self.calibration.probabilities(logits), scores, strict=True
        ):
            named = {name: float(value) for name, value in zip(self.classes, values, strict=True)}
            odd = self.outliers.oddity(one.statistics) if self.outliers and score > 1 else None
            yield Prediction(
                one.id, self.classes[place], float(values[place]), named,
                ood_score=score, oddity=odd, statistics=one.statistics,
            )  # fmt: skip


@dataclass(frozen=True)
class _Decoded:
    id: str
    pixels: np.ndarray | None = None
    statistics: dict[str, float] = field(default_factory=dict)
    error: ImageError | None = None


def predict(model: Predictor | network.Model, scans: Iterable[ScanInput]) -> Iterator[Prediction]:
    """Predictions of a model or of a predictor that stays loaded; see `Predictor.predict`."""
    predictor = model if isinstance(model, Predictor) else Predictor.of(model)
    return predictor.predict(scans)
