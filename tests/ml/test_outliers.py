"""What is unlike the training scans is found, and what is like them is left alone; on synthetic CT, and in theory."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from ml import network, stages
from ml.admission import admit
from ml.calibration import Calibration
from ml.config import load_config
from ml.engines import engine_name, forms
from ml.input_statistics import MEANINGS
from ml.outliers import Outliers, learn
from ml.params import parse_params
from ml.phantom_files import write_dataset
from ml.predict import Predictor, ScanInput
from tests.ml.builders import encode, make_pixels, make_scans, write_zip
from tests.ml.conftest import write_config
from tests.ml.strangers import phantoms, resaved, strangers

WIDTH = 64
SPREAD = np.array([10, 8, 0.05, 0.02, 2, 0])  # of the input statistics of grey scans


def make_vectors(count: int, seed: int = 0, shift: float = 0.0) -> tuple[np.ndarray, list[dict[str, float]]]:
    """Correlated descriptors [count, WIDTH] and input statistics of `count` scans."""
    random = np.random.default_rng(seed)
    mixing = np.random.default_rng(1).normal(size=(WIDTH, WIDTH)) / np.arange(1, WIDTH + 1)[:, None]
    descriptors = random.normal(size=(count, WIDTH)) @ mixing + 3 + shift
    values = np.array([60, 50, 0.5, 0.02, 9, 0]) + random.normal(size=(count, 6)) * SPREAD
    return descriptors.astype(np.float32), [dict(zip(MEANINGS, row, strict=True)) for row in values.tolist()]


def learned(count: int = 300, seed: int = 0) -> Outliers:
    found = learn(*make_vectors(count, seed), np.arange(count))
    assert found is not None
    return found


def scored(predictor: Predictor, pictures: list[np.ndarray]) -> np.ndarray:
    scans = (ScanInput(str(number), encode(picture)) for number, picture in enumerate(pictures))
    return np.array([one.ood_score for one in predictor.predict(scans)])


# --- in theory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scans", "most"), [(20, 0.05), (60, 0.05), (300, 0.04)])
def test_about_one_in_fifty_proper_scans_is_rejected_however_few_were_learnt_from(scans, most):
    rejected = [(learned(scans, seed).scores(*make_vectors(1000, 100 + seed)) > 1).mean() for seed in range(8)]
    assert np.mean(rejected) < most
    if scans == 300:
        assert np.mean(rejected) > 0.005, "the limit is no farther away than it must be"


def test_what_lies_elsewhere_is_rejected():
    assert (learned().scores(*make_vectors(50, 2, shift=3.0)) > 1).all()


def test_scans_of_one_patient_do_not_vouch_for_each_other():
    """A limit by scans whose siblings are learnt from would take every other patient for a stranger."""
    random, patients = np.random.default_rng(0), np.repeat(np.arange(30), 10)
    centres = random.normal(size=(60, WIDTH))
    own = centres[patients] + random.normal(size=(300, WIDTH)) * 0.1
    others = centres[30 + patients] + random.normal(size=(300, WIDTH)) * 0.1
    _, statistics = make_vectors(300)
    grouped, alone = (learn(own, statistics, groups) for groups in (patients, np.arange(300)))
    rejected, wrongly = ((of.descriptors.quotients(others) > 1).mean() for of in (grouped, alone))
    assert rejected < 0.06 < 0.5 < wrongly


@pytest.mark.parametrize(("scans", "groups"), [(19, 19), (300, 9)])
def test_too_few_scans_or_patients_teach_nothing(scans, groups):
    assert learn(*make_vectors(scans), np.arange(scans) % groups) is None


def test_numbers_that_never_moved_do_not_drown_the_others():
    descriptors, statistics = make_vectors(100)
    descriptors[:, :10] = 0
    found = learn(descriptors, statistics, np.arange(100))
    unseen, of_unseen = make_vectors(200, 5)
    unseen[:, :10] = 1e-4
    assert (found.scores(unseen, of_unseen) > 1).mean() < 0.1


def test_a_file_carries_all_that_the_score_needs_and_little_of_it():
    descriptors, statistics = np.random.default_rng(0).normal(size=(512, 2048)), make_vectors(512)[1]
    found = learn(descriptors, statistics, np.arange(512))
    stored = json.dumps({"outliers": found.as_dict()}, allow_nan=False)
    assert len(stored) < 250_000
    again = Outliers.of(json.loads(stored))
    np.testing.assert_allclose(again.scores(descriptors, statistics), found.scores(descriptors, statistics), rtol=2e-3)


def test_a_file_of_an_earlier_version_carries_none():
    assert Outliers.of({}) is None
    assert Outliers.of({"outliers": None}) is None


@pytest.mark.parametrize(("name", "value"), [("colour", 40.0), ("brightness", 240.0), ("black", 0.0)])
def test_the_input_statistic_that_sets_a_scan_apart_is_named(name, value):
    usual = dict(zip(MEANINGS, (60, 50, 0.5, 0.02, 9, 0), strict=True))
    assert learned().oddity(usual) is None
    meaning = MEANINGS[name]
    expected = meaning.more if value > usual[name] else meaning.less
    assert learned().oddity({**usual, name: value}) == expected


# --- engines ---------------------------------------------------------------------------------------------------------


def test_an_engine_that_moves_the_score_is_not_admitted(small_run):
    model = network.load(small_run.model_path)
    outliers = Outliers.of(model.metadata)
    assert outliers is not None
    strict = replace(outliers, descriptors=replace(outliers.descriptors, limit=outliers.descriptors.limit / 1e6))
    pictures = np.stack([make_pixels(seed, 64, 64, bright=seed % 2 == 1) for seed in range(6)])
    usual, refused = (
        admit(model, Calibration(threshold=0.5), pictures, np.arange(6) % 2, make_scans(8, 64), each).trials.values()
        for each in (outliers, strict)
    )
    assert all(trial.admitted for trial in usual), usual
    assert [trial.admitted for trial in refused] == [form == "fp32" for form in reversed(forms())]
    assert all("out-of-distribution score moved by" in trial.reason for trial in refused if not trial.admitted)


def test_every_admitted_engine_gives_nearly_the_same_score(small_run):
    model = network.load(small_run.model_path)
    some = [make_pixels(seed, 64, 64, bright=seed % 2 == 1) for seed in range(8)]
    some += [one for pictures in strangers(2).values() for one in pictures]
    reference = scored(Predictor.of(model, "fp32"), some)
    for form in forms()[:-1]:
        assert model.metadata["engines"][engine_name(form)]["admitted"], form
        np.testing.assert_allclose(scored(Predictor.of(model, form), some), reference, rtol=0.1, err_msg=form)


def test_a_model_without_the_data_predicts_without_a_score(small_run):
    model = network.load(small_run.model_path)
    without = {name: value for name, value in model.metadata.items() if name != "outliers"}
    (one,) = Predictor.of(replace(model, metadata=without)).predict([ScanInput("a", encode(make_pixels()))])
    assert one.ood_score is None
    assert one.oddity is None
    assert set(one.statistics) == set(MEANINGS)


# --- on synthetic CT -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model file of a training on 300 slices of 60 phantoms."""
    folder = tmp_path_factory.mktemp("outliers")
    write_dataset(folder / "scans", 75, 5, seed=1, size=192)
    files = {str(path.relative_to(folder / "scans")): path.read_bytes() for path in (folder / "scans").glob("*/*.png")}
    fields = {"network": "resnet18", "weights": "none", "image_size": [96, 96, 3], "epochs": 2, "augmentation": False}
    config = load_config(write_config(folder, write_zip(files, folder / "data.zip")))
    return stages.run(config, parse_params(fields), lambda event: None).model_path


@pytest.mark.slow
def test_strangers_are_rejected_and_unseen_patients_are_not(trained):
    predictor = Predictor.load(trained)
    unseen = phantoms(20, 5, seed=77)
    assert (scored(predictor, unseen) > 1).mean() <= 0.05
    assert (scored(predictor, [resaved(one, 90, 256) for one in unseen]) > 1).mean() <= 0.05
    for kind, pictures in strangers(20).items():
        assert (scored(predictor, pictures) > 1).mean() >= 0.9, kind
