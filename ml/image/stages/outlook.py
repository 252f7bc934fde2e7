"""How far a run is, and how long it will still take: told once a second, whatever the run does.

A stage has parts. A part that knows how much it has done is reckoned by its own pace; the parts to come by what they
cost: passes of one scan through the backbone, at the pace that was measured, and seconds. The seconds are those of
VGG16 on two cores; where they are wrong, the outlook is wrong at the end of a run, where little is left.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from ml.runtime.events import Emit, Progress

TICK_SECONDS = 1.0
PASS_SECONDS = 0.05
"""Of a scan, until the run has measured it."""
TRUSTED = 0.3
"""The share of a part after which its own pace alone counts; before, also what it usually costs: its begin is slow."""

PARTS = {
    "data_ingestion": ("decode",),
    "prepare_base_model": ("build",),
    "training": ("learn", "folds", "fit", "admit", "save"),
    "evaluation": ("test", "scores", "champion", "report"),
}


@dataclass(frozen=True)
class Cost:
    """What a part probably costs."""

    seconds: float = 0.0
    passes: float = 0.0


USUAL: Mapping[str, Cost] = {
    "decode": Cost(3.0),
    "build": Cost(2.0),
    "learn": Cost(passes=400),
    "folds": Cost(),
    "fit": Cost(0.3),
    "admit": Cost(0.7, passes=50),
    "save": Cost(0.7),
    "test": Cost(passes=50),
    "scores": Cost(0.1),
    "champion": Cost(),
    "report": Cost(4.0),
}
"""Until the dataset is known."""


class Outlook:
    """Of one run. `emit`: gets `progress` events."""

    def __init__(self, emit: Emit, clock: Callable[[], float] = time.monotonic) -> None:
        self._emit, self._clock, self._lock = emit, clock, threading.Lock()
        self._costs: dict[str, Cost] = dict(USUAL)
        self._spent: dict[str, float] = {}  # seconds of the parts that are over
        self._part: str | None = None
        self._began = self._fraction = 0.0
        self._first: float | None = None  # the fraction when the part was first heard of: a resumed one has done some
        self._pass_seconds = PASS_SECONDS

    def expect(self, found: Mapping[str, Cost]) -> None:
        """What parts cost is known better now."""
        with self._lock:
            self._costs |= found

    def begin(self, part: str) -> Callable[[float], None]:
        """The part before is over, and this one begins, if it has not. Returns a function to tell the fraction done, 0
        to 1."""
        with self._lock:
            if part != self._part:
                self._end_part()
                self._part, self._began, self._fraction, self._first = part, self._clock(), 0.0, None
        self.tell()
        return self._done

    def tell(self) -> None:
        """Emit where the run is."""
        with self._lock:
            if self._part is not None:
                stage = next(stage for stage, parts in PARTS.items() if self._part in parts)
                self._emit(Progress(stage, self._fraction_of(stage), round(self._left(PARTS), 1)))

    @contextmanager
    def following(self, stage: str) -> Iterator[None]:
        """Tell every second while the stage runs. A stage begins with its first part."""
        self.begin(PARTS[stage][0])
        over = threading.Event()

        def tick() -> None:
            while not over.wait(TICK_SECONDS):
                self.tell()

        ticking = threading.Thread(target=tick, name="outlook", daemon=True)
        ticking.start()
        try:
            yield
        finally:
            over.set()
            ticking.join()
            with self._lock:
                self._end_part()

    # --- with the lock held ---

    def _end_part(self) -> None:
        if self._part is not None:
            self._measure(1.0)
            self._spent[self._part] = self._clock() - self._began
            self._part = None

    def _done(self, fraction: float) -> None:
        with self._lock:
            self._fraction = min(max(fraction, self._fraction), 1.0)
            if self._first is None:
                self._first = fraction
            self._measure(self._fraction)

    def _measure(self, fraction: float) -> None:
        """The pace of passes, by a part that is made of them."""
        passes = self._costs[self._part or ""].passes if self._part in ("learn", "folds", "test") else 0.0
        done = (fraction - (self._first or 0.0)) * passes
        if done >= 32:
            self._pass_seconds = (self._clock() - self._began) / done

    def _left(self, stages: Mapping[str, tuple[str, ...]]) -> float:
        """Seconds (s) of what is still to do in these stages."""
        parts = [part for stage in stages for part in PARTS[stage]]
        later = parts[parts.index(self._part) + 1 :] if self._part in parts else parts
        current = self._left_of_part() if self._part in parts else 0.0
        return current + sum(self._expected(part) for part in later if part not in self._spent)

    def _expected(self, part: str) -> float:
        cost = self._costs[part]
        return cost.seconds + cost.passes * self._pass_seconds

    def _left_of_part(self) -> float:
        passed, done = self._clock() - self._began, self._fraction - (self._first or 0.0)
        usual = max(self._expected(self._part or "") - passed, 0.2 * passed)
        if done <= 0:
            return usual
        weight = min(done / TRUSTED, 1.0)
        return weight * passed * (1 - self._fraction) / done + (1 - weight) * usual

    def _fraction_of(self, stage: str) -> float:
        spent = sum(self._spent.get(part, 0.0) for part in PARTS[stage]) + self._clock() - self._began
        left = self._left({stage: PARTS[stage]})
        return round(spent / (spent + left), 4) if spent + left > 0 else 0.0
