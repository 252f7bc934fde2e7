"""From what a network says of a scan, or has said before, to the scan's outcome: by the policy of now."""

from collections.abc import Sequence
from dataclasses import dataclass

from jobs.queue.outcomes import ScanOutcome
from jobs.results.cache import Known
from jobs.settings import Settings
from jobs.tables import Json
from ml.image.serving.disposition import REJECTED, dispose
from ml.image.serving.predictor import Prediction

NOWHERE = -1
"""The ordinal of an outcome that has no place yet: it may be wanted at several."""


@dataclass(frozen=True)
class Judge:
    """Says what may be done with the predictions of a model (its classes in their order) on an engine. `low`, `high`:
    see ml.image.serving.disposition."""

    classes: Sequence[str]
    engine: str
    low: float
    high: float

    @classmethod
    def of(cls, settings: Settings, classes: Sequence[str], engine: str) -> "Judge":
        """By the policy of the settings."""
        return cls(classes, engine, settings.indeterminate_above, settings.indeterminate_below)

    def of_prediction(self, prediction: Prediction) -> ScanOutcome:
        """The outcome of what was computed now."""
        if prediction.error_code is not None:
            error: Json = {"code": prediction.error_code, "detail": prediction.error_detail}
            return ScanOutcome(NOWHERE, error={**error, "retryable": prediction.retryable})
        found = dispose(
            prediction.probabilities, prediction.ood_score, self.low, self.high, prediction.oddity, prediction.label
        )
        return ScanOutcome(
            NOWHERE,
            prediction.label,
            prediction.confidence,
            prediction.probabilities,
            self.engine,
            disposition=found.word,
            reason=found.reason,
            ood_score=prediction.ood_score,
            statistics=prediction.statistics,
        )

    def of_known(self, known: Known) -> ScanOutcome:
        """The outcome of what was computed before. Postgres keeps no order of the classes, and the order says which of
        two is the positive one."""
        probabilities = {name: known.probabilities[name] for name in self.classes}
        found = dispose(probabilities, known.ood_score, self.low, self.high, label=known.label)
        return ScanOutcome(
            NOWHERE,
            known.label,
            known.confidence,
            probabilities,
            self.engine,
            cached=True,
            disposition=found.word,
            reason=known.reason if found.word == REJECTED else found.reason,  # it names what sets the scan apart
            ood_score=known.ood_score,
        )
