"""Predictions: in order, consistent with training, and one error per broken scan."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from ml.image.dataset.scans import load_manifest
from ml.image.dataset.splits import split_scans
from ml.image.networks import network
from ml.image.pipeline import ImagePipeline
from ml.image.pixels.decoding import decode
from ml.image.pixels.transforms import Transform
from ml.image.serving.predictor import CachedScan, Predictor, ScanInput, predict
from ml.runtime.errors import ImageError, ModelFileError
from ml.runtime.prefetch import batched_for_streams
from tests.ml.builders import encode, make_dicom, make_files, make_pixels
from tests.processes import DATA


@pytest.fixture(scope="module")
def predictor(small_run):
    return Predictor.load(small_run.model_path)


def test_predictions_come_in_the_order_of_the_scans(predictor):
    scans = [ScanInput(f"scan {i}", encode(make_pixels(i, bright=i % 2 == 1))) for i in range(40)]
    alone = {scan.id: next(predictor.predict([scan])) for scan in scans[:3]}
    together = list(predictor.predict(iter(scans)))
    assert [one.id for one in together] == [scan.id for scan in scans]
    for one in together[:3]:
        assert one.label == alone[one.id].label
        assert one.probabilities == pytest.approx(alone[one.id].probabilities, abs=0.02)


def test_a_prediction_names_the_likeliest_class_and_probabilities_sum_to_one(predictor):
    one = next(predictor.predict([ScanInput("a", encode(make_pixels()))]))
    assert set(one.probabilities) == {"Normal", "Tumor"}
    assert sum(one.probabilities.values()) == pytest.approx(1, abs=1e-5)
    assert one.confidence == one.probabilities[one.label] == max(one.probabilities.values())
    assert one.error_code is None


def test_it_recognizes_what_it_was_trained_on(predictor):
    scans = [ScanInput(name, content) for name, content in make_files(20, side=64).items()]
    right = [one.id.startswith(one.label) for one in predictor.predict(scans)]
    assert sum(right) >= 0.9 * len(right)


def test_broken_scans_anywhere_are_errors_of_their_own(predictor, tmp_path):
    good = encode(make_pixels())
    sources = [b"junk", *[good] * 20, b"", tmp_path / "missing.png", good, *[b"x"] * 40]
    found = list(predictor.predict(ScanInput(str(i), source) for i, source in enumerate(sources)))
    assert [one.id for one in found] == [str(i) for i in range(len(sources))]
    assert [one.error_code is None for one in found] == [source == good for source in sources]
    assert {one.error_code for one in found} == {None, "BAD_IMAGE"}
    assert all(one.error_detail.endswith(".") and one.label is None for one in found if one.error_code)


def test_logits_of_batches_are_those_that_predictions_are_made_of(predictor):
    """The engine's outputs contain the descriptor as well."""
    pictures = [make_pixels(seed, 64, 64, bright=seed % 2 == 1) for seed in range(3)]
    logits = np.concatenate(list(predictor.logits([np.stack(pictures[:2]), np.stack(pictures[2:])])))
    assert logits.shape == (3, 2)
    scans = (ScanInput(str(seed), encode(one)) for seed, one in enumerate(pictures))
    expected = [list(one.probabilities.values()) for one in predictor.predict(scans)]
    assert predictor.calibration.probabilities(logits) == pytest.approx(np.array(expected), abs=0.02)


def test_a_cached_scan_is_read_and_decoded_once():
    read = list[int]()
    scan = CachedScan("a", lambda: read.append(1) or encode(make_pixels()))
    assert read == [], "not before somebody looks at it"
    assert scan.picture(Transform()) is scan.picture(Transform())
    plain = ScanInput("a", encode(make_pixels())).picture(Transform())
    assert np.array_equal(scan.picture(Transform()).pixels, plain.pixels)
    assert read == [1]


