"""VggHeadLearner, TorchLearner and a plain loop give the same result, in float64 without dropout."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import nn

from ml.image.learning.learner import Batch, Criterion, Learner, cloned
from ml.image.learning.schedules import learning_rate, phases
from ml.image.learning.standardization import Standardization
from ml.image.learning.torch_learner import TorchLearner
from ml.image.learning.train import step_share
from ml.image.learning.vgg_head import VggHeadLearner
from ml.spec.image import Params
from tests.ml.builders import make_params

WIDTH, ROWS, SIZE = 90, 21, 5  # 21 rows in batches of 5: the last one has a single row
LABELS = torch.arange(ROWS) % 3
WEIGHTS = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)


def make_classifier() -> nn.Sequential:
    torch.manual_seed(0)
    hidden = [nn.Linear(WIDTH, 16), nn.ReLU(), nn.Dropout(0.0), nn.Linear(16, 12), nn.ReLU(), nn.Dropout(0.0)]
    return nn.Sequential(*hidden, nn.Linear(12, 3)).double()


def features_of(window: int) -> torch.Tensor:
    return torch.rand(ROWS, WIDTH, generator=torch.Generator().manual_seed(window), dtype=torch.float64)


def batches_of(params: Params, epoch: int) -> list[Batch]:
    """An epoch's batches, in another order each time, with the learning rates of the schedule."""
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(epoch)).split(SIZE)
    (phase,) = phases(params)
    found = []
    for number, rows in enumerate(order):
        completes, share = step_share(number, len(order), params.accumulate)
        rate = learning_rate(params, phase, epoch + number / len(order), [])
        found.append(Batch(rows, LABELS[rows], share, rate if completes else None))
    return found


def make_head(params: Params, criterion: Criterion, classifier: nn.Sequential) -> Learner:
    return VggHeadLearner(classifier, params, criterion)


def make_tail(params: Params, criterion: Criterion, classifier: nn.Sequential) -> Learner:
    return TorchLearner(nn.Sequential(classifier), params, phases(params)[0], criterion)


def learned(
    make: Callable[[Params, Criterion, nn.Sequential], Learner], params: Params, criterion: Criterion, windows: int
) -> tuple[nn.Sequential, list[float]]:
    """The classifier after three epochs, and the loss of each batch."""
    classifier, losses = make_classifier(), []
    learner = make(params, criterion, classifier)
    for epoch in range(3):
        for window in range(windows):
            if windows > 1 or not learner.in_window:
                learner.enter_window(features_of(window))
            losses += [learner.learn(batch)[1] for batch in batches_of(params, epoch)]
        if windows > 1:
            learner.leave_window()
    learner.finish()
    return classifier, losses


def by_hand(params: Params, criterion: Criterion, windows: int) -> tuple[nn.Sequential, list[float]]:
    """The same as one plain torch loop."""
    classifier, losses = make_classifier(), []
    standardization = Standardization(params.standardizes)
    standardization.fit(features_of(0))
    kind = torch.optim.AdamW if params.optimizer == "adamw" else torch.optim.SGD
    own = {} if params.optimizer == "adamw" else {"momentum": params.momentum}
    optimizer = kind(classifier.parameters(), 1.0, weight_decay=params.weight_decay, **own)
    loss_of = nn.CrossEntropyLoss(criterion.weights, label_smoothing=criterion.smoothing)
    for epoch in range(3):
        for window in range(windows):
            inputs = standardization(features_of(window))
            for batch in batches_of(params, epoch):
                loss = loss_of(classifier(inputs[batch.rows]), batch.labels)
                losses.append(float(loss))
                (loss * batch.share).backward()
                if batch.rate is None:
                    continue
                if params.clip_norm is not None:
                    nn.utils.clip_grad_norm_(classifier.parameters(), params.clip_norm)
                optimizer.param_groups[0]["lr"] = batch.rate
                optimizer.step()
                optimizer.zero_grad()
    with torch.no_grad():
        standardization.fold(classifier[0])
    return classifier, losses


