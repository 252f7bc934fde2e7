"""Dispositions: confident predictions are accepted, unsure ones are indeterminate, OOD scans are rejected."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml.image.pixels.picture import Origin
from ml.image.serving.disposition import Disposition, disposition_of, of_file, unsuitable
from tests.ml.builders import make_pixels

UNIT = st.floats(0, 1)


def two(tumor: float) -> dict[str, float]:
    return {"Normal": 1 - tumor, "Tumor": tumor}


@pytest.mark.parametrize(
    ("tumor", "word"), [(0.0, "normal"), (0.3, "normal"), (0.31, "indeterminate"), (0.7, "tumor"), (1.0, "tumor")]
)
def test_two_classes_are_decided_outside_of_the_two_limits(tumor, word):
    assert disposition_of(two(tumor), 0.4, 0.3, 0.7).word == word


def test_a_confident_prediction_has_no_reason():
    assert disposition_of(two(0.9), None, 0.3, 0.7) == Disposition("tumor")


@pytest.mark.parametrize("output", [None, {}, {"frame": 1, "frames": 1}])
def test_a_result_of_the_only_frame_stands(output):
    assert of_file(Disposition("tumor"), output) == Disposition("tumor")


def test_a_result_of_one_of_several_frames_is_indeterminate_and_says_of_which():
    found = of_file(Disposition("normal"), {"frame": 2, "frames": 3})
    assert found.word == "indeterminate"
    assert found.reason == "Only frame 2 of 3 was looked at: send each slice as a file of its own."
    rejected = Disposition("rejected", "It is a photograph.")
    assert of_file(rejected, {"frame": 2, "frames": 3}) == rejected


@pytest.mark.parametrize("found", ["normal", "tumor", "indeterminate", "rejected"])
def test_an_unsuitable_scan_is_rejected_whatever_the_network_found(found):
    for output in ({"unsuitable": "It is blank."}, {"frame": 2, "frames": 3, "unsuitable": "It is blank."}):
        assert of_file(Disposition(found), output) == Disposition("rejected", "It is blank.")


GREY, BLACK, PICTURE = Origin("CT", "ABDOMEN"), np.zeros((64, 64, 3), np.uint8), make_pixels()
RED = PICTURE * np.array([1, 0, 0], np.uint8)
COLOUR, PALETTE = Origin("CT", None, "colour"), Origin("CT", None, "palette")


@pytest.mark.parametrize(
    ("pixels", "origin", "learnt", "said"),
    [
        (PICTURE, GREY, [GREY], None),
        (PICTURE, Origin("CT", "HEAD"), [GREY], None),
        (PICTURE, Origin("MR"), [GREY], "its modality is MR, and the network has learnt from CT."),
        (PICTURE, Origin("MR"), [GREY, Origin("MR")], None),
        (PICTURE, Origin("MR"), [], None),
        (PICTURE, Origin("MR"), [Origin()], None),
        (PICTURE, Origin(None, None, "colour"), [GREY], None),
        (RED, COLOUR, [GREY], "in colour"),
        (RED, PALETTE, [Origin()], "in colour"),
        (PICTURE, COLOUR, [GREY], None),
        (RED, COLOUR, [GREY, Origin(None, None, "colour")], None),
        (RED, COLOUR, [], None),
        (RED, Origin(None, None, "colour"), [GREY], None),
        (BLACK, GREY, [GREY], "blank"),
        (BLACK, Origin(), [], "blank"),
        (BLACK + 255, Origin("MR"), [GREY], "blank"),
    ],
)
def test_a_scan_is_unsuitable_if_it_is_blank_or_foreign(pixels, origin, learnt, said):
    found = unsuitable(pixels, origin, learnt)
    assert (found is None) == (said is None)
    assert (said or "") in (found or "")


def test_an_unsure_network_says_between_which_limits():
    found = disposition_of(two(0.55), None, 0.3, 0.7)
    assert found == Disposition("indeterminate", "The network is unsure: Tumor 0.55 lies between 0.30 and 0.70.")


def test_a_probability_just_below_a_limit_is_not_shown_as_the_limit():
    reason = disposition_of(two(0.699), None, 0.3, 0.7).reason
    assert reason == "The network is unsure: Tumor 0.699 lies between 0.30 and 0.70."
    assert "Tumor 0.69999999 lies" in disposition_of(two(0.69999999), None, 0.3, 0.7).reason


def test_the_positive_class_may_stand_first():
    assert disposition_of({"Tumor": 0.9, "Healthy": 0.1}, None, 0.3, 0.7).word == "tumor"
    assert disposition_of({"Tumor": 0.1, "Healthy": 0.9}, None, 0.3, 0.7).word == "healthy"


@pytest.mark.parametrize(
    ("normal", "tumor", "word"),
    [(0.75, 0.2, "normal"), (0.65, 0.3, "indeterminate"), (0.05, 0.75, "tumor"), (0.1, 0.5, "indeterminate")],
)
def test_of_many_classes_both_the_finding_and_the_class_must_be_sure(normal, tumor, word):
    """The last is a sure finding, of which nobody knows what it is."""
    many = {"Cyst": 1 - normal - tumor, "Normal": normal, "Tumor": tumor}
    assert disposition_of(many, None, 0.3, 0.7, positive=["Cyst", "Tumor"]).word == word
    assert disposition_of(many, None, 0.1, 0.7, positive=["Cyst", "Tumor"]).word != "normal"


def test_the_models_positive_class_counts():
    found = disposition_of({"Cancer": 0.25, "Healthy": 0.75}, None, 0.2, 0.7, positive=["Cancer"])
    assert found.word == "indeterminate"
    assert disposition_of({"Cancer": 0.25, "Healthy": 0.75}, None, 0.2, 0.7).word == "healthy", "an older model's rule"


def test_of_many_classes_the_likeliest_is_taken_where_it_is_likely_enough():
    many = {"Cyst": 0.5, "Normal": 0.2, "Stone": 0.3}
    assert disposition_of(many, None, 0.3, 0.5) == Disposition("cyst")
    assert disposition_of(many, None, 0.3, 0.7) == Disposition(
        "indeterminate", "The network is unsure: Cyst, the likeliest, has 0.50, less than 0.70."
    )


def test_a_scan_beyond_the_limit_is_rejected_however_sure_the_network_is():
    found = disposition_of(two(0.999), 2.34, 0.3, 0.7, "it has more colour than they have")
    assert found.word == "rejected"
    assert found.reason == (
        "The scan is unlike those that the network has learnt from (2.3 times the limit): it has more colour than they "
        "have. Check that it is an axial CT slice in the usual window."
    )


def test_without_an_ood_reason_the_text_has_only_the_distance():
    assert "(1.5 times the limit). Check" in disposition_of(two(0.5), 1.5, 0.3, 0.7).reason


def test_a_score_just_above_the_limit_is_described_so():
    assert "(just above the limit)" in disposition_of(two(0.5), 1.001, 0.3, 0.7).reason


def test_very_large_distances_are_capped_in_the_text():
    assert "more than 99 times the limit" in disposition_of(two(0.5), 3.2e6, 0.3, 0.7).reason


def test_a_score_at_the_limit_and_a_missing_one_reject_nothing():
    assert disposition_of(two(0.9), 1.0, 0.3, 0.7, "it is darker than they are") == Disposition("tumor")
    assert disposition_of(two(0.9), None, 0.3, 0.7).word == "tumor"


@given(UNIT, st.none() | st.floats(0, 10), st.tuples(UNIT, UNIT).map(sorted))
def test_every_prediction_has_one_of_four_words_and_a_reason_where_it_is_no_class(tumor, score, limits):
    found = disposition_of(two(tumor), score, *limits)
    assert found.word in ("normal", "tumor", "indeterminate", "rejected")
    assert (found.reason is None) == (found.word in ("normal", "tumor"))


def test_where_the_networks_own_threshold_disagrees_a_person_has_to_look():
    found = disposition_of(two(0.25), None, 0.3, 0.7, label="Tumor")
    assert found.word == "indeterminate", "it must never say normal of what is labelled a tumour"
    assert "calls this Tumor" in found.reason
    assert "0.25" in found.reason
    assert disposition_of(two(0.75), None, 0.3, 0.7, label="Normal").word == "indeterminate"
    assert disposition_of(two(0.25), None, 0.3, 0.7, label="Normal").word == "normal"
    assert disposition_of(two(0.25), 2.0, 0.3, 0.7, label="Tumor").word == "rejected"
