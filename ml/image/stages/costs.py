"""What the parts of a training cost that depend on its dataset and parameters, for `ml.image.stages.outlook`."""

from __future__ import annotations

from ml.image.dataset.splits import Split
from ml.image.learning.schedules import phases
from ml.image.learning.train import FINE_TUNE_COST, HEAD_COST
from ml.image.stages.outlook import USUAL, Cost
from ml.spec.image import Params


def costs(params: Params, split: Split, has_champion: bool) -> dict[str, Cost]:
    """Of the parts that depend on the dataset and the parameters."""
    trained, chosen, tested = map(len, (split.train, split.validation, split.test))
    changes = params.augmentation is not False
    heads = sum(
        trained * ((FINE_TUNE_COST if phase.top else HEAD_COST) + changes) * phase.epochs for phase in phases(params)
    )
    once = 0 if changes else trained
    found = {
        "learn": Cost(passes=heads + chosen + once),
        "folds": Cost(passes=params.folds * heads),
        "fit": Cost(USUAL["fit"].seconds, 64 if changes or params.fine_tune_epochs else 0),
        "test": Cost(passes=tested),
        "champion": Cost(1.0, tested) if has_champion else Cost(),
    }
    return {**found, "report": Cost(USUAL["report"].seconds + (2.0 if params.folds else 0.0))}
