"""The protocol between a training child and its parent."""

from __future__ import annotations

import json

import pytest

from ml import events

EACH = [
    events.StageStarted("training"),
    events.StageFinished("training", 1.5),
    events.Progress("training", 0.25),
    events.Epoch(1, 2, 0.5, 0.75, 0.6, 0.7, 0.001, 3.25),
    events.Resumed(3),
    events.Checkpointed(3, "kept/epoch-0003.safetensors", 0.4),
    events.Evaluated({"accuracy": 0.9, "classes": ["Normal", "Tumor"]}),
    events.Finished("model.safetensors", {"scores.json": "scores.json"}, 12.5),
    events.Failed("BAD_DATASET", "One class only.", False),
]


@pytest.mark.parametrize("event", EACH, ids=lambda event: event.event)
def test_an_event_comes_back_from_its_line(event):
    line = events.to_json(event)
    assert "\n" not in line
    assert json.loads(line)["event"] == event.event
    assert events.from_json(line) == event


@pytest.mark.parametrize(
    "line", ["", "{", "[]", "1", '{"event":"nothing"}', '{"event":"progress"}', '{"event":"epoch","x":1}']
)
def test_anything_else_is_no_event(line):
    with pytest.raises(ValueError, match="not an event"):
        events.from_json(line)


def test_nan_never_reaches_the_line():
    with pytest.raises(ValueError, match="JSON"):
        events.to_json(events.Progress("training", float("nan")))
