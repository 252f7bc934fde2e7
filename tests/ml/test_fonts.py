"""Names in any script: as glyphs where a font has them, else in Latin letters."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from ml.reporting.fonts import face, spelled
from tests.ml.test_plots import make_outputs, plots_of
from tests.ml.test_report import make_inputs, written

HINDI = "\u091f\u094d\u092f\u0942\u092e\u0930"  # Tyumar: tumour
NAMES = ("正常な腎臓", "腫瘍", "肿瘤", "종양", "Опухоль", "όγκος", "ورم", "שפיר", "Łagodny")


@pytest.mark.parametrize("name", NAMES)
def test_scripts_that_a_font_has_stay_as_they_are(name: str) -> None:
    assert spelled(name) == name


def test_other_scripts_are_spelled_in_latin_letters() -> None:
    assert spelled(HINDI) == "tyumr"
    assert spelled(f"Tumour {HINDI} 腫瘍") == "Tumour tyumr 腫瘍"
    assert spelled("") == ""


def test_only_the_first_font_is_bold() -> None:
    assert face("Опухоль", bold=True)["weight"] == "bold"
    assert face("腫瘍", bold=True) == {"weight": "normal"}
    assert face("Tumour", bold=False) == {"weight": "normal"}


def test_plots_and_pdf_lack_no_glyph(tmp_path: Path) -> None:
    """matplotlib warns of a glyph that is missing."""
    classes = (*NAMES[:3], HINDI)
    outputs = make_outputs(classes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for plot in plots_of(outputs):
            assert plot.png
        written(make_inputs(classes, title=HINDI), tmp_path)


def test_the_report_says_which_names_it_spells(tmp_path: Path) -> None:
    text, _ = written(make_inputs(dataset={"images": 9, "classes": {HINDI: 4, "腫瘍": 5}}), tmp_path)
    assert f"tyumr is {HINDI}." in text
    assert "is 腫瘍" not in text
    assert "Latin letters" not in written(make_inputs(), tmp_path)[0]


def test_no_font_is_read_for_names_in_latin_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ml.reporting.fonts._characters", None)
    assert spelled("Tumour") == "Tumour"
