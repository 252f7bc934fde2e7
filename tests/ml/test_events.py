"""The protocol between a training child and its parent."""

from __future__ import annotations

import json

import pytest

from ml.runtime import events

EACH = [
    events.StageStarted("training"),
    events.StageFinished("training", 1.5),
    events.Progress("training", 0.25),
    events.Epoch(1, 2, 0.5, 0.75, 0.6, 0.7, 0.001, 3.25),
    events.Epoch(2, 4, 0.5, 0.75, 0.6, 0.7, 0.001, 3.25, 0.65, "fine_tune"),
    events.Round(1, 5, {"f1": 0.9}),
    events.Steps(1, 11, [0.5, 0.4], 0.001),
    events.Resumed(3),
    events.Checkpointed(3, "kept/epoch-0003.safetensors", 0.4),
    events.Evaluated({"accuracy": 0.9, "classes": ["Normal", "Tumor"]}),
    events.Evaluated({"f1": 0.9}, {"scans": 93}, {"comparable": False, "why": "its file cannot be read"}),
    events.Finished("model.safetensors", {"scores.json": "scores.json"}, 12.5),
    events.Failed("BAD_DATASET", "One class only.", False),
]


@pytest.mark.parametrize("event", EACH, ids=lambda event: event.event)
def test_an_event_comes_back_from_its_line(event):
    line = events.to_json(event)
    assert "\n" not in line
    assert json.loads(line)["event"] == event.event
    assert events.from_json(line) == event


def test_every_kind_of_event_is_looked_at_here():
    assert {type(event) for event in EACH} == set(events._KINDS.values())


def test_progress_events_are_rate_limited(monkeypatch):
    now, told = [100.0], []
    monkeypatch.setattr(events.time, "monotonic", lambda: now[0])
    tell = events.reporter(told.append, "training", every=0.5)
    for fraction in (0.1, 0.2, 0.3, 0.4):
        now[0] += 0.3
        tell(fraction)
    assert told == [events.Progress("training", 0.2), events.Progress("training", 0.4)]


@pytest.mark.parametrize(
    "line", ["", "{", "[]", "1", '{"event":"nothing"}', '{"event":"progress"}', '{"event":"epoch","x":1}']
)
def test_anything_else_is_no_event(line):
    with pytest.raises(ValueError, match="not an event"):
        events.from_json(line)


def test_an_epoch_of_before_there_were_phases_is_the_heads():
    line = json.dumps({"event": "epoch", **dict.fromkeys(
        ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "learning_rate", "seconds"), 0.5
    ), "epoch": 1, "epochs": 2})  # fmt: skip
    told = events.from_json(line)
    assert isinstance(told, events.Epoch)
    assert (told.phase, told.val_f1) == ("head", None)


def test_nan_never_reaches_the_line():
    with pytest.raises(ValueError, match="JSON"):
        events.to_json(events.Progress("training", float("nan")))
    with pytest.raises(ValueError, match="JSON"):
        events.to_json(events.Steps(1, 1, [0.5, float("inf")], 0.001))
