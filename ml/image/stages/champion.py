"""The champion beside the new network, on the same test scans: what a promotion gate goes by.

Figures of two networks on different scans say little about which is better, and figures on scans that one of them has
learnt from say nothing. So both are scored on the test scans that neither has learnt from (see
ml.image.dataset.lineage), and each as it predicts: with its own transform, window, temperature and threshold, on the
fastest engine that it is admitted for. Were one of them rounded and the other not, a network could be worse than
itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ml.evaluation.calibration import Calibration
from ml.evaluation.metrics import Judged, Scores, score
from ml.image.dataset.lineage import unlearnt
from ml.image.networks import network
from ml.image.networks.network import Model
from ml.image.pixels.decoding import decode
from ml.image.pixels.transforms import Transform
from ml.image.serving.predictor import Predictor
from ml.image.stages.ingestion import unpacked
from ml.image.stages.run import Run
from ml.runtime.errors import ModelFileError
from ml.runtime.prefetch import ahead, batched

LEAST_SCANS = 10
"""Test scans that must be left, where the champion has learnt from some: fewer tell nothing."""
LEAST_OF_CLASS = 3
"""Of each class among them."""

log = logging.getLogger("ml")


class Incomparable(Exception):
    """Why the two cannot be compared, for people: what would stand behind a colon."""


@dataclass(frozen=True)
class Comparison:
    """`champion` and `candidate`: both networks' metrics on the same `scans` test scans, those of `test_digest`. Where
    they are not `comparable`, `why` says why."""

    comparable: bool
    why: str = ""
    test_digest: str | None = None
    scans: int = 0
    champion: dict[str, Any] | None = None
    candidate: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """For the `evaluated` event."""
        return asdict(self)


def compare(state: Run, model: Model, judged: Judged, tell: Callable[[float], None]) -> Comparison | None:
    """Score the champion that the run was given beside `model`, whose answers to all test scans are `judged`.

    None where none was given. Nothing that is wrong with the champion fails a training, which is good without it.
    """
    if state.around.champion is None:
        return None
    try:
        return _compare(state, model, judged, _load(state.around.champion), tell)
    except Incomparable as why:
        return Comparison(False, str(why))
    except Exception as error:
        log.exception("the champion could not be scored")
        return Comparison(False, f"it could not be scored (an unforeseen {type(error).__name__})")


def _load(path: Path) -> Model:
    try:
        return network.load(path)
    except (ModelFileError, OSError, KeyError) as error:
        raise Incomparable("its file cannot be read") from error


def _compare(state: Run, model: Model, judged: Judged, champion: Model, tell: Callable[[float], None]) -> Comparison:
    if champion.classes != model.classes:
        raise Incomparable(f"its classes are {', '.join(champion.classes)}, not {', '.join(model.classes)}")
    places = _fair(state, model, judged, champion)
    scans, some = state.split.test[places], _only(judged, places)
    ours = _score(state, model, scans, some, lambda fraction: tell(fraction / 2))
    theirs = _score(state, champion, scans, some, lambda fraction: tell((1 + fraction) / 2))
    digest = state.report.digest_of(scans)
    return Comparison(True, "", digest, len(scans), champion=theirs.as_dict(), candidate=ours.as_dict())


# --- which scans -----------------------------------------------------------------------------------------------------


def _fair(state: Run, model: Model, judged: Judged, champion: Model) -> np.ndarray:
    """The places among the test scans of those that neither network has learnt from."""
    learnt = champion.metadata.get("lineage")
    if learnt is None:
        raise Incomparable("its file does not tell what it has learnt from")
    places = unlearnt(state.report, state.split, (*learnt, *model.metadata.get("begun_lineage", ())))
    tested = len(judged.test_labels)
    left = np.bincount(judged.test_labels[places], minlength=len(model.classes))
    if len(places) < tested and (len(places) < LEAST_SCANS or left.min() < LEAST_OF_CLASS):
        others = ", ".join(f"{count} {name}" for name, count in zip(model.classes, left, strict=True))
        raise Incomparable(
            f"of the {tested} test scans one of the two has learnt from {tested - len(places)}, and the others are too "
            f"few: {others}, where {LEAST_SCANS} scans with {LEAST_OF_CLASS} of each class are needed"
        )
    return places


def _only(judged: Judged, places: np.ndarray) -> Judged:
    """The answers to some of the test scans."""
    groups = None if judged.groups is None else np.unique(judged.groups[places], return_inverse=True)[1]
    return replace(
        judged, test_labels=judged.test_labels[places], test_logits=judged.test_logits[places], groups=groups
    )


# --- what a network says of them -------------------------------------------------------------------------------------


def _score(state: Run, model: Model, scans: np.ndarray, judged: Judged, tell: Callable[[float], None]) -> Scores:
    """The network's scores on these scans, with labels and groups as `judged` has them."""
    answers = replace(judged, test_logits=_answers(state, model, scans, tell))
    return score(answers, Calibration.of(model.metadata))


def _answers(state: Run, model: Model, scans: np.ndarray, tell: Callable[[float], None]) -> np.ndarray:
    """Its logits float32 [len(scans), classes], as it predicts."""
    predictor, found, done = Predictor.of(model), [], 0
    pictures = _pictures(state, model.transform, scans)
    batches = (np.stack(batch) for batch in batched(pictures, predictor.engine.batch))
    for logits in predictor.logits(batches):
        found.append(logits)
        done += len(logits)
        tell(done / len(scans))
    return np.concatenate(found)


def _pictures(state: Run, transform: Transform, scans: np.ndarray) -> Iterable[np.ndarray]:
    """The scans as this transform wants them, uint8 [height, width, 3] each: those of the run where it wants the same,
    else decoded once more."""
    ours = state.transform
    if (transform.height, transform.width, transform.window) == (ours.height, ours.width, ours.window):
        return (state.pixels[scan] for scan in scans)
    return _decoded(state, transform, scans)


def _decoded(state: Run, transform: Transform, scans: np.ndarray) -> Iterator[np.ndarray]:
    folder = unpacked(state)
    files = (folder / state.report.scans[scan].path for scan in scans)
    return ahead(lambda file: transform.resize(decode(file, transform.window)), files)
