"""Plots: their content, for any class names and for few scans."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image

from ml.evaluation.intervals import Decisions
from ml.evaluation.metrics import Mistake, ModelOutputs, Scores, score
from ml.reporting.curves import precision_recall, reliability_bounds, roc
from ml.reporting.drawing import DPI, Plot
from ml.reporting.plots import all_plots, confusion_matrix, cross_validation, learning_curves, mistakes
from ml.runtime.events import Epoch

NAMES = {"learning_curves.png", "confusion_matrix.png", "reliability.png", "roc.png", "pr.png", "mistakes.png"}
FIGURES = ("accuracy", "precision", "recall", "f1", "roc_auc", "pr_auc")


def make_epochs(count: int = 4, tuned: int = 0, falling: bool = False) -> list[Epoch]:
    """Epochs that learn, the last `tuned` of them with unfrozen blocks."""
    return [
        Epoch(
            number, count, 0.9 / number, 0.8, 1 / number, 0.75, 0.01 / (number if falling else 1), 3.0,
            val_f1=0.7, phase="fine_tune" if number > count - tuned else "head",
        )
        for number in range(1, count + 1)
    ]  # fmt: skip


def make_outputs(classes: tuple[str, ...] = ("Normal", "Tumor"), scans: int = 40, signal: float = 1.0) -> ModelOutputs:
    random = np.random.default_rng(0)
    labels = np.arange(scans) % len(classes)
    logits = random.normal(size=(scans, len(classes))).astype(np.float32)
    logits[np.arange(scans), labels] += signal
    return ModelOutputs(classes, labels, logits, positive=classes[1:] if len(classes) == 2 else ())


def drawn(plot: Plot) -> Figure:
    figure = Figure(layout="constrained")
    plot.draw(figure)
    figure.draw_without_rendering()
    return figure


def words(plot: Plot) -> str:
    """All distinct texts of a plot."""
    return "\n".join(dict.fromkeys(text.get_text() for text in drawn(plot).findobj(Text)))


def plots_of(outputs: ModelOutputs, scores: Scores | None = None, asked: list[int] | None = None) -> list[Plot]:
    def pixels_of(places: np.ndarray) -> np.ndarray:
        (asked if asked is not None else []).extend(places.tolist())
        return np.zeros((len(places), 30, 20, 3), np.uint8)

    return all_plots(outputs, scores or score(outputs), make_epochs(), 2, pixels_of)


def test_every_plot_is_a_png_of_its_size(tmp_path):
    for plot in plots_of(make_outputs()):
        picture = Image.open(plot.save(tmp_path / "plots"))
        assert picture.format == "PNG"
        assert picture.size == pytest.approx((plot.width * DPI, plot.height * DPI), abs=1)
    assert {path.name for path in (tmp_path / "plots").iterdir()} == NAMES


def test_the_same_scores_give_the_same_bytes():
    assert [plot.png for plot in plots_of(make_outputs())] == [plot.png for plot in plots_of(make_outputs())]


@pytest.mark.parametrize("classes", [("<script>", "$x$ & $\\frac$"), ("_hidden", "_b"), ("a\nb", "c" * 200), ("", " ")])
def test_no_class_name_breaks_a_plot(classes):
    for plot in plots_of(make_outputs(classes)):
        assert Image.open(io.BytesIO(plot.png)).size[0] > 100


def test_a_class_whose_name_begins_with_an_underscore_has_its_place_in_the_legend():
    outputs = make_outputs(("a", "_hidden"))
    assert "_hidden" in words(roc(outputs, score(outputs)))


@pytest.mark.parametrize("count", [3, 4, 30])
def test_many_classes_have_a_curve_each_up_to_eight(count):
    outputs = make_outputs(tuple(f"class {number}" for number in range(count)), scans=5 * count)
    assert words(roc(outputs, score(outputs))).count("AUC") == min(count, 8)


def test_test_scans_of_one_class_have_no_curve_but_a_plot():
    outputs = ModelOutputs(("0", "1"), np.zeros(5, np.int64), make_outputs(scans=5).test_logits)
    assert "AUC" not in words(roc(outputs, score(outputs)))


def test_the_learning_rate_has_a_panel_where_it_changes():
    steady, falling = (drawn(learning_curves(make_epochs(falling=each))).axes for each in (False, True))
    assert [axes.get_title() for axes in falling[len(steady) :]] == ["Learning rate"]


def test_fine_tuning_and_the_best_epoch_are_marked():
    text = words(learning_curves(make_epochs(6, tuned=2), best_epoch=5))
    assert "fine-tuning" in text
    assert "best epoch (5)" in text
    assert "fine-tuning" not in words(learning_curves(make_epochs(6), best_epoch=5))


def test_epochs_without_f1_are_drawn_without_it():
    assert "validation F1" not in words(learning_curves([replace(one, val_f1=None) for one in make_epochs()]))
    assert "validation F1" in words(learning_curves(make_epochs()))


@pytest.mark.parametrize("count", [0, 1, 200])
def test_any_number_of_epochs_is_drawn(count):
    assert learning_curves(make_epochs(count)).png.startswith(b"\x89PNG")


def test_the_confusion_matrix_shows_counts_and_shares_of_the_row():
    scores = score(ModelOutputs(("0", "1"), np.array([0, 0, 0, 0, 1]), np.eye(2)[[0, 0, 0, 1, 1]] * 3.0))
    text = words(confusion_matrix(scores))
    assert all(cell in text for cell in ("3\n75%", "1\n25%", "0\n0%", "1\n100%"))


def test_the_mistakes_are_asked_for_by_place_and_shown_without_names():
    outputs, asked = make_outputs(), list[int]()
    plots_of(outputs, asked=asked)
    wrong = set(np.flatnonzero(outputs.test_logits.argmax(1) != outputs.test_labels).tolist())
    assert asked
    assert set(asked) <= wrong
    text = words(mistakes([Mistake(17, "Tumor", "Normal", 0.987)], np.zeros((1, 30, 20, 3), np.uint8), 40))
    assert "no. 17: Tumor" in text
    assert "confidence 0.99" in text


def test_without_mistakes_the_sheet_says_so():
    outputs, asked = make_outputs(signal=99), list[int]()
    sheet = next(plot for plot in plots_of(outputs, asked=asked) if plot.name == "mistakes.png")
    assert asked == []
    assert "No mistake among 40 test scans." in words(sheet)


def test_cross_validation_is_drawn_where_there_was_one():
    assert cross_validation(score(make_outputs())) is None
    fold = dict.fromkeys(FIGURES, 0.9)
    told = {"folds": [fold, fold | {"roc_auc": None}], "mean": fold | {"roc_auc": None}, "std": fold}
    scores = score(make_outputs()).with_context({}, False, {}, told)
    assert "ROC-AUC" in words(cross_validation(scores))
    assert {plot.name for plot in plots_of(make_outputs(), scores)} == NAMES | {"cross_validation.png"}


# --- labels ---


def boxes(texts: list[Text], renderer: object) -> list[Bbox]:
    return [text.get_window_extent(renderer) for text in texts if text.get_visible() and text.get_text()]


def overlap(first: Bbox, second: Bbox) -> bool:
    """More than a pixel in both directions."""
    width = min(first.x1, second.x1) - max(first.x0, second.x0)
    height = min(first.y1, second.y1) - max(first.y0, second.y0)
    return min(width, height) > 1


LONG = "a very long class name of a rare kind"


@pytest.mark.parametrize(
    "classes",
    [
        ("Normal", "Tumor"),
        (f"{LONG} 1", f"{LONG} 2"),
        tuple(f"{LONG} {number}" for number in range(3)),
        tuple(f"{LONG} {number}" for number in range(8)),
        tuple(f"class {number}" for number in range(20)),
    ],
)
def test_no_label_overlaps_another(classes):
    outputs = make_outputs(classes, scans=10 * len(classes))
    fold = dict.fromkeys(FIGURES, 0.9)
    scores = score(outputs).with_context({}, False, {}, {"folds": [fold] * 3, "mean": fold, "std": fold})
    for plot in plots_of(outputs, scores):
        figure = Figure(figsize=(plot.width, plot.height), dpi=DPI, layout="constrained")
        plot.draw(figure)
        FigureCanvasAgg(figure).draw()
        renderer = figure.canvas.get_renderer()
        areas = [axes.get_tightbbox(renderer) for axes in figure.axes]
        for axes in figure.axes:
            labels = [*boxes(axes.get_xticklabels(), renderer), *boxes(axes.get_yticklabels(), renderer)]
            for number, one in enumerate(labels):
                assert not any(overlap(one, other) for other in labels[number + 1 :]), plot.name
        for legend in figure.legends:
            assert not any(overlap(legend.get_window_extent(renderer), area) for area in areas), plot.name
            areas.append(legend.get_window_extent(renderer))
        for area in areas:
            assert area.x0 >= -1
            assert area.y0 >= -1
            assert area.x1 <= figure.bbox.x1 + 1, plot.name
            assert area.y1 <= figure.bbox.y1 + 1, plot.name


# --- bands and intervals ---


def test_reliability_has_intervals_by_group():
    """Of 40 correct scans of 4 patients Wilson's interval is that of 4 of 4: from 0.51 on."""
    groups = np.repeat(np.arange(4), 10)
    decisions = Decisions(np.zeros(40, int), np.zeros(40, int), np.zeros((40, 2)), groups, 1)
    low, high = reliability_bounds(decisions, np.full(40, 0.9), np.array([1.0]))
    assert (low[0], high[0]) == (pytest.approx(0.5101, abs=0.0001), 1.0)


@pytest.mark.parametrize(("classes", "banded"), [(2, 1), (3, 3), (5, 0)])
def test_curves_have_bands_unless_there_are_too_many(classes, banded):
    outputs = make_outputs(tuple(f"class {number}" for number in range(classes)), scans=20 * classes)
    for plot in (roc(outputs, score(outputs)), precision_recall(outputs, score(outputs))):
        (axes,) = drawn(plot).axes
        assert len(axes.collections) == banded
