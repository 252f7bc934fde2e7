"""A prediction, new or cached, becomes the scan's outcome by the disposition policy that is in force now."""

from collections.abc import Sequence
from dataclasses import dataclass

from jobs.queue.outcomes import ScanOutcome
from jobs.results.cache import CachedResult
from jobs.settings import Settings
from jobs.tables import Json
from ml.image.serving.disposition import REJECTED, disposition_of
from ml.image.serving.predictor import Prediction

UNPLACED = -1
"""The ordinal of an outcome that has no place in the job yet: the same scan may stand at several."""


@dataclass(frozen=True)
class DispositionPolicy:
    """Decides the disposition of a model's predictions on an engine.

    Args:
        classes: in the model's order.
        low: and `high`: see ml.image.serving.disposition.
    """

    classes: Sequence[str]
    engine: str
    low: float
    high: float

    @classmethod
    def of(cls, settings: Settings, classes: Sequence[str], engine: str) -> "DispositionPolicy":
        """The policy of the settings."""
        return cls(classes, engine, settings.indeterminate_above, settings.indeterminate_below)

    def from_prediction(self, prediction: Prediction) -> ScanOutcome:
        """The outcome of a new prediction."""
        if prediction.error_code is not None:
            error: Json = {"code": prediction.error_code, "detail": prediction.error_detail}
            return ScanOutcome(UNPLACED, error={**error, "retryable": prediction.retryable})
        found = disposition_of(
            prediction.probabilities, prediction.ood_score, self.low, self.high, prediction.ood_reason, prediction.label
        )
        return ScanOutcome(
            UNPLACED,
            prediction.label,
            prediction.confidence,
            prediction.probabilities,
            self.engine,
            disposition=found.word,
            reason=found.reason,
            ood_score=prediction.ood_score,
            statistics=prediction.statistics,
        )

    def from_cached(self, known: CachedResult) -> ScanOutcome:
        """The outcome of a cached result. Postgres does not keep the order of the classes, and the order says which of
        two is the positive one."""
        probabilities = {name: known.probabilities[name] for name in self.classes}
        found = disposition_of(probabilities, known.ood_score, self.low, self.high, label=known.label)
        return ScanOutcome(
            UNPLACED,
            known.label,
            known.confidence,
            probabilities,
            self.engine,
            cached=True,
            disposition=found.word,
            reason=known.reason if found.word == REJECTED else found.reason,  # it says why the scan is unusual
            ood_score=known.ood_score,
        )