CASES = {
    "as it is": {},
    "no momentum": {"momentum": 0.0},
    "weight decay": {"weight_decay": 0.05},
    "clipped": {"clip_norm": 0.2},
    "clipped, decaying": {"clip_norm": 0.2, "weight_decay": 0.05},
    "accumulated": {"accumulate": 2},
    "accumulated, clipped": {"accumulate": 3, "clip_norm": 0.2},
    "smoothed": {"label_smoothing": 0.1},
    "weighted": {"balance": "weights"},
    "cosine": {"schedule": "cosine", "warmup_epochs": 1},
    "step": {"schedule": "step", "step_epochs": 1},
    "plateau": {"schedule": "plateau"},
    "all": {
        "weight_decay": 0.05, "clip_norm": 0.3, "accumulate": 2, "label_smoothing": 0.1, "balance": "weights",
        "schedule": "cosine", "warmup_epochs": 1,
    },
}  # fmt: skip


def compare(make, fields: dict[str, object], windows: int, standardize: bool) -> None:
    params = make_params(**{"learning_rate": 0.1, "standardize": standardize, **fields})
    criterion = Criterion(WEIGHTS if params.balance == "weights" else None, params.label_smoothing)
    ours, losses = learned(make, params, criterion, windows)
    theirs, expected = by_hand(params, criterion, windows)
    assert losses == pytest.approx(expected, rel=1e-9)
    for (name, value), wanted in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.allclose(value, wanted, rtol=0, atol=1e-9), name
    assert (make_classifier()[3].weight - ours[3].weight).abs().max() > 1e-3


