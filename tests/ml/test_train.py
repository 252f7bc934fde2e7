"""The training loop: results, no repeated computation, and the network that is kept."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ml.image.learning.train import TrainConfig, TrainData, class_weights, logits_of, step_share, train
from ml.image.networks.network import Model
from ml.runtime.errors import BadParams
from ml.runtime.events import Epoch
from ml.spec.image import Params
from tests.ml.builders import (
    TRAINED,
    VALIDATED,
    CountingBackbone,
    make_data,
    make_narrow_model,
    make_params,
    make_tiny_model,
    make_tuned_data,
)


def run(model: Model, params: Params, data: TrainData, **config: object) -> list[Epoch]:
    return list(train(TrainConfig(model, params, **config), data))


def validation_loss(model: Model, data: TrainData) -> float:
    """The validation loss of the network in its current state."""
    _, above = model.cut()
    with torch.no_grad():
        logits = above(torch.from_numpy(data.features(0).plain(data.split.validation)))
    return float(F.cross_entropy(logits, torch.from_numpy(data.labels[data.split.validation])))


# --- what is computed ------------------------------------------------------------------------------------------------


def test_without_augmentation_no_picture_is_seen_twice():
    backbone = CountingBackbone()
    run(make_narrow_model(), make_params(augmentation=False), make_data(backbone))
    assert len(backbone.seen) == TRAINED + VALIDATED
    assert set(backbone.seen.values()) == {1}


@pytest.mark.parametrize("augmentation", [True, "randaugment"])
def test_with_augmentation_validation_scans_are_seen_once_and_training_scans_once_an_epoch(augmentation):
    backbone = CountingBackbone()
    run(make_narrow_model(), make_params(augmentation=augmentation), make_data(backbone))
    assert sum(backbone.seen.values()) == VALIDATED + 3 * TRAINED


def test_with_augmentation_each_epochs_pictures_are_new():
    backbone = CountingBackbone()
    run(make_narrow_model(), make_params(), make_data(backbone))
    assert len(backbone.seen) == VALIDATED + 3 * TRAINED


# --- what is learned and told ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["vgg", "gap"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_training_learns_and_yields_every_epoch(head, optimizer):
    heard: list[float] = []
    params = make_params(augmentation=False, epochs=6, optimizer=optimizer, learning_rate=0.003)
    epochs = run(make_narrow_model(head=head), params, make_data(), on_progress=heard.append)
    assert [epoch.epoch for epoch in epochs] == [1, 2, 3, 4, 5, 6]
    assert epochs[-1].train_loss < epochs[0].train_loss / 2
    assert epochs[-1].val_accuracy >= 0.75
    assert epochs[-1].val_f1 == pytest.approx(epochs[-1].val_accuracy, abs=0.3)
    assert heard == sorted(heard)
    assert heard[-1] == pytest.approx(1.0)


@pytest.mark.parametrize(
    "fields", [{"augmentation": False}, {"augmentation": True}, {"augmentation": False, "fine_tune_epochs": 2}]
)
def test_the_progress_ends_at_one(fields):
    heard: list[float] = []
    model = make_tiny_model()
    run(model, make_params(**fields), make_tuned_data(model), on_progress=heard.append)
    assert heard == sorted(heard)
    assert heard[-1] == pytest.approx(1.0)
    assert max(np.diff([0.0, *heard])) < 0.5


def test_every_step_is_reported_with_its_mean_loss_and_rate():
    told: list[tuple[int, float, float]] = []
    params = make_params(augmentation=False, epochs=2, accumulate=3, learning_rate=0.001)
    data = make_data()
    epochs = run(make_narrow_model(dropout=0.0), params, data, on_step=lambda *step: told.append(step))
    assert [epoch for epoch, _, _ in told] == [1, 1, 2, 2]  # 4 batches of 8: a step of three, and one of one
    assert {rate for _, _, rate in told} == {0.001}
    for number, epoch in enumerate(epochs):
        first, second = told[2 * number][1], told[2 * number + 1][1]
        assert (3 * first + second) / 4 == pytest.approx(epoch.train_loss, rel=1e-6)


@pytest.mark.parametrize("augmentation", [True, False, "randaugment"])
def test_the_same_seed_gives_the_same_run(augmentation):
    runs = [run(make_narrow_model(), make_params(augmentation=augmentation, epochs=2), make_data()) for _ in range(2)]
    assert [epoch.val_loss for epoch in runs[0]] == [epoch.val_loss for epoch in runs[1]]


def test_another_seed_gives_another_run():
    runs = [run(make_narrow_model(), make_params(seed=seed, epochs=2), make_data()) for seed in (0, 1)]
    assert runs[0][-1].val_loss != runs[1][-1].val_loss


def test_training_leaves_the_callers_random_numbers_alone():
    model, data = make_narrow_model(), make_data()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    run(model, make_params(epochs=1, augmentation="randaugment"), data)
    assert torch.equal(torch.rand(1), expected)


def test_a_network_that_diverges_says_so():
    with pytest.raises(BadParams, match="learning_rate"):
        run(make_narrow_model(), make_params(learning_rate=10.0, epochs=30), make_data())


# --- which network is left -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["vgg", "gap"])
@pytest.mark.parametrize("augmentation", [False, True])
@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_network_that_is_left_is_the_kept_epochs(head, augmentation, keep):
    params = make_params(augmentation=augmentation, epochs=8, learning_rate=0.01 if augmentation else 0.003, keep=keep)
    model, data = make_narrow_model(head=head), make_data()
    epochs = run(model, params, data)
    kept = min(epochs, key=lambda epoch: epoch.val_loss) if keep == "best" else epochs[-1]
    if head == "vgg":
        assert min(epochs, key=lambda epoch: epoch.val_loss) is not epochs[-1], "this test must choose"
    assert validation_loss(model, data) == pytest.approx(kept.val_loss, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("head", ["vgg", "gap"])
def test_the_network_that_is_left_takes_raw_features(head, standardize):
    model, data = make_narrow_model(head=head), make_data()
    rate = 0.001 if standardize else 1e-5
    *_, last = run(model, make_params(standardize=standardize, learning_rate=rate, keep="last"), data)
    assert validation_loss(model, data) == pytest.approx(last.val_loss, rel=1e-4)
    assert not model.network.training
    assert all(parameter.grad is None for parameter in model.network.parameters())


def test_patience_ends_a_training_that_gains_nothing_more():
    params = make_params(augmentation=False, epochs=50, learning_rate=0.003, patience=2)
    epochs = run(make_narrow_model(), params, make_data())
    best = min(epochs, key=lambda epoch: epoch.val_loss)
    assert len(epochs) < 50
    assert epochs[-1].epoch == best.epoch + 2


def test_each_figure_can_decide_the_best_epoch():
    params = make_params(augmentation=True, epochs=8, monitor="val_accuracy")
    model, data = make_narrow_model(), make_data()
    epochs = run(model, params, data)
    best = max(epochs, key=lambda epoch: (epoch.val_accuracy, -epoch.epoch))
    assert best is not epochs[-1], "this test must choose"
    assert validation_loss(model, data) == pytest.approx(best.val_loss, rel=1e-3)


# --- with unfrozen blocks --------------------------------------------------------------------------------------------

TUNED = {
    "augmentation": False, "epochs": 3, "fine_tune_epochs": 4, "fine_tune_learning_rate": 0.01, "precision": "fp32",
}  # fmt: skip


@pytest.mark.parametrize("augmentation", [False, True])
@pytest.mark.parametrize("standardize", [False, True])
def test_tuning_changes_the_unfrozen_block_and_nothing_below(augmentation, standardize):
    model = make_tiny_model()
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    data = make_tuned_data(model)
    fields = {**TUNED, "augmentation": augmentation, "standardize": standardize, "keep": "last"}
    epochs = run(model, make_params(**fields), data)
    assert [epoch.phase for epoch in epochs] == ["head"] * 3 + ["fine_tune"] * 4
    assert epochs[-1].val_loss < epochs[2].val_loss
    changed = {name for name, value in model.network.state_dict().items() if not torch.equal(value, before[name])}
    assert not [name for name in changed if name.startswith("blocks.0")]
    assert {"blocks.1.0.weight", "blocks.1.1.weight", "head.1.weight"} <= changed
    assert not [name for name in changed if "running" in name or "num_batches" in name]


@pytest.mark.parametrize("rate", [0.01, 0.1])
def test_the_best_epoch_of_both_phases_is_left(rate):
    model = make_tiny_model()
    params = make_params(**{**TUNED, "fine_tune_learning_rate": rate})
    epochs = run(model, params, make_tuned_data(model))
    best = min(epochs, key=lambda epoch: epoch.val_loss)
    assert best.phase == ("fine_tune" if rate == 0.01 else "head"), "this test must choose"
    assert validation_loss(model, make_tuned_data(model)) == pytest.approx(best.val_loss, rel=1e-4)


def test_patience_counts_in_each_phase():
    model = make_tiny_model()
    params = make_params(**{**TUNED, "epochs": 40, "learning_rate": 1.0, "patience": 2, "fine_tune_epochs": 2})
    epochs = run(model, params, make_tuned_data(model))
    assert len([epoch for epoch in epochs if epoch.phase == "head"]) < 40
    assert len([epoch for epoch in epochs if epoch.phase == "fine_tune"]) == 2


def test_blocks_that_diverge_name_the_rate_that_is_theirs():
    model = make_tiny_model()
    params = make_params(**{**TUNED, "fine_tune_learning_rate": 10.0, "fine_tune_epochs": 30})
    with pytest.raises(BadParams, match=r"^fine_tune_learning_rate: .* clip_norm"):
        run(model, params, make_tuned_data(model))


# --- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batches", "accumulate", "shares"),
    [(4, 1, [1, 1, 1, 1]), (4, 3, [None, None, 1 / 3, 1]), (5, 2, [None, 0.5, None, 0.5, 1]), (2, 8, [None, 0.5])],
)
def test_steps_take_whole_groups_and_the_last_what_is_left(batches, accumulate, shares):
    steps = [step_share(number, batches, accumulate) for number in range(batches)]
    assert [share if completes else None for completes, share in steps] == shares
    total = sum(share for _, share in steps)
    assert total == pytest.approx(math.ceil(batches / accumulate))


def test_class_weights_are_scikit_learns():
    from sklearn.utils.class_weight import compute_class_weight

    data = make_data()
    labels = data.labels.copy()
    labels[:26] = 0
    rare = TrainData(data.features, labels, data.split)
    expected = compute_class_weight("balanced", classes=np.array([0, 1]), y=labels[data.split.train])
    assert class_weights(make_params(balance="weights"), rare).numpy() == pytest.approx(expected)
    assert class_weights(make_params(), rare) is None


def test_logits_come_in_the_order_of_the_scans():
    data, model = make_data(), make_narrow_model()
    scans = np.array([7, 3, 40, 3])
    model.network.requires_grad_(False)
    logits = logits_of(model.network.classifier.eval(), data.features(0), scans)
    alone = [logits_of(model.network.classifier, data.features(0), np.array([scan])) for scan in scans]
    assert logits.numpy() == pytest.approx(torch.cat(alone).numpy(), rel=1e-4, abs=1e-6)
