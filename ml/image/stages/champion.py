"""The champion beside the new network, on the same test scans: the basis of a promotion gate.

Scores on different scans say little about which network is better, and scores on scans that a network has learned from
say nothing. So both are scored on the test scans that neither has learned from (see ml.image.dataset.lineage). Each is
scored as it predicts: with its own transform, window, temperature and threshold, on the fastest engine that it is
admitted for. Otherwise a network could score worse than itself just because of rounding.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ml.evaluation.by_patient import by_patient, judged
from ml.evaluation.calibration import Calibration
from ml.evaluation.intervals import Decisions
from ml.evaluation.metrics import ModelOutputs, score
from ml.evaluation.paired import paired
from ml.image.dataset.lineage import unseen_test_scans
from ml.image.networks import network
from ml.image.networks.network import Model
from ml.image.pixels.decoding import read
from ml.image.pixels.transforms import Transform
from ml.image.serving.predictor import Predictor
from ml.image.stages.ingestion import scans_folder
from ml.image.stages.run import Run
from ml.runtime.errors import ModelFileError
from ml.runtime.prefetch import batched, prefetch
from ml.spec.pooling import Pooling

MIN_SCANS = 10
"""Test scans that a comparison needs if the champion has learned from some of them."""
MIN_SCANS_PER_CLASS = 3
"""Number of each class among them."""

log = logging.getLogger("ml")


class NotComparable(Exception):
    """Why the two networks cannot be compared; the message continues a sentence after a colon."""


@dataclass(frozen=True)
class Comparison:
    """Metrics of both networks on the same `scans` test scans, which `test_digest` identifies.

    `paired`: see `ml.evaluation.paired`. If they are not `comparable`, `why` gives the reason and the rest is empty.
    """

    comparable: bool
    why: str = ""
    test_digest: str | None = None
    scans: int = 0
    champion: dict[str, Any] | None = None
    candidate: dict[str, Any] | None = None
    paired: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """For the `evaluated` event."""
        return asdict(self)


def compare_with_champion(
    run: Run, model: Model, outputs: ModelOutputs, on_progress: Callable[[float], None]
) -> Comparison | None:
    """Score the run's champion beside `model`, whose outputs on all test scans are `outputs`.

    None if the run has no champion. Errors of the champion never fail a training: they make it not comparable.
    """
    if run.environment.champion is None:
        return None
    try:
        return _compare(run, model, outputs, _load(run.environment.champion), on_progress)
    except NotComparable as why:
        return Comparison(False, str(why))
    except Exception as error:
        log.exception("the champion could not be scored")
        return Comparison(False, f"it could not be scored (an unforeseen {type(error).__name__})")


def _load(path: Path) -> Model:
    try:
        return network.load(path)
    except (ModelFileError, OSError, KeyError) as error:
        raise NotComparable("its file cannot be read") from error


def _compare(
    run: Run, model: Model, outputs: ModelOutputs, champion: Model, on_progress: Callable[[float], None]
) -> Comparison:
    champion = _as_it_predicts(run, champion)
    if champion.classes != model.classes:
        raise NotComparable(f"its classes are {', '.join(champion.classes)}, not {', '.join(model.classes)}")
    positions = _unseen_by_both(run, model, outputs, champion)
    scans, subset = run.split.test[positions], _subset(outputs, positions)
    ours = _outputs(run, model, scans, subset, lambda fraction: on_progress(fraction / 2))
    theirs = _outputs(run, champion, scans, subset, lambda fraction: on_progress((1 + fraction) / 2))
    candidate, mine = _judged(model, ours)
    other, its = _judged(champion, theirs)
    test = paired(mine, its, run.params.seed)
    return Comparison(True, "", run.report.digest_of(scans), len(scans), other, candidate, test)


def _judged(model: Model, outputs: ModelOutputs) -> tuple[dict[str, Any], Decisions]:
    """Its scores with those by patient, and its decisions of the patients, as it predicts.

    Its threshold and pooling are for its own positive classes.
    """
    calibration = Calibration.from_metadata(model.metadata)
    probabilities, pooling = calibration.probabilities(outputs.test_logits), Pooling.of(model.metadata)
    groups = np.arange(len(outputs.test_labels)) if outputs.groups is None else outputs.groups
    given = model.classes, outputs.test_labels, probabilities, groups, outputs.positive or (), pooling
    scores = score(outputs, calibration, model.findings).as_dict()
    found = by_patient(*given, outputs.seed, model.positive)
    return {**scores, "by_patient": found}, judged(*given, model.positive).of_finding


def _as_it_predicts(run: Run, champion: Model) -> Model:
    """At the operating point that it has now."""
    threshold, pooling = run.environment.champion_threshold, run.environment.champion_pooling
    now: dict[str, Any] = {} if pooling is None else {"pooling": dict(pooling)}
    if threshold is not None:
        now["calibration"] = asdict(replace(Calibration.from_metadata(champion.metadata), threshold=threshold))
    return replace(champion, metadata={**champion.metadata, **now})


# --- which scans -----------------------------------------------------------------------------------------------------


def _unseen_by_both(run: Run, model: Model, outputs: ModelOutputs, champion: Model) -> np.ndarray:
    """Positions among the test scans of those that neither network has learned from."""
    lineage = champion.metadata.get("lineage")
    if lineage is None:
        raise NotComparable("its file does not tell what it has learnt from")
    ancestors = (*lineage, *model.metadata.get("begun_lineage", ()))
    positions = unseen_test_scans(run.report, run.split, ancestors)
    tested = len(outputs.test_labels)
    left = np.bincount(outputs.test_labels[positions], minlength=len(model.classes))
    if len(positions) < tested and (len(positions) < MIN_SCANS or left.min() < MIN_SCANS_PER_CLASS):
        others = ", ".join(f"{count} {name}" for name, count in zip(model.classes, left, strict=True))
        raise NotComparable(
            f"of the {tested} test scans one of the two has learnt from {tested - len(positions)}, and the others are "
            f"too few: {others}, where {MIN_SCANS} scans with {MIN_SCANS_PER_CLASS} of each class are needed"
        )
    return positions


def _subset(outputs: ModelOutputs, positions: np.ndarray) -> ModelOutputs:
    """The outputs for some of the test scans."""
    groups = None if outputs.groups is None else np.unique(outputs.groups[positions], return_inverse=True)[1]
    return replace(
        outputs,
        test_labels=outputs.test_labels[positions],
        test_logits=outputs.test_logits[positions],
        groups=groups,
    )


# --- what each network predicts --------------------------------------------------------------------------------------


def _outputs(
    run: Run, model: Model, scans: np.ndarray, outputs: ModelOutputs, on_progress: Callable[[float], None]
) -> ModelOutputs:
    """The network's outputs for these scans, whose labels and groups are in `outputs`."""
    return replace(outputs, test_logits=_predicted_logits(run, model, scans, on_progress))


