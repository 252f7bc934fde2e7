"""The order of an epoch's scans: by seed and epoch, in whole steps, optionally balanced."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml.image.engines.features import Features
from ml.image.learning.sampling import Sampler
from tests.ml.builders import CountingBackbone, make_params, make_scans

TRAIN = np.arange(100, 150)
LABELS = (np.arange(150) >= 140).astype(np.int64)  # 10 of the 50 training scans are of class 1


def make_sampler(window: int = 2048, **fields: object) -> Sampler:
    return Sampler(make_params(**fields), TRAIN, LABELS, window)


def seen(sampler: Sampler, epoch: int) -> list[int]:
    """The scans of an epoch in the order of its batches."""
    return [int(scan) for scans, batches in sampler.windows(epoch) for rows in batches for scan in scans[rows.numpy()]]


@given(
    window=st.integers(1, 200), batch_size=st.integers(1, 60), accumulate=st.integers(1, 4),
    augmentation=st.booleans(), epoch=st.integers(1, 9),
)  # fmt: skip
def test_an_epoch_sees_each_scan_once(window, batch_size, accumulate, augmentation, epoch):
    sampler = make_sampler(window, batch_size=batch_size, accumulate=accumulate, augmentation=augmentation)
    assert sorted(seen(sampler, epoch)) == list(TRAIN)
    windows = list(sampler.windows(epoch))
    for _, batches in windows[:-1]:
        assert len(batches) % accumulate == 0, "a step does not cross windows"
        assert {len(rows) for rows in batches} == {batch_size}
    for scans, batches in windows:
        assert len(scans) <= max(window, batch_size * accumulate) or sampler.one_window
        assert sum(map(len, batches)) == len(scans)


@pytest.mark.parametrize("window", [2048, 16])
@pytest.mark.parametrize("augmentation", [True, False])
def test_the_order_is_new_in_each_epoch_and_known_by_seed_and_epoch(window, augmentation):
    sampler, again = (make_sampler(window, augmentation=augmentation) for _ in range(2))
    assert seen(sampler, 1) != seen(sampler, 2)
    assert seen(again, 2) == seen(sampler, 2)
    assert seen(make_sampler(window, augmentation=augmentation, seed=1), 1) != seen(sampler, 1)


def test_windows_of_one_size_or_another_see_the_same_batches():
    assert seen(make_sampler(16, augmentation=False), 3) == seen(make_sampler(2048, augmentation=False), 3)


def test_one_window_serves_all_epochs_where_the_features_stay_and_are_few():
    assert make_sampler(augmentation=False).one_window
    assert not make_sampler(augmentation=True).one_window
    assert not make_sampler(window=49, augmentation=False).one_window
    first, second = (next(iter(make_sampler(augmentation=False).windows(epoch)))[0] for epoch in (1, 2))
    assert np.array_equal(first, second)


@pytest.mark.parametrize("augmentation", [True, False])
def test_the_balanced_sampler_draws_both_classes_equally_often(augmentation):
    sampler = make_sampler(balance="sampler", augmentation=augmentation)
    drawn = [scan for epoch in range(1, 41) for scan in seen(sampler, epoch)]
    assert len(drawn) == 40 * 50
    assert LABELS[drawn].mean() == pytest.approx(0.5, abs=0.04)
    counts = np.bincount(drawn, minlength=150)
    assert counts[:100].sum() == 0
    assert counts[100:140].mean() == pytest.approx(25, rel=0.1)
    assert counts[100:].min() > 0


def test_without_it_classes_are_seen_as_they_are():
    assert LABELS[seen(make_sampler(), 1)].mean() == pytest.approx(0.2)


def test_a_class_without_a_training_scan_does_not_disturb_the_sampler():
    labels = np.where(LABELS == 1, 3, 0)
    sampler = Sampler(make_params(balance="sampler"), TRAIN, labels)
    assert labels[[scan for epoch in range(1, 21) for scan in seen(sampler, epoch)]].mean() == pytest.approx(
        1.5, abs=0.2
    )


# --- the pictures of an epoch ----------------------------------------------------------------------------------------


class Looking(CountingBackbone):
    """An engine whose features are the pixels."""

    def stream(self, batches):
        for batch in batches:
            yield batch.reshape(len(batch), -1).astype(np.float32)


def pictures(scans: list[int], epoch: int = 1, **fields: object) -> np.ndarray:
    features = Features(Looking(), make_scans(20))
    sampler = Sampler(make_params(**fields), np.arange(20), np.arange(20) % 2)
    return sampler.features(features, np.array(scans), epoch)


@pytest.mark.parametrize("augmentation", [True, "randaugment"])
def test_a_scan_that_is_drawn_twice_is_changed_twice(augmentation):
    first, other, second = pictures([3, 4, 3], augmentation=augmentation)
    assert not np.array_equal(first, second)
    alone = pictures([3], augmentation=augmentation)[0]
    assert np.array_equal(first, alone)
    assert np.array_equal(other, pictures([4], augmentation=augmentation)[0])


@pytest.mark.parametrize("augmentation", [True, "randaugment"])
def test_pictures_are_known_by_seed_epoch_and_scan(augmentation):
    scans = list(range(20))
    whole = pictures(scans, augmentation=augmentation)
    assert np.array_equal(whole, pictures(scans, augmentation=augmentation))
    assert np.array_equal(whole[::-1], pictures(scans[::-1], augmentation=augmentation))
    assert not np.array_equal(whole, pictures(scans, epoch=2, augmentation=augmentation))
    assert not np.array_equal(whole, pictures(scans, augmentation=augmentation, seed=5))


def test_without_augmentation_pictures_are_as_they_are():
    expected = make_scans(20)[[3, 4, 3]].reshape(3, -1)
    assert np.array_equal(pictures([3, 4, 3], augmentation=False), expected)
