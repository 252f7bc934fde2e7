"""k-fold cross-validation (Stone 1974): k more trainings, each of which tests scans that the others learned from.

Folds are drawn from the training and validation scans, so the test scans stay unseen. All folds share the frozen
backbone: without augmentation a fold only costs the training of its head.

Each scan gets logits from the one network that did not see it. Together they choose temperature and threshold (as
scikit-learn's CalibratedClassifierCV does with `ensemble=False`), give figures on far more scans than a validation set
has, and show which labels to doubt. With `ensemble: folds` the mean of the folds' heads is what predicts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ml.evaluation.metrics import ModelOutputs, score
from ml.evaluation.out_of_fold import FIGURES, OutOfFold
from ml.image.dataset.splits import Split, fold_splits
from ml.image.learning.train import TrainConfig, logits_of, train
from ml.image.networks.architectures import ARCHITECTURES
from ml.image.networks.network import Model
from ml.image.stages.base_model import build_base_model
from ml.image.stages.run import Run, train_data
from ml.runtime.errors import naming_out_of_memory
from ml.runtime.process_group import SINGLE_PROCESS

Weights = Mapping[str, torch.Tensor]


def folds_of(run: Run) -> list[Split]:
    """The splits of the folds, which leave out the test scans; BadDataset if there are too few patients for them."""
    params, split = run.params, run.split
    among = {*split.train.tolist(), *split.validation.tolist()}
    return fold_splits(run.report, params.seed, params.folds, params.validation_size, among)


def cross_validate(run: Run, on_progress: Callable[[float], None]) -> tuple[OutOfFold, list[Weights]]:
    """What all folds gave, and the weights of their heads if they are to be an ensemble.

    `on_progress` is called with the fraction done, 0 to 1.
    """
    splits, heads, logits, figures = folds_of(run), list[Weights](), [], []
    for number, split in enumerate(splits):
        model = _fold(run, split, lambda part, number=number: on_progress((number + part) / len(splits)))  # type: ignore[misc]
        tested, scores = _test_fold(run, model, split)
        logits.append(tested)
        figures.append(scores)
        if run.params.ensemble == "folds":
            heads.append(_head(model).state_dict())
    return OutOfFold.of_folds([split.test for split in splits], logits, figures), heads


def _fold(run: Run, split: Split, on_progress: Callable[[float], None]) -> Model:
    model = build_base_model(run)
    for _ in train(TrainConfig(model, run.params, on_progress), train_data(run, model, split, SINGLE_PROCESS)):
        pass
    return model


def _test_fold(run: Run, model: Model, split: Split) -> tuple[np.ndarray, dict[str, Any]]:
    """Logits of the scans that the fold tests, and its figures."""
    top = run.params.fine_tune_blocks if run.params.fine_tune_epochs else 0
    above, labels = model.cut(top)[1].eval().requires_grad_(False), run.report.labels

    def logits(scans: np.ndarray) -> np.ndarray:
        with naming_out_of_memory():
            return logits_of(above, run.features(model, top), scans).numpy()

    tested = logits(split.test)
    outputs = ModelOutputs(
        model.classes, labels[split.test], tested, labels[split.validation], logits(split.validation),
        seed=run.params.seed, positive=run.positive,
    )  # fmt: skip
    scores = score(outputs).as_dict()
    return tested, {name: scores[name] for name in FIGURES} | {"test": len(split.test)}


def _head(model: Model) -> nn.Module:
    return model.network.get_submodule(ARCHITECTURES[model.architecture].head)


@torch.no_grad()
def take_mean_head(model: Model, heads: Sequence[Weights]) -> None:
    """Give the model, in place, the ensemble of heads with one layer: the mean of their logits is one such head.

    Its probabilities are the geometric mean of theirs, renormalized. So an ensemble is a plain network, for which every
    engine and Grad-CAM work, and it costs no more than one head.
    """
    _head(model).load_state_dict({name: torch.stack([head[name] for head in heads]).mean(0) for name in heads[0]})
