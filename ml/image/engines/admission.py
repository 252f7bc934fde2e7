"""Which engines may predict with a network: each is tried on the network's own test scans, beside fp32.

Rounding is harmless for most networks and ruins some, and nobody can tell which by looking. So what is faster than fp32
has to show that it says the same: with bf16 every label is the same and no probability moves by more than 0.01; with
int8 neither F1 nor sensitivity falls by more than 0.005, and no probability moves by more than 0.05. With both no
out-of-distribution score moves by more than 0.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import numpy as np
from torch import nn

from ml.evaluation.calibration import Calibration, softmax
from ml.evaluation.intervals import Decisions, figures
from ml.evaluation.metrics import positive_index
from ml.image.engines.base import Form, Precision, outputs_of
from ml.image.engines.engines import engine_name, forms, open_engine
from ml.image.engines.graphs import Ranges, graph_of, ranges_of
from ml.image.networks.descriptor import served
from ml.image.networks.network import Model
from ml.image.networks.ood import Outliers
from ml.runtime.errors import EngineNotAdmitted

TRIED = 64
"""Test scans, at most: beyond that the trial takes longer than it tells."""
SEEN = 32
"""Training scans that give int8 its ranges. Their mean hardly moves with more."""
LARGEST = {"bf16": 0.01, "int8": 0.05}
"""How far a probability may move."""
LEAST_LOSS = 0.005
"""How far int8 may lower F1 and sensitivity."""
LARGEST_SCORE = 0.1
"""How far an out-of-distribution score may move, of the 1 from which a scan is rejected."""


@dataclass(frozen=True)
class Trial:
    """How an engine did on `scans` test scans: what it moved, and whether that is little enough."""

    admitted: bool
    reason: str
    scans: int
    labels_changed: int
    largest_difference: float  # of a calibrated probability


@dataclass(frozen=True)
class Admission:
    """All trials by the engine's name, the ranges that int8 needs (see ml.image.engines.graphs), and what the
    out-of-distribution score needs, by now with each form's shift."""

    trials: Mapping[str, Trial] = field(default_factory=dict)
    ranges: Ranges | None = None
    outliers: Outliers | None = None

    def as_dict(self) -> dict[str, Any]:
        """For a model file's metadata."""
        ranges = None if self.ranges is None else [list(one) for one in self.ranges]
        engines = {name: asdict(trial) for name, trial in self.trials.items()}
        return {"engines": engines, "ranges": ranges, "outliers": self.outliers and self.outliers.as_dict()}


def whole(model: Model) -> nn.Sequential:
    """The network from normalized pixels to logits."""
    return nn.Sequential(*model.cut())


def admit(
    model: Model,
    calibration: Calibration,
    pictures: np.ndarray,
    labels: np.ndarray,
    seen: np.ndarray,
    outliers: Outliers | None = None,
    learnt_in: Form = "fp32",
) -> Admission:
    """Try every engine that this machine computes in hardware.

    `pictures`: test scans, uint8 [n, height, width, 3], with int `labels` [n]. `seen`: training scans, for the ranges
    and the shifts. `learnt_in`: the form of the engine that gave `outliers` its descriptors.
    """
    layers, ranges = served(model).eval(), None
    tried, known = dict[Form, np.ndarray](), dict[Form, np.ndarray]()
    for form in reversed(forms()):
        if form == "int8":
            ranges = ranges_of(graph_of(layers, model.transform), seen)
        outputs = outputs_of(open_engine(layers, model.transform, form, ranges), np.concatenate([pictures, seen]))
        tried[form], known[form] = outputs[: len(pictures)], outputs[len(pictures) :]
    classes = len(model.classes)
    shifted = _shifted(outliers, {form: each[:, classes:] for form, each in known.items()}, learnt_in)
    moved = _moved(shifted, {form: each[:, classes:] for form, each in tried.items()})
    judge = Judge(calibration, labels, positive_index(model.classes), tried["fp32"][:, :classes])
    judged = {form: judge.trial(form, each[:, :classes]) for form, each in tried.items()}
    return Admission({engine_name(form): _near(judged[form], moved[form]) for form in judged}, ranges, shifted)


def _shifted(outliers: Outliers | None, descriptors: Mapping[Form, np.ndarray], learnt_in: Form) -> Outliers | None:
    """With what each form's rounding shifts in the descriptors of training scans, against the form that these were
    learnt in (where this machine only emulates that one, against fp32). What a form does not shift is left out."""
    if outliers is None:
        return None
    origin = learnt_in if learnt_in in descriptors else "fp32"
    shifts = {str(form): (each - descriptors[origin]).mean(axis=0) for form, each in descriptors.items()}
    return replace(outliers, shifts={form: shift for form, shift in shifts.items() if shift.any()})


