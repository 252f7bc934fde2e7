"""Scans in, predictions out, in the same order. A broken scan gets a prediction with an error; it raises nothing."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ml.evaluation.calibration import Calibration
from ml.evaluation.positive import by_first_rule, indices
from ml.image.dataset.patients import real_identity, real_uid
from ml.image.engines.admission import choose_dtype
from ml.image.engines.backends import open_engine
from ml.image.engines.engine import Engine, Precision
from ml.image.networks import network
from ml.image.networks.feature_descriptor import with_descriptor
from ml.image.networks.ood import OodDetector
from ml.image.pixels.decoding import Opened, read
from ml.image.pixels.picture import Identity, Origin, Picture
from ml.image.pixels.statistics import input_statistics
from ml.image.pixels.transforms import Transform
from ml.image.serving.disposition import UNSUITABLE, unsuitable
from ml.pipelines import Item, Prediction, SharedFile
from ml.runtime.errors import ImageError, ItemError, naming_out_of_memory
from ml.runtime.prefetch import batched_for_streams, prefetch

_THREADS = 2


@dataclass(frozen=True)
class ScanInput(Item):
    """One scan: an id chosen by the caller, and the file's bytes, its path, or a function that returns either.

    The function is called in a decoding thread, ahead of the device, and may raise ItemError.
    """

    def picture(self, transform: Transform) -> Picture:
        """The scan, decoded with the window and the pixel rules of a transform; of several frames the middle one.

        Raises ItemError.
        """
        return read(self.content(), transform.window, "middle", transform.rules)


@dataclass(frozen=True)
class FrameInput(Item):
    """One frame of a file that is opened once for all of its frames."""

    frame: int = 0

    def picture(self, transform: Transform) -> Picture:
        """The frame; see `ScanInput.picture`."""
        assert isinstance(self.source, SharedFile)
        return self.source.read(Opened.of, lambda file: file.read(transform.window, self.frame, transform.rules))


@dataclass(frozen=True)
class CachedScan(ScanInput):
    """A scan that several consumers read, all with the same window and pixel rules. It is decoded once.

    The pixels, or the error, stay in memory as long as this object does: up to 150 MB.
    """

    _decoded: list[Picture | ItemError] = field(default_factory=list, init=False, repr=False, compare=False)

    def picture(self, transform: Transform) -> Picture:
        """See `ScanInput.picture`."""
        if not self._decoded:
            self._decoded.append(self._picture_or_error(transform))
        (result,) = self._decoded
        if isinstance(result, ItemError):
            raise result
        return result

    def _picture_or_error(self, transform: Transform) -> Picture | ItemError:
        try:
            return super().picture(transform)
        except ItemError as error:
            return error


@dataclass(frozen=True)
class Predictor:
    """A loaded model on the fastest engine that it is admitted for. Not thread-safe.

    `engine` returns logits and feature descriptor (see ml.image.networks.feature_descriptor). `calibration`:
    temperature and threshold, chosen on the model's validation scans. `ood`: the OOD detector for this engine.
    `learnt`: the kinds of scans that the model has learnt from; none in older files. `positive`: the positive classes;
    None: an older file, whose classes tell (see `ml.evaluation.positive`).
    """

    classes: tuple[str, ...]
    transform: Transform
    engine: Engine
    calibration: Calibration = field(default_factory=Calibration)
    ood: OodDetector | None = None
    learnt: frozenset[Origin] = frozenset()
    positive: tuple[str, ...] | None = None

    @classmethod
    def load(cls, path: Path, precision: Precision = "auto") -> Predictor:
        """Load a model file.

        Raises:
            ModelFileError: it is not a RenalQ model file.
            DeviceOutOfMemory: the network does not fit on the device.
            EngineNotAdmitted: the machine or the network does not support the precision.
        """
        return cls.from_model(network.load(path), precision)

    @classmethod
    def from_model(cls, model: network.Model, precision: Precision = "auto") -> Predictor:
        """A predictor for a model in memory; raises as `load`. `precision`: see `ml.image.engines.admission`."""
        dtype = choose_dtype(model.metadata, precision)
        with naming_out_of_memory():
            engine = open_engine(with_descriptor(model), model.transform, dtype, model.metadata.get("ranges"))
        detector = OodDetector.from_metadata(model.metadata)
        ood = detector.for_dtype(dtype) if detector is not None else None
        learnt = frozenset(Origin(**each) for each in model.metadata.get("origins", ()))
        calibration = Calibration.from_metadata(model.metadata)
        return cls(model.classes, model.transform, engine, calibration, ood, learnt, model.positive)

    def logits(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Logits float32 [n, classes] of batches of resized pictures, uint8 [n, height, width, 3]."""
        return (outputs[:, : len(self.classes)] for outputs in self.engine.stream(batches))

    def predict(self, scans: Iterable[ScanInput | FrameInput]) -> Iterator[Prediction]:
        """Predictions in the order of `scans`, which may be infinite: at most eight batches are in memory.

        DeviceOutOfMemory if the device has too little memory even for half a batch (see
        ml.image.engines.oom_fallback).
        """
        decoded = prefetch(self._decode, scans, threads=_THREADS, depth=2 * self.engine.batch * self.engine.streams)
        waiting: deque[list[_Decoded]] = deque()

        def batches() -> Iterator[np.ndarray]:
            for chunk in batched_for_streams(decoded, self.engine.batch, self.engine.streams):
                waiting.append(chunk)
                pixels = [one.pixels for one in chunk if one.pixels is not None]
                if pixels:
                    yield np.stack(pixels)

        for outputs in self.engine.stream(batches()):
            while True:
                chunk = waiting.popleft()
                yield from self._chunk_predictions(chunk, outputs)
                if any(one.pixels is not None for one in chunk):
                    break
        for chunk in waiting:  # trailing chunks with broken scans only
            yield from self._chunk_predictions(chunk, np.empty(0))

    def _decode(self, scan: ScanInput | FrameInput) -> _Decoded:
        try:
            picture = scan.picture(self.transform)
        except ItemError as error:
            return _Decoded(scan.id, error=error, identity=_told(error.identity))
        pixels = self.transform.resize(picture.pixels, picture.spacing_mm)
        # The small picture is as blank as the large one; only where it is a part of that one, all has to be looked at.
        looked_at = pixels if self.transform.spacing_mm is None else picture.pixels
        unsuited = unsuitable(looked_at, picture.origin, self.learnt)
        frame_told = {} if isinstance(scan, FrameInput) else _frame_told(picture)
        output = frame_told | ({UNSUITABLE: unsuited} if unsuited else {})
        return _Decoded(
            scan.id, pixels, input_statistics(pixels), output=output or None, identity=_told(picture.identity)
        )

    def _chunk_predictions(self, chunk: list[_Decoded], outputs: np.ndarray) -> Iterator[Prediction]:
        """Predictions for a chunk; `outputs` are the engine's for its readable scans."""
        readable = [one for one in chunk if one.pixels is not None]
        predictions = iter(self._readable_predictions(readable, outputs) if readable else ())
        for one in chunk:
            if one.pixels is None:
                error = one.error or ImageError()
                yield Prediction(
                    one.id, error_code=error.code, error_detail=str(error), retryable=error.retryable,
                    identity=one.identity,
                )  # fmt: skip
            else:
                yield next(predictions)

    def _readable_predictions(self, scans: list[_Decoded], outputs: np.ndarray) -> Iterator[Prediction]:
        logits, descriptors = np.split(outputs, [len(self.classes)], axis=1)
        positive = by_first_rule(self.classes) if self.positive is None else self.positive
        decided = self.calibration.decide(logits, indices(self.classes, positive))
        statistics = [one.statistics for one in scans]
        scores = self.ood.scores(descriptors, statistics).tolist() if self.ood else [None] * len(scans)
        rows = zip(scans, decided, self.calibration.probabilities(logits), scores, strict=True)
        for one, index, values, score in rows:
            probabilities = {name: float(value) for name, value in zip(self.classes, values, strict=True)}
            reason = self.ood.ood_reason(one.statistics) if self.ood and score > 1 else None
            yield Prediction(
                one.id, self.classes[index], float(values[index]), probabilities,
                ood_score=score, ood_reason=reason, statistics=one.statistics, output=one.output,
                identity=one.identity,
            )  # fmt: skip


