"""Which dtypes a network may predict in: each is tried on a few of its validation scans, and compared with fp32.

Rounding is harmless for most networks and ruins some, which cannot be predicted. So a dtype that is faster than fp32 is
only admitted if its outputs are nearly the same. With bf16, no label may change and no probability may differ by more
than 0.01. With int8, neither F1 nor sensitivity may fall by more than 0.005, and no probability may differ by more than
0.05. With either, no OOD score may differ by more than 0.1.

Trials are to cost little beside the training. So they take few scans, those that tell most (`most_telling`): rounding
ruins a network on all scans, and changes labels near the threshold. The network is traced once for all engines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import numpy as np
from torch import nn

from ml.evaluation.calibration import Calibration, softmax
from ml.evaluation.intervals import Decisions, figures
from ml.image.engines.backends import engine_name, open_engine, shared_graph
from ml.image.engines.engine import Dtype, Precision, outputs_of
from ml.image.engines.graphs import Ranges, activation_ranges
from ml.image.engines.hardware import supported_dtypes
from ml.image.networks.architectures import ARCHITECTURES
from ml.image.networks.feature_descriptor import with_descriptor
from ml.image.networks.network import Model
from ml.image.networks.ood import OodDetector
from ml.runtime.errors import EngineNotAdmitted

CANDIDATES = 64
"""Scans, at most, among which `most_telling` chooses. Among thousands, the nearest to the threshold would lie so near
that any rounding changes their labels."""
TRIAL_SCANS = 8
"""Scans per trial, at most: VGG16 takes 0.27 s of a CPU core for each in fp32, as for two in training."""
RANGE_SCANS = 8
"""Training scans that determine the activation ranges of int8; their mean hardly changes with more."""
MAX_PROBABILITY_SHIFT = {"bf16": 0.01, "int8": 0.05}
MAX_FIGURE_LOSS = 0.005
"""How far int8 may lower F1 and sensitivity."""
MAX_OOD_SHIFT = 0.1
"""How far an OOD score may differ; from 1 on a scan is rejected."""


@dataclass(frozen=True)
class Trial:
    """The result of trying an engine on `scans` validation scans; 0 if it was not tried."""

    admitted: bool
    reason: str
    scans: int
    labels_changed: int
    largest_difference: float  # of a calibrated probability


NO_GAIN = Trial(False, "it is no faster than bf16 for this network", 0, 0, 0.0)


@dataclass(frozen=True)
class Admission:
    """All trials by engine name, the activation ranges for int8 (see ml.image.engines.graphs), and the OOD detector
    with the shift of each dtype."""

    trials: Mapping[str, Trial] = field(default_factory=dict)
    ranges: Ranges | None = None
    ood: OodDetector | None = None

    def as_dict(self) -> dict[str, Any]:
        """For a model file's metadata."""
        ranges = None if self.ranges is None else [list(one) for one in self.ranges]
        engines = {name: asdict(trial) for name, trial in self.trials.items()}
        return {"engines": engines, "ranges": ranges, "outliers": self.ood and self.ood.as_dict()}


def whole_network(model: Model) -> nn.Sequential:
    """The network from normalized pixels to logits."""
    return nn.Sequential(*model.cut())


