"""How long a run still takes: by what its parts cost, and by the pace of the part that runs."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from ml.image.dataset.splits import Split
from ml.image.stages.costs import costs
from ml.image.stages.outlook import PARTS, USUAL, Cost, Outlook
from ml.runtime.config import parse_params
from ml.runtime.events import Event, Progress

SPLIT = Split(np.arange(100), np.arange(20), np.arange(30))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def heard() -> list[Event]:
    return []


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def outlook(heard: list[Event], clock: Clock) -> Outlook:
    """Each part costs ten seconds."""
    made = Outlook(heard.append, clock)
    made.expect({part: Cost(10.0) for part in USUAL})
    return made


def last(heard: list[Event]) -> Progress:
    assert isinstance(heard[-1], Progress)
    return heard[-1]


def test_parts_that_tell_nothing_go_on_by_the_clock(outlook: Outlook, heard: list[Event], clock: Clock) -> None:
    outlook.begin("fit")
    assert last(heard) == Progress("training", pytest.approx(0.0), 70.0), "fit, admit, save and all of evaluation"
    clock.now = 6.0
    outlook.tell()
    assert last(heard).left == pytest.approx(64.0)
    clock.now = 20.0
    outlook.tell()
    assert last(heard).left == pytest.approx(64.0), "it is late: some is left as long as it goes on"
    fractions = [event.fraction for event in heard if isinstance(event, Progress)]
    assert fractions == sorted(fractions)


def test_a_part_that_begins_with_its_stage_begins_once(heard: list[Event], clock: Clock) -> None:
    outlook = Outlook(heard.append, clock)
    with outlook.following("evaluation"):
        before = last(heard).left
        outlook.begin("test")
        assert last(heard).left == before, "it has measured nothing"


def test_a_part_that_tells_how_far_it_is_goes_by_its_own_pace(
    outlook: Outlook, heard: list[Event], clock: Clock
) -> None:
    done = outlook.begin("learn")
    done(0.0)
    clock.now = 30.0
    done(0.5)
    outlook.tell()
    assert last(heard).left == pytest.approx(30.0 + 8 * 10)


def test_a_resumed_part_counts_its_own_time_only(outlook: Outlook, heard: list[Event], clock: Clock) -> None:
    done = outlook.begin("learn")
    done(0.5)
    clock.now = 10.0
    done(0.9)
    outlook.tell()
    assert last(heard).left == pytest.approx(2.5 + 8 * 10)


def test_the_measured_pace_tells_what_later_passes_cost(outlook: Outlook, heard: list[Event], clock: Clock) -> None:
    outlook.expect({"learn": Cost(passes=100), "test": Cost(passes=50)})
    done = outlook.begin("learn")
    done(0.0)
    clock.now = 40.0
    done(0.4)  # a pass takes a second
    outlook.tell()
    assert last(heard).left == pytest.approx(60.0 + 50.0 + 7 * 10)


def test_what_is_expected_grows_with_data_epochs_folds_and_a_champion() -> None:
    few = costs(parse_params({"epochs": 2}), SPLIT, False)
    many = costs(parse_params({"epochs": 4, "folds": 3}), SPLIT, True)
    assert few["learn"].passes == pytest.approx(2 * 110 + 20)
    assert few["champion"] == few["folds"] == Cost()
    for part in ("learn", "folds", "champion"):
        assert many[part].passes > few[part].passes
    assert set(few) <= set(USUAL) == {part for parts in PARTS.values() for part in parts}


def test_a_stage_that_is_silent_is_told_of_every_second(heard: list[Event], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ml.image.stages.outlook.TICK_SECONDS", 0.01)
    with Outlook(heard.append).following("evaluation"):
        threading.Event().wait(0.2)
    assert len(heard) > 3
    ticks = len(heard)
    threading.Event().wait(0.05)
    assert len(heard) == ticks
