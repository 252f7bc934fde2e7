"""Settings of judgement: which network may be champion, which prediction is in doubt, when predictions have drifted.

A part of `jobs.settings`, which all others import.
"""

from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings


class PolicySettings(BaseSettings):
    """Of the promotion gate, of dispositions, of patients' names, and of drift."""

    promote_min_f1: float = Field(0.85, ge=0, le=1, description="The first champion needs at least this F1.")
    promote_min_sensitivity: float = Field(
        0.80,
        ge=0,
        le=1,
        description="A champion needs at least this sensitivity (recall), unless promoted with `force`.",
    )
    promote_max_calibration_error: float = Field(
        0.10,
        ge=0,
        le=1,
        description="Limit of a champion's calibration error beyond chance, unless promoted with `force`.",
    )
    promote_min_sensitivity_low: float = Field(
        0.70,
        ge=0,
        le=1,
        description="The lower end of a champion's 95 % interval of sensitivity must reach this. 0: it need not have "
        "one.",
    )
    promote_min_class_recall: float = Field(
        0.60, ge=0, le=1, description="With more than two classes, a champion's recall of each must reach this."
    )
    promote_min_positives: int = Field(
        20,
        ge=0,
        description="Independent patients (else groups) of the positive class that a champion's test needs; of each "
        "class, where none is the positive one.",
    )
    promote_min_negatives: int = Field(
        20, ge=0, description="Independent patients (else groups) of the other classes that a champion's test needs."
    )
    promote_margin: float = Field(
        0.05,
        gt=0,
        le=1,
        description="The 95 % interval of F1 less the champion's must lie above minus this. "
        "1: any difference is allowed.",
    )
    promote_unknown_patients: bool = Field(
        True, description="Whether a version may become champion, with a warning, if nothing tells the patients."
    )
    indeterminate_above: float = Field(
        0.3,
        ge=0,
        le=1,
        description="Two classes: up to this probability of the positive one, the disposition is the negative one.",
    )
    indeterminate_below: float = Field(
        0.7,
        ge=0,
        le=1,
        description="From this probability on, a class is the disposition: of two classes the positive one, else any.",
    )
    patient_ids: Literal["hash", "keep", "drop"] = Field(
        "hash",
        description="What results keep of DICOM's PatientID: a hash, the id itself, or nothing. Accession numbers are "
        "kept but with `drop`.",
    )
    drift_bound: float = Field(
        0.25, gt=0, description="Population stability index beyond which a champion's figure has drifted."
    )
    drift_least_studies: int = Field(
        30, ge=1, description="Studies that a drift verdict needs; a day with fewer is pooled with the days before it."
    )
    drift_seconds: float = Field(60, gt=0, description="Interval of drift checks, which emit webhook events (s).")

    @model_validator(mode="after")
    def _has_indeterminate_range(self) -> Self:
        if self.indeterminate_above >= self.indeterminate_below:
            raise ValueError("RENALQ_INDETERMINATE_ABOVE must be less than RENALQ_INDETERMINATE_BELOW")
        return self
