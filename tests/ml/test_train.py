"""Training: what it learns, what it computes twice (nothing), and what it leaves in the network."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ml import network
from ml.errors import BadParams
from ml.head import Head
from ml.train import TrainConfig, train, windows
from tests.ml.builders import SCANS, CountingBackbone, make_data, make_params


@pytest.fixture
def net():
    return network.build(2, seed=0)


def test_without_augmentation_no_picture_is_seen_twice(net):
    backbone = CountingBackbone()
    list(train(TrainConfig(net, make_params(augmentation=False)), make_data(backbone)))
    assert len(backbone.seen) == SCANS
    assert set(backbone.seen.values()) == {1}


def test_with_augmentation_held_out_scans_are_seen_once_and_training_scans_once_an_epoch(net):
    backbone = CountingBackbone()
    list(train(TrainConfig(net, make_params()), make_data(backbone)))
    assert sum(backbone.seen.values()) == 8 + 3 * 32
    assert len(backbone.seen) == 8 + 3 * 32


def test_it_learns_and_tells_every_epoch(net):
    heard: list[float] = []
    config = TrainConfig(net, make_params(augmentation=False, epochs=6), heard.append)
    epochs = list(train(config, make_data(CountingBackbone())))
    assert [epoch.epoch for epoch in epochs] == [1, 2, 3, 4, 5, 6]
    assert epochs[-1].train_loss < epochs[0].train_loss
    assert epochs[-1].val_accuracy >= 0.75
    assert heard == sorted(heard)
    assert heard[-1] == pytest.approx(1.0)


@pytest.mark.slow
@pytest.mark.parametrize("augmentation", [True, False])
def test_the_same_seed_gives_the_same_run(augmentation):
    runs = [
        list(train(TrainConfig(network.build(2, 0), make_params(augmentation=augmentation, epochs=2)), make_data(one)))
        for one in (CountingBackbone(), CountingBackbone())
    ]
    assert [epoch.val_loss for epoch in runs[0]] == pytest.approx([epoch.val_loss for epoch in runs[1]], rel=1e-5)


def test_training_leaves_the_callers_random_numbers_alone(net):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    list(train(TrainConfig(net, make_params(epochs=1)), make_data(CountingBackbone())))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("standardize", [True, False])
def test_the_saved_network_is_a_plain_vgg16_with_the_same_logits(net, standardize):
    params, data = make_params(standardize=standardize, learning_rate=0.001), make_data(CountingBackbone())
    head = Head(net, params)
    head.enter(torch.from_numpy(data.features.plain(data.split.train)))
    labels = torch.from_numpy(data.labels[data.split.train])
    for rows in torch.arange(32).split(8):
        head.learn(rows, labels[rows])
    held_out = torch.from_numpy(data.features.plain(data.split.held_out))
    in_training = head.logits(held_out)
    head.finish()
    with torch.no_grad():
        folded = net.classifier(held_out)
    assert float((in_training - folded).abs().max()) < 1e-3 * float(in_training.abs().max())


def test_the_last_epochs_loss_is_the_finished_networks(net):
    data = make_data(CountingBackbone())
    *_, last = train(TrainConfig(net, make_params(augmentation=False)), data)
    with torch.no_grad():
        logits = net.classifier(torch.from_numpy(data.features.plain(data.split.held_out)))
    loss = float(F.cross_entropy(logits, torch.from_numpy(data.labels[data.split.held_out])))
    assert loss == pytest.approx(last.val_loss, rel=1e-3, abs=1e-5)


def test_a_network_that_diverges_says_so(net):
    with pytest.raises(BadParams, match="learning_rate"):
        list(train(TrainConfig(net, make_params(learning_rate=10.0, epochs=30)), make_data(CountingBackbone())))


def test_a_large_dataset_is_taken_in_windows_of_whole_batches(monkeypatch):
    monkeypatch.setattr("ml.train.WINDOW", 20)
    data = make_data(CountingBackbone())
    taken = list(windows(data, make_params(), epoch=1))
    assert [len(scans) for scans, _ in taken] == [16, 16]
    assert sorted(scan for scans, _ in taken for scan in scans) == list(data.split.train)


@pytest.mark.slow
def test_windows_learn_what_one_window_learns(monkeypatch):
    losses = []
    for size in (2048, 16):
        monkeypatch.setattr("ml.train.WINDOW", size)
        params = make_params(standardize=False, augmentation=False, learning_rate=0.001, epochs=3)
        net = network.build(2, 0)
        for layer in (net.classifier[2], net.classifier[5]):
            layer.p = 0.0  # dropout draws by row order, which windows keep, but the batches' order differs
        losses.append([epoch.val_loss for epoch in train(TrainConfig(net, params), make_data(CountingBackbone()))])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