def most_telling(logits: np.ndarray, calibration: Calibration, positive: Sequence[int]) -> np.ndarray:
    """Positions of at most `TRIAL_SCANS` scans, int64, ascending: half are those that rounding may decide otherwise.

    The other half are spread evenly over the rest. `logits`: float [n, classes], of the engine that training uses.
    """
    probabilities = calibration.probabilities(logits)
    if not positive or calibration.threshold is None:
        second, first = np.partition(probabilities, -2, axis=1)[:, -2:].T
        margins = first - second
    else:
        margins = np.abs(probabilities[:, list(positive)].sum(axis=1) - calibration.threshold)
    order = np.argsort(margins, kind="stable")
    near, rest = order[: TRIAL_SCANS // 2], np.sort(order[TRIAL_SCANS // 2 :])
    return np.sort(np.concatenate([near, evenly(rest, TRIAL_SCANS - len(near))]))


def evenly(scans: np.ndarray, most: int) -> np.ndarray:
    """At most `most` of the scans, evenly spaced."""
    return scans[np.unique(np.linspace(0, len(scans) - 1, min(len(scans), most)).astype(int))]


def admit(
    model: Model,
    calibration: Calibration,
    pictures: np.ndarray,
    labels: np.ndarray,
    seen: np.ndarray,
    ood: OodDetector | None = None,
    fitted_in: Dtype = "fp32",
    on_progress: Callable[[float], None] = lambda fraction: None,
) -> Admission:
    """Try every dtype that this machine computes in hardware, if the network gains by it.

    Args:
        model: the trained network.
        calibration: its temperature and threshold.
        pictures: validation scans, uint8 [n, height, width, 3]; also for the shifts of descriptors.
        labels: their class indices, int [n].
        seen: training scans, uint8 [m, height, width, 3], for int8's ranges.
        ood: the OOD detector, if there is one.
        fitted_in: the dtype of the descriptors that `ood` was fitted to.
        on_progress: called with the fraction done, 0 to 1, after each dtype.
    """
    layers, ranges, classes = with_descriptor(model).eval(), None, len(model.classes)
    tried = [dtype for dtype in reversed(supported_dtypes()) if _may_gain(model, dtype)]
    graph, found = shared_graph(layers, model.transform), dict[Dtype, np.ndarray]()
    for number, dtype in enumerate(tried, 1):
        if dtype == "int8":
            ranges = activation_ranges(graph, seen)
        engine = open_engine(layers, model.transform, dtype, ranges, graph=graph)
        found[dtype] = outputs_of(engine, pictures)
        on_progress(number / len(tried))
    descriptors = {dtype: each[:, classes:] for dtype, each in found.items()}
    ood = _with_shifts(ood, descriptors, fitted_in)
    score_shifts = _score_shifts(ood, descriptors)
    comparison = ReferenceComparison(calibration, labels, model.findings, found["fp32"][:, :classes])
    trials = {
        engine_name(dtype): _checked_score(comparison.trial(dtype, outputs[:, :classes]), score_shifts[dtype])
        for dtype, outputs in found.items()
    }
    untried = {engine_name(dtype): NO_GAIN for dtype in supported_dtypes() if dtype not in tried}
    return Admission(trials | untried, ranges, ood)


def _may_gain(model: Model, dtype: Dtype) -> bool:
    return dtype != "int8" or ARCHITECTURES[model.architecture].gains_by_int8


def _with_shifts(
    ood: OodDetector | None, descriptors: Mapping[Dtype, np.ndarray], fitted_in: Dtype
) -> OodDetector | None:
    """The detector with the mean shift of each dtype's descriptors, [n, width], against the dtype it was fitted in.

    Rounding shifts all scans nearly alike, so a few scans tell the shift, and whether anything else moves their scores.

    If this machine only emulates the latter, shifts are against fp32. Dtypes without a shift are left out.
    """
    if ood is None:
        return None
    origin = fitted_in if fitted_in in descriptors else "fp32"
    shifts = {str(dtype): (each - descriptors[origin]).mean(axis=0) for dtype, each in descriptors.items()}
    return replace(ood, shifts={dtype: shift for dtype, shift in shifts.items() if shift.any()})


def _score_shifts(ood: OodDetector | None, descriptors: Mapping[Dtype, np.ndarray]) -> dict[Dtype, float]:
    """The largest difference of an OOD score from fp32, by dtype."""
    if ood is None:
        return dict.fromkeys(descriptors, 0.0)
    scores = {dtype: ood.for_dtype(dtype).descriptors.quotients(each) for dtype, each in descriptors.items()}
    return {dtype: float(np.abs(each - scores["fp32"]).max()) for dtype, each in scores.items()}


def _checked_score(trial: Trial, shift: float) -> Trial:
    """The trial, refused if an OOD score differs too much."""
    if not trial.admitted or shift <= MAX_OOD_SHIFT:
        return trial
    why = f"an out-of-distribution score moved by {shift:.2f}, more than {MAX_OOD_SHIFT}"
    return replace(trial, admitted=False, reason=why)


def choose_dtype(metadata: Mapping[str, Any], precision: Precision = "auto") -> Dtype:
    """The dtype that a network predicts in on this machine: the fastest admitted one, or the requested one.

    Networks of earlier versions have no trials; they predict in the precision that they were trained with.
    EngineNotAdmitted if the requested dtype is not supported by the hardware, or was not admitted.
    """
    trials: Mapping[str, Any] | None = metadata.get("engines")
    supported = supported_dtypes()
    if precision == "auto":
        if trials is None and (trained := metadata.get("precision", "auto")) != "auto":
            return cast(Dtype, trained)
        admitted = (
            ("bf16", "fp32") if trials is None else tuple(dtype for dtype in supported if _is_admitted(trials, dtype))
        )
        return next(dtype for dtype in supported if dtype in admitted)
    if precision != "fp32" and precision not in supported:
        raise EngineNotAdmitted(f"precision: this machine does not compute {precision} in hardware; use auto or fp32.")
    if trials is not None and not _is_admitted(trials, precision):
        why = trials.get(engine_name(precision), {}).get("reason", "it was not tried on a machine like this one")
        raise EngineNotAdmitted(f"precision: {precision} is not admitted for this network: {why}. Use auto or fp32.")
    return precision


def choose_float_dtype(metadata: Mapping[str, Any], precision: Precision = "auto") -> Dtype:
    """The dtype for parts of a network: that of its predictions, but never int8.

    int8's ranges are known for the whole network only; the fastest other admitted dtype replaces it. Raises as
    `choose_dtype`.
    """
    dtype, trials = choose_dtype(metadata, precision), metadata.get("engines") or {}
    if dtype != "int8":
        return dtype
    return "bf16" if "bf16" in supported_dtypes() and _is_admitted(trials, "bf16") else "fp32"


def _is_admitted(trials: Mapping[str, Any], dtype: Dtype) -> bool:
    return dtype == "fp32" or bool(trials.get(engine_name(dtype), {}).get("admitted"))


@dataclass(frozen=True, eq=False)
class ReferenceComparison:
    """Compares logits [n, classes] with those of fp32, `reference`, on scans with int `labels` [n]."""

    calibration: Calibration
    labels: np.ndarray
    positive: Sequence[int]
    reference: np.ndarray

    def trial(self, dtype: Dtype, logits: np.ndarray) -> Trial:
        """Whether these logits are close enough to admit an engine with this dtype."""
        ours, theirs = (softmax(each, self.calibration.temperature) for each in (logits, self.reference))
        difference = float(np.abs(ours - theirs).max())
        changed = int((self._decide(logits) != self._decide(self.reference)).sum())
        refusal = self._refusal(dtype, logits, changed, difference)
        reason = refusal or ("the reference" if dtype == "fp32" else f"as fp32 on {len(logits)} validation scans")
        return Trial(refusal is None, reason, len(logits), changed, round(difference, 6))

    def _refusal(self, dtype: Dtype, logits: np.ndarray, changed: int, difference: float) -> str | None:
        """Why it is not admitted; None if it is."""
        if dtype == "fp32":
            return None
        if not np.isfinite(logits).all():
            return "its answers are not finite"
        if difference > MAX_PROBABILITY_SHIFT[dtype]:
            return f"a probability moved by {difference:.3f}, more than {MAX_PROBABILITY_SHIFT[dtype]}"
        if dtype == "bf16":
            return f"{changed} labels changed" if changed else None
        for name in ("f1", "recall"):
            lost = self._figure(name, self.reference) - self._figure(name, logits)
            if lost > MAX_FIGURE_LOSS:
                return f"{'F1' if name == 'f1' else 'sensitivity'} fell by {lost:.3f}, more than {MAX_FIGURE_LOSS}"
        return None

    def _decide(self, logits: np.ndarray) -> np.ndarray:
        return self.calibration.decide(logits, self.positive)

    def _figure(self, name: str, logits: np.ndarray) -> float:
        of_two = self.positive[0] if len(self.positive) == 1 and logits.shape[1] == 2 else None
        decisions = Decisions(self.labels, self._decide(logits), logits, np.arange(len(logits)), of_two)
        return float(np.nan_to_num(figures(np.ones((1, len(logits))), decisions)[name][0]))