def _moved(outliers: Outliers | None, descriptors: Mapping[Form, np.ndarray]) -> dict[Form, float]:
    """How far each form moves an out-of-distribution score, at most."""
    if outliers is None:
        return dict.fromkeys(descriptors, 0.0)
    scores = {form: outliers.through(form).descriptors.quotients(each) for form, each in descriptors.items()}
    return {form: float(np.abs(each - scores["fp32"]).max()) for form, each in scores.items()}


def _near(trial: Trial, moved: float) -> Trial:
    """The trial, refused where a score moved too far."""
    if not trial.admitted or moved <= LARGEST_SCORE:
        return trial
    why = f"an out-of-distribution score moved by {moved:.2f}, more than {LARGEST_SCORE}"
    return replace(trial, admitted=False, reason=why)


def form_of(metadata: Mapping[str, Any], precision: Precision = "auto") -> Form:
    """The form that a network predicts in here: the fastest that was admitted, or the one that is asked for.

    A file without trials, of an earlier version, predicts in the precision that it was trained with.
    EngineNotAdmitted where what is asked for is not in this machine's hardware, or was not admitted.
    """
    trials: Mapping[str, Any] | None = metadata.get("engines")
    here = forms()
    if precision == "auto":
        if trials is None and (trained := metadata.get("precision", "auto")) != "auto":
            return cast(Form, trained)
        allowed = ("bf16", "fp32") if trials is None else tuple(form for form in here if _is_admitted(trials, form))
        return next(form for form in here if form in allowed)
    if precision != "fp32" and precision not in here:
        raise EngineNotAdmitted(f"precision: this machine does not compute {precision} in hardware; use auto or fp32.")
    if trials is not None and not _is_admitted(trials, precision):
        why = trials.get(engine_name(precision), {}).get("reason", "it was not tried on a machine like this one")
        raise EngineNotAdmitted(f"precision: {precision} is not admitted for this network: {why}. Use auto or fp32.")
    return precision


def floating_form_of(metadata: Mapping[str, Any], precision: Precision = "auto") -> Form:
    """The form that parts of a network are computed in: that of its predictions, but never int8, whose ranges are of
    the whole network. There the fastest other one that was admitted. EngineNotAdmitted as `form_of` has it."""
    form, trials = form_of(metadata, precision), metadata.get("engines") or {}
    if form != "int8":
        return form
    return "bf16" if "bf16" in forms() and _is_admitted(trials, "bf16") else "fp32"


def _is_admitted(trials: Mapping[str, Any], form: Form) -> bool:
    return form == "fp32" or bool(trials.get(engine_name(form), {}).get("admitted"))


@dataclass(frozen=True, eq=False)
class Judge:
    """Compares logits [n, classes] with those of fp32, `reference`, on scans with int `labels` [n]."""

    calibration: Calibration
    labels: np.ndarray
    positive: int | None
    reference: np.ndarray

    def trial(self, form: Form, logits: np.ndarray) -> Trial:
        """Whether these are near enough for an engine of this form."""
        ours, theirs = (softmax(each, self.calibration.temperature) for each in (logits, self.reference))
        difference = float(np.abs(ours - theirs).max())
        changed = int((self._decided(logits) != self._decided(self.reference)).sum())
        why = self._against(form, logits, changed, difference)
        reason = why or ("the reference" if form == "fp32" else f"as fp32 on {len(logits)} test scans")
        return Trial(why is None, reason, len(logits), changed, round(difference, 6))

    def _against(self, form: Form, logits: np.ndarray, changed: int, difference: float) -> str | None:
        """What speaks against it; None for nothing."""
        if form == "fp32":
            return None
        if not np.isfinite(logits).all():
            return "its answers are not finite"
        if difference > LARGEST[form]:
            return f"a probability moved by {difference:.3f}, more than {LARGEST[form]}"
        if form == "bf16":
            return f"{changed} labels changed" if changed else None
        for name in ("f1", "recall"):
            lost = self._figure(name, self.reference) - self._figure(name, logits)
            if lost > LEAST_LOSS:
                return f"{'F1' if name == 'f1' else 'sensitivity'} fell by {lost:.3f}, more than {LEAST_LOSS}"
        return None

    def _decided(self, logits: np.ndarray) -> np.ndarray:
        return self.calibration.decide(logits, self.positive)

    def _figure(self, name: str, logits: np.ndarray) -> float:
        made = Decisions(self.labels, self._decided(logits), logits, np.arange(len(logits)), self.positive)
        return float(np.nan_to_num(figures(np.ones((1, len(logits))), made)[name][0]))