@pytest.mark.parametrize("make", [make_head, make_tail])
@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("windows", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_what_learns_is_plain_sgd(make, case, windows, standardize):
    compare(make, CASES[case], windows, standardize)


@pytest.mark.parametrize("fields", [{}, {"weight_decay": 0.1, "clip_norm": 0.3, "accumulate": 2}])
def test_the_tail_is_plain_adamw_where_it_is_asked_for(fields):
    compare(make_tail, {"optimizer": "adamw", "learning_rate": 0.01, **fields}, windows=1, standardize=True)


def test_clipping_does_clip_in_these_tests():
    params = make_params(learning_rate=0.1, standardize=False)
    plain, _ = by_hand(params, Criterion(), 1)
    clipped, _ = by_hand(make_params(learning_rate=0.1, standardize=False, clip_norm=0.2), Criterion(), 1)
    assert not torch.allclose(plain[3].weight, clipped[3].weight, atol=1e-3)


@pytest.mark.parametrize("make", [make_head, make_tail])
def test_logits_are_those_of_the_finished_network(make):
    params, other = make_params(learning_rate=0.1, standardize=True), features_of(9)
    classifier = make_classifier()
    learner = make(params, Criterion(), classifier)
    learner.enter_window(features_of(0))
    for batch in batches_of(params, 0):
        learner.learn(batch)
    before = learner.logits(other)
    learner.finish()
    assert torch.allclose(before, classifier(other), atol=1e-10)
    assert not any(layer.training for layer in classifier)


@pytest.mark.parametrize("make", [make_head, make_tail])
@pytest.mark.parametrize("windows", [1, 2])
def test_the_best_place_is_gone_back_to(make, windows):
    params, other = make_params(learning_rate=0.1, standardize=True, weight_decay=0.05), features_of(9)
    classifier = make_classifier()
    learner = make(params, Criterion(), classifier)
    seen = []
    for epoch in range(3):
        for window in range(windows):
            if windows > 1 or not learner.in_window:
                learner.enter_window(features_of(window))
            for batch in batches_of(params, epoch):
                learner.learn(batch)
        if windows > 1:
            learner.leave_window()
        seen.append((learner.logits(other), cloned(learner.weights())))
    assert all(not torch.allclose(one[0], another[0], atol=1e-3) for one, another in pairwise(seen))
    learner.set_weights(seen[0][1])
    learner.finish()
    assert torch.allclose(classifier(other), seen[0][0], atol=1e-9)


# --- the criterion ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_parts_of_a_batch_add_up_to_its_mean(weights, smoothing):
    criterion, logits = Criterion(weights, smoothing), torch.randn(7, 3).double()
    labels = LABELS[:7]
    parts = [criterion.partial(logits[part], labels[part], labels) for part in (slice(0, 3), slice(3, 7), slice(7, 9))]
    assert float(sum(parts)) == pytest.approx(float(criterion(logits, labels)), rel=1e-12)


# --- standardization -------------------------------------------------------------------------------------------------


def test_standardized_features_have_mean_zero_and_one_spread():
    features = features_of(0) * 7 + 3
    standardization = Standardization(True)
    standardization.fit(features)
    ours = standardization(features)
    assert float(ours.mean(0).abs().max()) < 1e-12
    assert float(ours.std(0).max()) < 1.0
    assert float(ours.std(0).min()) > 0.5
    before = copy.deepcopy(standardization.state())
    standardization.fit(features * 2)
    assert all(torch.equal(value, before[name]) for name, value in standardization.state().items())


def test_a_feature_that_never_moved_is_not_blown_up():
    features = features_of(0)
    features[:, 5] = 1.0
    standardization = Standardization(True)
    standardization.fit(features)
    unseen = features.clone()
    unseen[:, 5] = 1.1
    assert float(standardization(unseen)[:, 5].abs().max()) < 2.0


LARGE = 300.0
"""|x|² is then 2.7 million, as of ImageNet's VGG16."""


@pytest.mark.parametrize(
    ("scale", "new_head", "standardized"), [(LARGE, True, True), (1.0, True, False), (LARGE, False, False)]
)
def test_auto_standardizes_large_features_below_a_new_head(scale, new_head, standardized):
    auto, features = Standardization(None, new_head), features_of(0) * scale
    auto.fit(features)
    assert bool(auto.state()) is standardized
    if standardized:
        assert 0.5 < float(auto(features).std(0).min()) <= float(auto(features).std(0).max()) <= 1.0
    assert torch.equal(auto(features), features) is not standardized


def test_the_first_window_decides_for_all_and_a_checkpoint_keeps_the_decision():
    auto, again = Standardization(None), Standardization(None)
    auto.fit(features_of(0))
    again.restore(auto.state())
    for one in (auto, again):
        one.fit(features_of(1) * LARGE)
        assert one.state() == {}
    large, resumed = Standardization(None), Standardization(None)
    large.fit(features_of(0) * LARGE)
    resumed.restore(large.state())
    assert torch.equal(resumed(features_of(1)), large(features_of(1)))


@pytest.mark.parametrize("make", [make_head, make_tail])
def test_at_the_default_rate_a_new_head_learns_from_large_features(make):
    params = make_params(learning_rate=0.001, weights="imagenet", epochs=3)
    classifier, losses = learned_from(make, params, LARGE)
    assert max(losses) < 2 * losses[0], "the loss does not go up first"
    assert classifier(features_of(0) * LARGE).shape == (ROWS, 3), "the network that is left takes raw features"
    assert max(learned_from(make, make_params(learning_rate=0.001, standardize=False), LARGE)[1]) > 5 * losses[0]


def learned_from(make, params: Params, scale: float) -> tuple[nn.Sequential, list[float]]:
    """A classifier with the initial weights of VGG16's head after some epochs, and the loss of each batch."""
    classifier, losses = make_classifier(), []
    learner = make(params, Criterion(), classifier)
    learner.enter_window(features_of(0) * scale)
    for epoch in range(3):
        losses += [learner.learn(batch)[1] for batch in batches_of(params, epoch)]
    learner.finish()
    return classifier, losses