def _predicted_logits(run: Run, model: Model, scans: np.ndarray, on_progress: Callable[[float], None]) -> np.ndarray:
    """Logits as the network predicts them, float32 [len(scans), classes]."""
    predictor, parts, done = Predictor.from_model(model), [], 0
    pictures = _pictures(run, model.transform, scans)
    batches = (np.stack(batch) for batch in batched(pictures, predictor.engine.batch))
    for logits in predictor.logits(batches):
        parts.append(logits)
        done += len(logits)
        on_progress(done / len(scans))
    return np.concatenate(parts)


def _pictures(run: Run, transform: Transform, scans: np.ndarray) -> Iterable[np.ndarray]:
    """The scans under this transform, uint8 [height, width, 3] each; decoded again if it differs from the run's."""
    if transform.of_pixels == run.transform.of_pixels:
        return (run.pixels[scan] for scan in scans)
    return _decoded(run, transform, scans)


def _decoded(run: Run, transform: Transform, scans: np.ndarray) -> Iterator[np.ndarray]:
    folder = scans_folder(run)
    files = (folder / run.report.scans[scan].path for scan in scans)

    def resized(file: Path) -> np.ndarray:
        picture = read(file, transform.window, rules=transform.rules)
        return transform.resize(picture.pixels, picture.spacing_mm)

    return prefetch(resized, files)