def test_an_unreadable_cached_scan_is_not_read_again():
    read = list[int]()

    def gone() -> bytes:
        read.append(1)
        raise ImageError("The scan is no longer there.")

    scan = CachedScan("a", gone)
    for _ in range(2):
        with pytest.raises(ImageError, match="no longer there"):
            scan.picture(Transform())
    assert read == [1]


def test_a_scan_is_decoded_in_the_window_that_is_asked_for():
    content = make_dicom(np.array([[-160, 40, 240]], np.int16))
    for scan in (ScanInput("a", content), CachedScan("a", content)):
        found = scan.picture(Transform(window=(50, 100)))
        assert np.array_equal(found.pixels, decode(content, (50, 100)))
    assert not np.array_equal(decode(content, (50, 100)), decode(content))


def test_the_last_batches_are_shared_evenly_between_the_streams():
    sizes = [[len(some) for some in batched_for_streams(range(count), 4, 2)] for count in (0, 1, 5, 8, 11, 18)]
    assert sizes == [[], [1], [3, 2], [4, 4], [4, 4, 2, 1], [4, 4, 4, 4, 1, 1]]
    assert [n for some in batched_for_streams(range(18), 4, 2) for n in some] == list(range(18)), "in their order"


def test_no_scans_give_no_predictions(predictor):
    assert list(predictor.predict([])) == []


def test_scans_are_taken_only_a_little_ahead(predictor):
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield ScanInput(str(taken), encode(make_pixels(side)))

    side = 1
    stream = predictor.predict(endless())
    next(stream)
    stream.close()
    assert taken < 150


def test_dicom_and_jpeg_are_predicted_alike_in_one_batch(predictor):
    import numpy as np

    scans = [ScanInput("d", make_dicom(np.full((40, 40), 40, np.int16))), ScanInput("j", encode(make_pixels(), "JPEG"))]
    assert all(one.label for one in predictor.predict(scans))


def test_of_several_frames_the_middle_one_is_predicted_and_the_result_says_so(predictor):
    import numpy as np

    slices = [(make_pixels(seed)[..., 0].astype(np.int16) - 100) for seed in range(3)]
    whole, *single = (ScanInput("a", make_dicom(pixels)) for pixels in (np.stack(slices), *slices))
    found, *expected = predictor.predict([whole, *single])
    assert found.output == {"frame": 2, "frames": 3}
    assert found.probabilities == pytest.approx(expected[1].probabilities, abs=1e-6)
    assert [each.output for each in expected] == [None, None, None]
    assert ImagePipeline().dispose(replace(found, ood_score=None), 0.3, 0.7).word == "indeterminate"


def test_a_loaded_model_can_be_used_without_a_predictor(small_run):
    one = next(predict(network.load(small_run.model_path), [ScanInput("a", encode(make_pixels()))]))
    assert one.label in ("Normal", "Tumor")


def test_serving_and_training_agree_on_the_held_out_scans(small_run):
    """The evaluation uses kept features, while serving goes from files to predictions."""
    scores = json.loads((small_run.folder / "evaluation" / "scores.json").read_text())
    report = load_manifest(small_run.folder / "data" / "manifest.json")
    scans = [report.scans[index] for index in split_scans(report, seed=0).test]
    files = [ScanInput(scan.label, small_run.folder / "data" / "images" / scan.path) for scan in scans]
    answers = list(Predictor.load(small_run.model_path, "fp32").predict(files))
    assert len(answers) == scores["held_out"]
    right = sum(one.label == one.id for one in answers) / len(answers)
    assert right == scores["accuracy"]
    loss = -sum(math.log(one.probabilities[one.id]) for one in answers) / len(answers)
    assert loss == pytest.approx(scores["loss_calibrated"], rel=0.2), "in bf16 there, where the hardware has it"


def test_a_real_ct_slice_is_predicted(predictor):
    scan = DATA / "kidney-ct-one.jpg"
    if not scan.exists():
        pytest.skip("the shared data are not here")
    assert next(predictor.predict([ScanInput("ct", scan)])).label in ("Normal", "Tumor")


def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(ModelFileError):
        Predictor.load(tmp_path / "model.safetensors")
