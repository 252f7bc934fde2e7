"""OOD detection: pictures unlike the training scans are rejected, others are not; on synthetic CT and vectors."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from ml.evaluation.calibration import Calibration
from ml.image.dataset.splits import Split
from ml.image.engines.admission import admit
from ml.image.engines.backends import engine_name, open_engine
from ml.image.engines.engine import outputs_of
from ml.image.engines.hardware import supported_dtypes
from ml.image.networks import network
from ml.image.networks.feature_descriptor import with_descriptor
from ml.image.networks.ood import OodDetector, UnseenDescriptors, fit_detector
from ml.image.pixels.statistics import MEANINGS
from ml.image.serving.predictor import Predictor, ScanInput
from ml.image.stages import runner, training
from ml.image.stages.run import Run
from ml.runtime.config import load_config, parse_params
from ml.synthetic.phantom_files import write_dataset
from tests.depth import depth
from tests.ml.builders import encode, make_pixels, make_scans, write_zip
from tests.ml.conftest import SMALL, write_config
from tests.ml.ood_pictures import ood_pictures, phantoms, resaved

WIDTH = 64
SPREAD = np.array([10, 8, 0.05, 0.02, 2, 0])  # of the input statistics of grey scans


def make_vectors(count: int, seed: int = 0, shift: float = 0.0) -> tuple[np.ndarray, list[dict[str, float]]]:
    """Correlated descriptors [count, WIDTH] and input statistics of `count` scans."""
    random = np.random.default_rng(seed)
    mixing = np.random.default_rng(1).normal(size=(WIDTH, WIDTH)) / np.arange(1, WIDTH + 1)[:, None]
    descriptors = random.normal(size=(count, WIDTH)) @ mixing + 3 + shift
    values = np.array([60, 50, 0.5, 0.02, 9, 0]) + random.normal(size=(count, 6)) * SPREAD
    return descriptors.astype(np.float32), [dict(zip(MEANINGS, row, strict=True)) for row in values.tolist()]


def learned(count: int = 300, seed: int = 0) -> OodDetector:
    found = fit_detector(*make_vectors(count, seed), np.arange(count))
    assert found is not None
    return found


def scored(predictor: Predictor, pictures: list[np.ndarray]) -> np.ndarray:
    scans = (ScanInput(str(number), encode(picture)) for number, picture in enumerate(pictures))
    return np.array([one.ood_score for one in predictor.predict(scans)])


# --- in theory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scans", "most"), [(25, 0.05), (60, 0.05), (300, 0.04)])
def test_about_one_in_fifty_proper_scans_is_rejected_however_few_were_learnt_from(scans, most):
    rejected = [(learned(scans, seed).scores(*make_vectors(1000, 100 + seed)) > 1).mean() for seed in range(8)]
    assert np.mean(rejected) < most
    if scans == 300:
        assert np.mean(rejected) > 0.003, "the limit is no farther away than it must be"


def test_what_lies_elsewhere_is_rejected():
    assert (learned().scores(*make_vectors(50, 2, shift=3.0)) > 1).all()


def test_scans_of_one_patient_do_not_vouch_for_each_other():
    """A limit from scans whose groups were fitted too would reject every other patient."""
    random, patients = np.random.default_rng(0), np.repeat(np.arange(30), 10)
    centres = random.normal(size=(60, WIDTH))
    own = centres[patients] + random.normal(size=(300, WIDTH)) * 0.1
    others = centres[30 + patients] + random.normal(size=(300, WIDTH)) * 0.1
    _, statistics = make_vectors(300)
    grouped, alone = (fit_detector(own, statistics, groups) for groups in (patients, np.arange(300)))
    rejected, wrongly = ((of.descriptors.quotients(others) > 1).mean() for of in (grouped, alone))
    assert rejected < 0.06 < 0.5 < wrongly


@pytest.mark.parametrize(("scans", "groups"), [(24, 24), (300, 9)])
def test_too_few_scans_or_patients_teach_nothing(scans, groups):
    assert fit_detector(*make_vectors(scans), np.arange(scans) % groups) is None


@pytest.mark.parametrize(("of_one", "others", "teaches"), [(91, 9, False), (970, 30, True), (400, 2000, True)])
def test_a_patient_of_most_scans_leaves_too_few_for_a_fit_without_them_or_less_axes(of_one, others, teaches):
    """The smallest fit limits the number of axes."""
    scans = of_one + others
    found = fit_detector(*make_vectors(scans), np.maximum(np.arange(scans) - of_one + 1, 0))
    assert (found is not None) == teaches
    if found is not None:
        unseen = make_vectors(500, 9)
        assert (found.scores(*unseen) > 1).mean() < 0.05


def test_the_limit_is_no_nearer_than_scans_that_no_weight_was_fitted_to():
    """A network clusters what it was fitted to, so these scans are close even if a fit leaves them out."""
    descriptors, statistics = make_vectors(300)
    centre, groups = descriptors.mean(axis=0), np.arange(300)
    drawn = centre + (descriptors - centre) * 0.2
    validation, proper = make_vectors(40, 1)[0], make_vectors(500, 2)[0]
    alone, beside = (
        fit_detector(drawn, statistics, groups),
        fit_detector(drawn, statistics, groups, UnseenDescriptors(validation, np.arange(40))),
    )
    wrongly, rejected = ((found.descriptors.quotients(proper) > 1).mean() for found in (alone, beside))
    assert rejected <= 0.05 < 0.9 < wrongly
    assert beside.statistics.limit == alone.statistics.limit, "no weight is between a picture and its statistics"


@pytest.mark.parametrize(("scans", "groups"), [(40, 4), (0, 0)])
def test_a_few_patients_that_were_not_learnt_from_say_nothing_of_the_limit(scans, groups):
    unseen = UnseenDescriptors(make_vectors(40, 1, shift=3.0)[0][:scans], np.arange(scans) % max(groups, 1))
    found = fit_detector(*make_vectors(300), np.arange(300), unseen)
    assert found.descriptors.limit == learned().descriptors.limit


def test_scans_linked_by_one_outside_of_the_sample_stay_grouped(small_run, monkeypatch):
    """Two scans of the sample may be linked by a third that is not in it."""
    params = parse_params(SMALL | {"augmentation": False})
    run = Run(load_config(small_run.folder / "config.yaml"), params, lambda event: None)
    seen, patients = list[np.ndarray](), np.arange(len(run.report.scans)) // 2

    def noted(descriptors: np.ndarray, statistics: list, groups: np.ndarray, unseen: UnseenDescriptors) -> None:
        seen.extend((groups, unseen.groups))

    monkeypatch.setattr(training, "OOD_SCANS", 3)
    monkeypatch.setattr(training, "fit_detector", noted)
    monkeypatch.setattr(training, "group_scans", lambda scans: patients[: len(scans)])
    training._fit_ood(run, network.load(small_run.model_path))
    sides = (run.split.train, run.split.validation)
    assert [groups.tolist() for groups in seen] == [patients[training.evenly(side, 3)].tolist() for side in sides]


@pytest.mark.parametrize(
    ("fields", "computed"),
    [
        ({"augmentation": False}, [8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19]),
        ({"augmentation": True}, [8, 9, 11, 19]),  # one of each patient, then a second one
        ({"augmentation": "randaugment"}, [8, 9, 11, 19]),
        ({"augmentation": False, "fine_tune_epochs": 1}, [8, 9, 11, 19]),
    ],
)
def test_few_scans_are_computed_for_the_detector_alone(monkeypatch, fields, computed):
    """Those of another patient first: the detector needs different patients more than scans."""
    run = Run(None, parse_params(SMALL | fields), lambda event: None)
    run.__dict__["split"] = Split(np.arange(8, 20), np.arange(4), np.arange(4, 8))
    groups = np.repeat(np.arange(3), [11, 8, 1])  # of the training scans: 3, 8 and 1
    monkeypatch.setattr(training, "OOD_SCANS_ANEW", 4)
    assert training._ood_scans(run, groups).tolist() == computed


def test_numbers_that_never_moved_do_not_drown_the_others():
    descriptors, statistics = make_vectors(100)
    descriptors[:, :10] = 0
    found = fit_detector(descriptors, statistics, np.arange(100))
    unseen, of_unseen = make_vectors(200, 5)
    unseen[:, :10] = 1e-4
    assert (found.scores(unseen, of_unseen) > 1).mean() < 0.1


def test_a_file_carries_all_that_the_score_needs_and_little_of_it():
    descriptors, statistics = np.random.default_rng(0).normal(size=(512, 2048)), make_vectors(512)[1]
    found = fit_detector(descriptors, statistics, np.arange(512))
    found = replace(found, shifts=dict.fromkeys(("int8", "bf16"), np.ones(2048)))  # of three forms, one learnt in
    stored = json.dumps({"outliers": found.as_dict()}, allow_nan=False)
    assert len(stored) < 225_000
    again = OodDetector.from_metadata(json.loads(stored))
    np.testing.assert_allclose(again.scores(descriptors, statistics), found.scores(descriptors, statistics), rtol=2e-3)


def test_a_file_of_an_earlier_version_carries_none():
    assert OodDetector.from_metadata({}) is None
    assert OodDetector.from_metadata({"outliers": None}) is None


@pytest.mark.parametrize(("name", "value"), [("colour", 40.0), ("brightness", 240.0), ("black", 0.0)])
def test_the_input_statistic_that_sets_a_scan_apart_is_named(name, value):
    usual = dict(zip(MEANINGS, (60, 50, 0.5, 0.02, 9, 0), strict=True))
    assert learned().ood_reason(usual) is None
    meaning = MEANINGS[name]
    expected = meaning.more if value > usual[name] else meaning.less
    assert learned().ood_reason({**usual, name: value}) == expected


# --- engines ---------------------------------------------------------------------------------------------------------


def test_an_engine_that_moves_the_score_is_not_admitted(small_run):
    model = network.load(small_run.model_path)
    outliers = OodDetector.from_metadata(model.metadata)
    assert outliers is not None
    generous, strict = (
        replace(outliers, descriptors=replace(outliers.descriptors, limit=outliers.descriptors.limit * factor))
        for factor in (2, 1e-6)
    )
    pictures = np.stack([make_pixels(seed, 64, 64, bright=seed % 2 == 1) for seed in range(6)])
    usual, refused = (
        admit(model, Calibration(threshold=0.5), pictures, np.arange(6) % 2, make_scans(8, 64), each).trials.values()
        for each in (generous, strict)
    )
    assert all(trial.admitted for trial in usual), usual
    assert [trial.admitted for trial in refused] == [form == "fp32" for form in reversed(supported_dtypes())]
    assert all("out-of-distribution score moved by" in trial.reason for trial in refused if not trial.admitted)


@pytest.mark.parametrize("fitted_in", [form for form in supported_dtypes() if form != "int8"])
def test_shifts_are_against_the_form_that_was_fitted_in(small_run, fitted_in):
    """Otherwise descriptors fitted in bf16 would be shifted by bf16's rounding twice."""
    model, seen = network.load(small_run.model_path), make_scans(8, 64)
    outliers = replace(OodDetector.from_metadata(model.metadata), shifts={})
    found = admit(model, Calibration(threshold=0.5), seen[:4], np.arange(4) % 2, seen, outliers, fitted_in).ood
    assert set(found.shifts) == {*supported_dtypes()} - {fitted_in}, "what is not shifted is not stored"
    layers, classes = with_descriptor(model), len(model.classes)
    means = {
        form: outputs_of(open_engine(layers, model.transform, form), seen[:4])[:, classes:].mean(axis=0)
        for form in ("fp32", fitted_in)
    }
    if fitted_in != "fp32":
        np.testing.assert_allclose(found.shifts["fp32"], means["fp32"] - means[fitted_in], atol=1e-4)


