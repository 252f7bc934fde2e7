"""Terminal output of events."""

from __future__ import annotations

import pytest

from ml.command.console import Console, prediction_table
from ml.image.serving.predictor import Prediction
from ml.runtime.events import Epoch, Evaluated, Event, Failed, Finished, Progress, StageFinished, StageStarted, Steps

METRICS = {"accuracy": 0.9, "precision": 0.8, "recall": 0.7, "f1": 0.75, "roc_auc": None, "held_out": 40}
LONG = "runs/" + "a-long-name/" * 12


@pytest.fixture
def shown(capsys, monkeypatch):
    """A function from events to the resulting lines in the terminal."""
    monkeypatch.setenv("COLUMNS", "80")

    def show(*events: Event) -> list[str]:
        with Console() as console:
            for event in events:
                console.show(event)
        return capsys.readouterr().out.splitlines()

    return show


def test_the_end_shows_scores_model_report_and_how_to_predict(shown):
    artifacts = {"report.html": LONG + "report.html", "scores.json": LONG + "scores.json", "roc.png": "roc.png"}
    evaluated = Evaluated(METRICS | {"intervals": {"accuracy": [0.81, 0.96], "f1": None}})
    lines = shown(
        StageStarted("evaluation"), evaluated, Finished(LONG + "m", artifacts), StageFinished("evaluation", 1)
    )
    assert lines[0].startswith("evaluation")
    assert lines[1] == "accuracy 0.900 (0.81–0.96)  precision 0.800  recall 0.700  f1 0.750  on 40 held-out scans"
    assert [line.split() for line in lines[2:]] == [
        ["model", LONG + "m"],
        ["report.html", LONG + "report.html"],
        ["scores.json", LONG + "scores.json"],
        ["predict", "python", "-m", "ml", "predict", LONG + "m", "SCAN…"],
    ]


@pytest.mark.parametrize(
    ("champion", "line"),
    [
        (
            {"comparable": True, "scans": 40, "candidate": {"f1": 0.75}, "champion": {"f1": 0.8}},
            "f1 0.7500, the champion's 0.8000  on 40 test scans that neither has learnt from",
        ),
        ({"comparable": False, "why": "no [red] file"}, "not compared with the champion: no [red] file"),
    ],
)
def test_a_champion_has_a_line_of_its_own(shown, champion, line):
    assert shown(StageStarted("evaluation"), Evaluated(METRICS, champion=champion))[-1] == line


def test_an_epoch_is_one_line_and_steps_are_none(shown):
    epoch = Epoch(2, 9, 0.5, 0.8, 0.6, 0.7, 0.01, 1.25)
    lines = shown(StageStarted("training"), Steps(2, 1, [0.5], 0.01), epoch, Progress("training", 0.5))
    assert lines[0].startswith("epoch 2/9  training loss 0.5000 accuracy 0.800  validation loss 0.6000")
    assert len(lines) == 2


def test_a_failure_is_named_in_full_and_brackets_are_text(shown):
    assert shown(Failed("BAD_PARAMS", "epochs: [red] is no number."))[-1] == "BAD_PARAMS epochs: [red] is no number."


def test_a_prediction_shows_its_ood_score_and_reason(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    odd = Prediction("b.png", "Tumor", 0.9876, ood_score=2.346, ood_reason="it is darker than they are")
    alone = Prediction("c.png", "Tumor", 0.9, ood_score=1.5)
    prediction_table(
        [Prediction("a.png", "Normal", 0.75, ood_score=0.5), odd, alone, Prediction("d.png", "Tumor", 0.5)]
    )
    a, b, c, d = (line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines()[3:-1])
    assert [cell.strip() for cell in a] == ["a.png", "Normal", "0.7500", "0.50", ""]
    assert b[3].strip() == "2.35"
    assert b[4].strip() == "unlike what was learnt from: it is darker than they are"
    assert c[4].strip() == "unlike what was learnt from"
    assert [cell.strip() for cell in d[3:]] == ["", ""]
