"""Plots: their content, for any class names and for few scans."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from ml.evaluation.metrics import Mistake, ModelOutputs, Scores, score
from ml.reporting.plots import DPI, Plot, all_plots, confusion_matrix, cross_validation, learning_curves, mistakes, roc
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