def test_a_training_tells_in_which_form_it_has_learnt(small_run):
    """With random weights VGG16 is trained in the fastest float dtype (see `training_precision` of the engines)."""
    model = network.load(small_run.model_path)
    fitted_in = model.metadata["engine"].rpartition("-")[2]
    assert set(OodDetector.from_metadata(model.metadata).shifts) == {*supported_dtypes()} - {fitted_in}


@pytest.mark.scaled
def test_every_admitted_engine_gives_nearly_the_same_score(small_run):
    model = network.load(small_run.model_path)
    admitted = [form for form in supported_dtypes() if model.metadata["engines"][engine_name(form)]["admitted"]]
    assert {*supported_dtypes()} - {*admitted} <= depth({"int8"}, set()), "of the small head, it moves the score"
    some = [make_pixels(seed, 64, 64, bright=seed % 2 == 1) for seed in range(8)]
    some += [one for pictures in ood_pictures(2).values() for one in pictures]
    reference = scored(Predictor.from_model(model, "fp32"), some)
    for form in admitted:
        np.testing.assert_allclose(scored(Predictor.from_model(model, form), some), reference, rtol=0.1, err_msg=form)


def test_a_model_without_the_data_predicts_without_a_score(small_run):
    model = network.load(small_run.model_path)
    without = {name: value for name, value in model.metadata.items() if name != "outliers"}
    (one,) = Predictor.from_model(replace(model, metadata=without)).predict([ScanInput("a", encode(make_pixels()))])
    assert one.ood_score is None
    assert one.ood_reason is None
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
    return runner.run_all(config, parse_params(fields), lambda event: None).model_path


