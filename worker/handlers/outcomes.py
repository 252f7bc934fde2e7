"""A prediction, new or cached, becomes the scan's outcome by the disposition policy that is in force now."""

from collections.abc import Sequence
from dataclasses import dataclass

from jobs.queue.outcomes import ScanOutcome
from jobs.results.cache import CachedResult
from jobs.settings import Settings
from jobs.tables import Json
from ml.pipelines import REJECTED, Decider, Disposition, Pipeline, Prediction
from ml.runtime.pseudonyms import pseudonym

UNPLACED = -1
"""The ordinal of an outcome that has no place in the job yet: the same scan may stand at several."""


@dataclass(frozen=True)
class DispositionPolicy:
    """Decides the disposition of a model's predictions on an engine.

    Args:
        classes: in the model's order.
        positive: the model's positive classes; None: they are not known.
        decider: the operating point that the job is pinned to; None: the model file's own.
        patient_ids: what is kept of them; see `jobs.settings`.
        low: and `high`: see `ml.pipelines.Pipeline.dispose`.
    """

    pipeline: Pipeline
    classes: Sequence[str]
    engine: str
    low: float
    high: float
    positive: Sequence[str] | None = None
    decider: Decider | None = None
    patient_ids: str = "hash"

    @classmethod
    def of(
        cls,
        settings: Settings,
        pipeline: Pipeline,
        classes: Sequence[str],
        engine: str,
        positive: Sequence[str] | None = None,
        decider: Decider | None = None,
    ) -> "DispositionPolicy":
        """The policy of the settings."""
        limits = settings.indeterminate_above, settings.indeterminate_below
        return cls(pipeline, classes, engine, *limits, positive, decider, settings.patient_ids)

    def _decided(self, prediction: Prediction) -> tuple[Prediction, Disposition | None]:
        decided = self.decider.decide(prediction) if self.decider else prediction
        return decided, self.pipeline.dispose(decided, self.low, self.high, self.positive)

    def from_prediction(self, prediction: Prediction) -> ScanOutcome:
        """The outcome of a new prediction."""
        if prediction.error_code is not None:
            error: Json = {"code": prediction.error_code, "detail": prediction.error_detail}
            error["retryable"] = prediction.retryable
            return ScanOutcome(UNPLACED, error=error, identity=kept_identity(prediction.identity, self.patient_ids))
        prediction, found = self._decided(prediction)
        return ScanOutcome(
            UNPLACED,
            prediction.label,
            prediction.confidence,
            prediction.probabilities or None,
            self.engine,
            disposition=found.word if found else None,
            reason=found.reason if found else None,
            ood_score=prediction.ood_score,
            statistics=prediction.statistics,
            output=prediction.output,
            identity=kept_identity(prediction.identity, self.patient_ids),
        )

    def from_cached(self, known: CachedResult) -> ScanOutcome:
        """The outcome of a cached result. Postgres does not keep the order of the classes, and the order says which of
        two is the positive one."""
        probabilities = {name: known.probabilities[name] for name in self.classes} if known.probabilities else {}
        same = Prediction(
            "", known.label, known.confidence, probabilities, ood_score=known.ood_score, output=known.output
        )
        decided, found = self._decided(same)
        return ScanOutcome(
            UNPLACED,
            decided.label,
            decided.confidence,
            probabilities or None,
            self.engine,
            cached=True,
            disposition=found.word if found else None,
            reason=_reason(known, found),
            ood_score=known.ood_score,
            output=known.output,
            identity=kept_identity(known.identity, self.patient_ids),
        )


def kept_identity(identity: Json | None, patient_ids: str) -> Json:
    """What a result keeps of an identity: `patient` becomes `patient_hash`, stays, or goes, as the setting says; with
    `drop` the accession number goes as well. An identity that a result has kept goes through it again where it is
    copied, as the setting may be stricter now."""
    kept = dict(identity or {})
    patient = kept.pop("patient", None)
    if patient_ids == "drop":
        return {name: value for name, value in kept.items() if name not in ("patient_hash", "accession")}
    if patient is not None:
        kept |= {"patient": patient} if patient_ids == "keep" else {"patient_hash": pseudonym(patient)}
    return kept


def _reason(known: CachedResult, found: Disposition | None) -> str | None:
    if found is None:
        return None
    return known.reason if found.word == REJECTED else found.reason  # the known one says why the scan is unusual