@dataclass(frozen=True)
class _Decoded:
    id: str
    pixels: np.ndarray | None = None
    statistics: dict[str, float] = field(default_factory=dict)
    error: ItemError | None = None
    output: dict[str, Any] | None = None
    identity: dict[str, Any] | None = field(default=None, repr=False)


def _told(identity: Identity | None) -> dict[str, Any] | None:
    """What the file says, without placeholders: "anonymous" is nobody, and not the same person everywhere."""
    if identity is None:
        return None
    uids = {name: real_uid(getattr(identity, name)) for name in ("study_uid", "series_uid", "sop_uid")}
    real = {**vars(identity), **uids, "patient": real_identity(identity.patient)}
    return {name: value for name, value in real.items() if value is not None} or None


def _frame_told(picture: Picture) -> dict[str, int]:
    """Which of several frames or pages was looked at, counted from 1: a result must not pass for one of all."""
    return {} if picture.frames == 1 else {"frame": picture.frame + 1, "frames": picture.frames}


def predict(model: Predictor | network.Model, scans: Iterable[ScanInput | FrameInput]) -> Iterator[Prediction]:
    """Predictions of a model, or of a predictor that stays loaded; see `Predictor.predict`."""
    predictor = model if isinstance(model, Predictor) else Predictor.from_model(model)
    return predictor.predict(scans)