@pytest.mark.slow
def test_ood_pictures_are_rejected_and_unseen_patients_are_not(trained):
    predictor = Predictor.load(trained)
    unseen = phantoms(20, 5, seed=77)
    assert (scored(predictor, unseen) > 1).mean() <= 0.05
    assert (scored(predictor, [resaved(one, 90, 256) for one in unseen]) > 1).mean() <= 0.05
    for kind, pictures in ood_pictures(20).items():
        assert (scored(predictor, pictures) > 1).mean() >= 0.9, kind


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A model file of a training whose backbone has memorized 70 phantoms."""
    folder = tmp_path_factory.mktemp("tuned")
    write_dataset(folder / "scans", 100, 1, seed=1, size=192)
    files = {str(path.relative_to(folder / "scans")): path.read_bytes() for path in (folder / "scans").glob("*/*.png")}
    fields = {
        "network": "resnet18", "weights": "none", "image_size": [64, 64, 3], "augmentation": False, "dropout": 0.0,
        "standardize": False, "epochs": 1, "learning_rate": 1e-6, "optimizer": "adamw", "batch_size": 8,
        "fine_tune_blocks": 3, "fine_tune_epochs": 30, "fine_tune_learning_rate": 5e-4,
    }  # fmt: skip
    config = load_config(write_config(folder, write_zip(files, folder / "data.zip")))
    return runner.run_all(config, parse_params(fields), lambda event: None).model_path


@pytest.mark.slow
@pytest.mark.full
def test_a_fine_tuned_backbone_does_not_reject_other_patients(tuned):
    """With limits from training scans alone, 39 of these 200 were rejected."""
    predictor = Predictor.load(tuned)
    assert (scored(predictor, phantoms(200, 1, seed=77)) > 1).mean() <= 0.05
    for kind, pictures in ood_pictures(20).items():
        assert (scored(predictor, pictures) > 1).mean() >= 0.9, kind
