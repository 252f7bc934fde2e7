"""The disk cache: its entries are not computed again, its size is bounded, and its errors never fail a training."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from ml.image.engines.features import Features
from ml.image.learning.train import TrainConfig, TrainData, train
from ml.runtime.cache import Cache, Cached, key_of, read_features
from tests.faults.disk import small_disk
from tests.ml.builders import (
    SCANS,
    CountingBackbone,
    make_narrow_model,
    make_params,
    make_scans,
    make_split,
)

MEBIBYTE = 2**20


def make_cache(folder: Path, mebibytes: float = 10) -> Cache:
    return Cache(folder / "cache", int(mebibytes * MEBIBYTE))


def content(mebibytes: float = 1, value: int = 1) -> dict[str, np.ndarray | bytes]:
    return {"array.npy": np.full(int(mebibytes * MEBIBYTE), value, np.uint8), "words.json": b"{}"}


def entries(cache: Cache) -> set[str]:
    return {path.name for path in cache.folder.iterdir()}


# --- keys ------------------------------------------------------------------------------------------------------------

PARTS = {"scans": ["a", "b"], "network": "vgg16", "top": 0, "weights": [1, 2**63], "transform": {"mean": [0.5]}}


def test_the_same_parts_have_the_same_key_in_any_order():
    assert key_of(**PARTS) == key_of(**dict(reversed(PARTS.items())))
    assert len(key_of(**PARTS)) == 64


@pytest.mark.parametrize(
    "change",
    [
        {"scans": ["b", "a"]}, {"scans": ["a"]}, {"network": "resnet18"}, {"top": 1}, {"weights": [1, 2**63 + 1]},
        {"transform": {"mean": [0.25]}}, {"engine": "openvino-bf16"}, {"network": None}, {"top": "0"},
    ],
)  # fmt: skip
def test_another_part_is_another_key(change):
    assert key_of(**{**PARTS, **change}) != key_of(**PARTS)


# --- entries ---------------------------------------------------------------------------------------------------------


def test_an_entry_comes_back_whole(tmp_path):
    cache = make_cache(tmp_path)
    assert cache.find("one") is None
    cache.store("one", content(value=7))
    entry = cache.find("one")
    assert entry is not None
    assert np.array_equal(np.load(entry / "array.npy"), content(value=7)["array.npy"])
    assert (entry / "words.json").read_bytes() == b"{}"
    assert entries(cache) == {"one"}


def test_a_newer_entry_takes_the_place_of_an_older(tmp_path):
    cache = make_cache(tmp_path)
    for value in (1, 2):
        cache.store("one", content(value=value))
    entry = cache.find("one")
    assert entry is not None
    assert np.load(entry / "array.npy")[0] == 2


def used_at(cache: Cache, key: str, seconds: int) -> None:
    os.utime(cache.folder / key, (seconds, seconds))


def test_what_was_not_used_for_longest_goes_first(tmp_path):
    cache = make_cache(tmp_path, 3.5)
    for number, key in enumerate(("a", "b", "c")):
        cache.store(key, content())
        used_at(cache, key, 1000 + number)
    assert cache.find("a") is not None  # used just now, and so younger than b and c
    cache.store("d", content())
    assert entries(cache) == {"a", "c", "d"}
    cache.store("e", content(2.4))
    assert entries(cache) == {"d", "e"} or entries(cache) == {"a", "e"} or entries(cache) == {"e"}
    held = sum(file.stat().st_size for file in cache.folder.rglob("*") if file.is_file())
    assert held <= 3.6 * MEBIBYTE


def test_storing_an_entry_again_drives_out_no_other(tmp_path):
    cache = make_cache(tmp_path, 2.5)
    for key in ("a", "b", "b", "b"):
        cache.store(key, content())
    assert entries(cache) == {"a", "b"}


def test_what_is_larger_than_the_cache_is_not_kept_and_drives_nothing_out(tmp_path):
    cache = make_cache(tmp_path, 2)
    cache.store("small", content())
    cache.store("large", content(3))
    assert entries(cache) == {"small"}


def test_what_a_killed_training_left_half_written_counts_and_goes(tmp_path):
    cache = make_cache(tmp_path, 2.5)
    torn = cache.folder / ".0123.partial"
    torn.mkdir(parents=True)
    (torn / "array.npy").write_bytes(bytes(2 * MEBIBYTE))
    os.utime(torn, (1000, 1000))
    assert cache.find("0123") is None
    cache.store("one", content())
    assert entries(cache) == {"one"}


def test_a_full_disk_is_only_logged(tmp_path, caplog):
    with small_disk(tmp_path / "small", megabytes=1) as mounted:
        if not mounted:
            pytest.skip("only root can mount a small file system")
        cache = make_cache(tmp_path / "small")
        cache.store("one", content(3))
        assert cache.find("one") is None
        assert entries(cache) == set()
    assert "cache entry could not be stored" in caplog.text
    assert "None" not in caplog.text


def test_a_read_only_folder_is_only_logged(tmp_path, caplog):
    (tmp_path / "cache").write_text("a file where the folder should be")
    make_cache(tmp_path).store("one", content())
    assert "cache entry could not be stored" in caplog.text


def _store_and_find(folder: Path, own: int) -> None:
    cache = Cache(folder, 3 * MEBIBYTE)
    for number in range(40):
        key = f"key-{number % 4}"
        cache.store(key, content(1, value=number % 4))
        entry = cache.find(f"key-{(number + own) % 4}")
        if entry is not None:
            try:
                found = np.load(entry / "array.npy", mmap_mode="r")
            except (OSError, ValueError):  # the other one removed it just now
                continue
            assert found[0] == found[-1] == int(entry.name[-1])


def test_two_trainings_share_a_cache(tmp_path):
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=_store_and_find, args=(tmp_path / "cache", own)) for own in (1, 2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    cache = Cache(tmp_path / "cache", 3 * MEBIBYTE)
    assert all(name.startswith("key-") for name in entries(cache))
    assert len(entries(cache)) <= 4


# --- features --------------------------------------------------------------------------------------------------------


def train_with(cached: Cached | None, backbone: CountingBackbone) -> list[float]:
    features = Features(backbone, make_scans(), cached=cached)
    data = TrainData(lambda top: features, np.arange(SCANS) % 2, make_split())
    losses = [
        epoch.val_loss for epoch in train(TrainConfig(make_narrow_model(), make_params(augmentation=False)), data)
    ]
    features.store_in_cache()
    return losses


def test_features_that_are_cached_are_not_computed(tmp_path):
    cached = Cached(make_cache(tmp_path, 10), "key")
    first, again, other = CountingBackbone(), CountingBackbone(), CountingBackbone()
    losses = train_with(cached, first)
    assert sum(first.seen.values()) == 40
    assert train_with(cached, again) == losses
    assert sum(again.seen.values()) == 0
    assert train_with(Cached(cached.cache, "another key"), other) == losses
    assert sum(other.seen.values()) == 40


def test_what_is_missing_is_computed_and_added(tmp_path):
    cached, backbone = Cached(make_cache(tmp_path, 10), "key"), CountingBackbone()
    train_with(cached, CountingBackbone())
    features = Features(backbone, make_scans(), cached=cached)
    whole = features.plain(np.arange(SCANS))
    assert sum(backbone.seen.values()) == SCANS - 40
    assert whole == pytest.approx(
        Features(CountingBackbone(), make_scans()).plain(np.arange(SCANS)), rel=1e-5, abs=1e-6
    )
    features.store_in_cache()
    entry = cached.entry()
    assert entry is not None
    found = read_features(entry)
    assert found is not None
    assert found[1].all()


def test_fewer_features_do_not_take_the_place_of_more(tmp_path):
    cached = Cached(make_cache(tmp_path, 10), "key")
    features = np.zeros((3, 4), np.float32)
    cached.store(features, np.array([True, True, False]))
    cached.store(features + 1, np.array([True, False, False]))
    entry = cached.entry()
    assert entry is not None
    found = read_features(entry)
    assert found is not None
    assert found[1].tolist() == [True, True, False]
    assert float(found[0].max()) == 0


@pytest.mark.parametrize("name", ["features.npy", "known.npy"])
@pytest.mark.parametrize("harm", ["torn", "gone", "empty", "foreign"])
def test_a_damaged_entry_is_computed_anew(tmp_path, name, harm):
    cached, backbone = Cached(make_cache(tmp_path, 10), "key"), CountingBackbone()
    expected = train_with(cached, CountingBackbone())
    file = cached.cache.folder / "key" / name
    whole = file.read_bytes()
    file.unlink() if harm == "gone" else file.write_bytes(
        {"torn": whole[: len(whole) // 2], "empty": b"", "foreign": b"what is this"}.get(harm, b"")
    )
    assert train_with(cached, backbone) == expected
    assert sum(backbone.seen.values()) == 40
    again = CountingBackbone()
    train_with(cached, again)
    assert sum(again.seen.values()) == 0


def test_features_of_another_number_of_scans_are_not_taken(tmp_path):
    cached = Cached(make_cache(tmp_path, 10), "key")
    cached.store(np.zeros((3, 4), np.float32), np.ones(3, bool))
    backbone = CountingBackbone()
    train_with(cached, backbone)
    assert sum(backbone.seen.values()) == 40
