"""The report: a self-contained page, and a PDF with the same content."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from ml.evaluation.calibration import Calibration
from ml.evaluation.metrics import ModelOutputs, Scores, score
from ml.evaluation.subgroups import TOO_FEW, Subgroup
from ml.image.dataset.findings import dataset_warnings
from ml.image.dataset.inspection import Inspection
from ml.reporting import pdf
from ml.reporting.drawing import Plot
from ml.reporting.patients import PatientRow, patient_rows, patients
from ml.reporting.plots import all_plots
from ml.reporting.report import NOT_A_DEVICE, ReportInputs, sections, verdict, write_report
from ml.reporting.subgroups import subgroups as subgroup_sections
from ml.spec.pooling import Pooling
from tests.ml.test_plots import make_epochs, make_outputs

COUNTS = {"train": 326, "validation": 46, "test": 93}
CLEAN = {"patients": 0, "duplicates": 0, "near_duplicates": 0}
FOLDS = {"folds": [{"f1": 0.9}, {"f1": 0.8}], "mean": {"f1": 0.85}, "std": {"f1": 0.05}}


def make_scores(patients_known: bool = False, outputs: ModelOutputs | None = None, **context: object) -> Scores:
    return score(outputs or make_outputs()).with_context(COUNTS, patients_known, CLEAN, **context)  # type: ignore[arg-type]


@cache  # a plot is drawn as a PNG once
def make_plots(classes: tuple[str, ...]) -> list[Plot]:
    outputs = make_outputs(classes)
    scores = make_scores(outputs=outputs)
    return all_plots(outputs, scores, make_epochs(), 2, lambda places: np.zeros((len(places), 9, 9, 3), np.uint8))


def make_inputs(classes: tuple[str, ...] = ("Normal", "Tumor"), **fields: object) -> ReportInputs:
    scores, plots = make_scores(outputs=make_outputs(classes)), make_plots(classes)
    inputs = ReportInputs(
        scores=scores,
        plots=plots,
        made_at=datetime(2026, 11, 20, 10, 30, tzinfo=UTC),
        parameters={"learning_rate": 0.01, "image_size": [64, 64, 3], "clip_norm": None},
        dataset={"images": 465, "classes": {"Normal": 240, "Tumor": 225}, "warnings": ["36 scans are copies."]},
        dataset_digest="d" * 64,
        network="vgg16",
        engine="openvino-bf16",
        device="a CPU",
        seed=3,
        epochs=4,
        training_seconds=36.2,
        best_epoch=2,
        weights_sha256="e" * 64,
        revision="f7eb31f",
        versions={"torch": "2.13.0"},
    )
    return replace(inputs, **fields)  # type: ignore[arg-type]


class Page(HTMLParser):
    """The elements of a page; an unmatched end tag is an error."""

    VOID = frozenset({"meta", "img", "br", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.attributes: dict[str, dict[str, str | None]] = {}
        self.words = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.setdefault(tag, dict(attrs))
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def written(inputs: ReportInputs, folder: Path) -> tuple[str, bytes]:
    html, pdf = folder / "out" / "report.html", folder / "out" / "report.pdf"
    write_report(inputs, html, pdf)
    assert {path.name for path in html.parent.iterdir()} == {"report.html", "report.pdf"}
    return html.read_text(encoding="utf-8"), pdf.read_bytes()


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> tuple[str, bytes]:
    """A report in both formats."""
    return written(make_inputs(), tmp_path_factory.mktemp("report"))


# --- the page ---


def test_the_page_needs_nothing_else(report):
    text, page = report[0], Page(report[0])
    assert not re.search(r"https?:|//[a-z]|url\(|@import", re.sub(r"base64,[^\"]*", "", text))
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert len(page.images) == 6
    for image in page.images:
        assert image["src"].startswith("data:image/png;base64,")
        assert len(image["alt"]) > 20


def test_the_page_can_be_read_aloud(report):
    page = Page(report[0])
    assert page.attributes["html"]["lang"] == "en"
    assert page.tags.count("h1") == 1
    assert page.tags.count("thead") == page.tags.count("table") > 5
    assert page.attributes["th"]["scope"] == "col"


@pytest.mark.parametrize(
    "told",
    ["0.01", "[64, 64, 3]", "vgg16", "openvino-bf16", "a CPU", "36.2 s", "f7eb31f", "2.13.0", "d" * 64, "e" * 64,
     "36 scans are copies.", "2026-11-20 10:30", "240", "326", "95 % interval", NOT_A_DEVICE],
)  # fmt: skip
def test_the_page_contains(report, told):
    assert told in Page(report[0]).words


def test_a_hostile_name_is_only_text(tmp_path):
    name = '<script>alert("x")</script>'
    hostile = make_inputs(("Normal", name), title=name, parameters={name: name}, revision=name, split_notes=[name])
    text, _ = written(hostile, tmp_path)
    assert "<script" not in text
    assert Page(text).words.count(name) > 4


def test_all_warnings_of_the_inspection_are_shown_also_that_of_unknown_patients(tmp_path):
    counts = {"Normal": 9, "Tumor": 2}
    found = Inspection(tiny=1, duplicates=2, imbalance=4.5, with_patient=0, modes={"grey": 9, "RGB": 2})
    told = dataset_warnings(found, counts)
    assert len(told) == 5
    assert any("patient-0012_slice-3.png" in one for one in told)
    text, _ = written(make_inputs(dataset={"images": 11, "classes": counts, "warnings": told}), tmp_path)
    for one in told:
        assert one in Page(text).words


def test_a_dataset_without_a_warning_says_so():
    told = sections(make_inputs(dataset={"images": 9, "classes": {"a": 9}, "warnings": []}))
    assert ("The inspection of the dataset has no warning.",) in [section.paragraphs for section in told]


# --- the PDF ---


def test_the_pdf_has_its_pages_and_a_title(report):
    assert report[1].startswith(b"%PDF-")
    assert len(re.findall(rb"/Type /Page\b(?!s)", report[1])) == 4
    assert b"/Title (Training report)" in report[1]
    assert b"/MediaBox [ 0 0 595." in report[1]  # A4, in points


def test_more_parameters_take_more_pages(tmp_path, report):
    many = make_inputs(parameters={f"parameter {number}": number for number in range(100)})
    _, pdf = written(many, tmp_path)
    assert len(re.findall(rb"/Type /Page\b(?!s)", pdf)) == 5


def test_both_files_are_the_same_when_the_inputs_are(tmp_path, report):
    assert written(make_inputs(), tmp_path) == report


# --- the verdict ---


def test_the_verdict_says_how_many_and_how_sure():
    scores = make_scores()
    text = " ".join(verdict(scores))
    low, high = scores.intervals["f1"]
    assert f"On 40 test scans, F1 for class Tumor is {scores.f1:.2f} (95 % interval {low:.2f} to {high:.2f})." in text
    (right, alarms), (missed, found) = scores.confusion_matrix
    assert f"Of {found + missed} scans of Tumor it found {found} and missed {missed};" in text
    assert f"{right + alarms} others it raised {alarms} false alarms" in text
    assert text.endswith(NOT_A_DEVICE)


def test_the_verdict_says_what_makes_it_too_good():
    assert "slices of one patient may lie on both sides" in " ".join(verdict(make_scores(patients_known=False)))
    known = " ".join(verdict(make_scores(patients_known=True)))
    assert "may lie on both sides" not in known
    assert "40 groups" in known
    leaked = " ".join(verdict(make_scores(), ["2 test scans share a patient."]))
    assert "The test is not clean: 2 test scans share a patient." in leaked
    assert "not clean" not in known


def test_the_verdict_of_several_classes_speaks_of_none():
    text = " ".join(verdict(make_scores(outputs=make_outputs(("a", "b", "c")))))
    assert "on average over the classes" in text
    assert "false alarms" not in text


def test_the_verdict_mentions_cross_validation():
    told = " ".join(verdict(make_scores(cross_validation=FOLDS)))
    assert "Over 2 folds of cross-validation F1 was 0.850, standard deviation 0.050." in told


def test_a_report_that_knows_little_says_so():
    inputs = make_inputs(revision=None, weights_sha256=None, best_epoch=None, dataset={}, versions={})
    rows = {row[0]: row[1] for section in sections(inputs) for table in section.tables for row in table.rows}
    assert (rows["Revision"], rows["Best epoch"]) == ("not known", "–")


# --- subgroups ---


def test_subgroups_are_told_with_what_differs():
    groups = [
        Subgroup("scanner", "A", 40, 20, {"accuracy": [0.9, 0.8, 0.95], "recall": [0.5, 0.3, 0.7]}, "Lower than B's."),
        Subgroup("scanner", "B", 9, 9, {"accuracy": None, "recall": None}),
    ]
    (section,) = subgroup_sections(make_scores(subgroups=groups))
    assert section.paragraphs[0] == "Mind scanner A: Lower than B's."
    assert section.tables[0].rows == (
        ("scanner: A", "20", "40", "0.90 (0.80 to 0.95)", "0.50 (0.30 to 0.70)"),
        ("scanner: B", "9", "9", TOO_FEW, TOO_FEW),
    )
    assert "No subgroup differs" in next(subgroup_sections(make_scores(subgroups=groups[1:]))).paragraphs[0]
    assert list(subgroup_sections(make_scores())) == []


# --- patients ---


def test_the_table_of_patients_has_the_worst_first_and_no_names():
    """Three patients: two right scans; one of two right; both wrong. Probabilities by hand: logit 2 is 0.88."""
    labels, groups = np.array([1, 1, 0, 0, 1, 1]), np.array([7, 7, 9, 9, 3, 3])
    towards = np.array([1, 1, 0, 1, 0, 0])
    logits = np.zeros((6, 2))
    logits[np.arange(6), towards] = 2.0
    outputs = ModelOutputs(("Normal", "Tumor"), labels, logits, groups=groups)
    rows = patient_rows(outputs, Calibration(threshold=0.5), Pooling())
    high, low = 1 / (1 + np.exp(-2)), 1 / (1 + np.exp(2))
    assert [(row.number, row.true, row.scans, row.right) for row in rows] == [
        (1, "Tumor", 2, 0),
        (3, "Normal", 2, 1),
        (2, "Tumor", 2, 2),
    ]
    told = [number for row in rows for number in (row.mean, row.highest)]
    assert told == pytest.approx([low, low, 0.5, high, high, high])
    (section,) = patients(rows, make_scores(patients_known=True))
    assert section.title == "Test patients"
    assert section.tables[0].rows[0] == ("Patient 1", "Tumor", "Normal", "2", "0", "0.12", "0.12")
    assert "Of 3 patients, 1 have no wrong scan." in section.paragraphs[0]
    (section,) = patients(rows, make_scores(patients_known=False))
    assert section.tables[0].rows[0][0] == "Group 1"
    assert "Not all patients are known" in section.paragraphs[1]


def test_single_scans_have_no_table_of_patients():
    assert patient_rows(make_outputs(), Calibration(), Pooling()) == []
    assert list(patients([], make_scores())) == []


def test_a_long_table_of_patients_says_how_many_more_there_are():
    rows = [PatientRow(number, "Tumor", 2, 1, 0.5, 0.5, 0.5) for number in range(50)]
    (section,) = patients(rows, make_scores())
    assert len(section.tables[0].rows) == 40
    assert "10 more are not listed." in section.tables[0].caption


def test_figures_by_patient_come_before_those_by_scan():
    found = {
        "patients": 12, "per_class": {"Normal": 7, "Tumor": 5}, "f1": 0.75, "recall": 0.6, "specificity": None,
        "intervals": {"f1": [0.5, 0.9]}, "pooling": {"reason": "The highest probability of a slice."},
    }  # fmt: skip
    inputs = make_inputs(scores=make_scores(patients_known=True), by_patient=found)
    titles = [section.title for section in sections(inputs)]
    assert titles.index("Figures by patient") < titles.index("Figures on the test scans")
    section = sections(inputs)[titles.index("Figures by patient")]
    assert ("F1", "0.750", "0.500 to 0.900") in section.tables[0].rows
    assert [row[2] for row in section.tables[0].rows if row[1] == "0.600"] == ["too few to say"]
    first = sections(inputs)[0].paragraphs[0]
    assert first.startswith("On 12 test patients, each with one answer, F1 is 0.750 (95 % interval 0.500 to 0.900).")
    alone = {**found, "patients": make_scores().held_out}
    assert "Figures by patient" not in [one.title for one in sections(make_inputs(by_patient=alone))]


# --- what is promised ---


def test_where_patients_are_not_known_nothing_is_promised_of_leaks():
    def split(**context: object) -> str:
        inputs = make_inputs(scores=make_scores(**context))
        return " ".join(next(one for one in sections(inputs) if one.title == "Split and test scans").paragraphs)

    assert "Whether they share patients cannot be checked." in split(patients_known=False)
    assert "No leak" not in split(patients_known=False)
    assert "No test scan shares a patient with the training" in split(patients_known=True)


def test_the_head_names_job_and_dataset(tmp_path):
    head = {"Job": "01a2", "Dataset": "kidneys (77)"}
    text, _ = written(make_inputs(head=head), tmp_path)
    assert "Job: 01a2" in Page(text).words
    assert "Dataset: kidneys (77)" in Page(text).words


@pytest.mark.parametrize("parameters", [5, 20, 40, 60])
@pytest.mark.parametrize("classes", [("Normal", "Tumor"), ("a", "b", "c", "d", "e", "f")])
def test_no_page_of_the_pdf_but_the_last_is_half_empty(tmp_path, monkeypatch, parameters, classes):
    left: list[float] = []
    end_page = pdf._Flow._end_page

    def ending(flow: pdf._Flow) -> None:
        if flow._figure is not None:
            left.append((flow._y - pdf._MARGIN) / (pdf.A4[1] - 2 * pdf._MARGIN))
            flow._rows = []  # not drawn, for speed
        end_page(flow)

    monkeypatch.setattr(pdf._Flow, "_end_page", ending)
    inputs = make_inputs(classes, parameters={f"parameter {number}": number for number in range(parameters)})
    pdf.write_pdf("A report", ["of a training"], inputs.made_at, sections(inputs), tmp_path / "report.pdf")
    assert len(left) >= 4
    assert max(left[:-1]) < 0.4
