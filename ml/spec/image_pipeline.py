"""The image pipeline, declared: networks on kidney CT scans, or on any pictures in one folder a class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml.spec import image_compat
from ml.spec.image import Params
from ml.spec.image_shortages import shortages
from ml.spec.junk_files import PATIENT_LIST
from ml.spec.pipeline import IMAGE, Bound, Card, Gate, Inputs, PipelineSpec, Stage, StoredParams


def _details(params: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "network": image_compat.network(params),
        "head": image_compat.head(params),
        "transform": image_compat.transform(params),
    }


def _rows(details: Mapping[str, Any]) -> dict[str, Any]:
    seen = details["transform"]
    window, spacing = seen["window"], seen["spacing_mm"]
    return {
        "Network": f"{details['network']}, head {details['head']}",
        "Classes": ", ".join(details["classes"]),
        "Input": seen["height"] and f"{seen['height']} × {seen['width']} pixels, resized by bilinear interpolation",
        "Spacing": f"pixels of {spacing:g} mm, where files say theirs" if spacing else "whole scans are resized",
        "CT window (HU)": f"centre {window[0]:g}, width {window[1]:g}" if window else "the one that each file names",
    }


def _limits(metrics: Mapping[str, Any]) -> list[str]:
    """Of which modalities the training scans were; nothing where an older version does not know."""
    origins = metrics.get("origins") or []
    known = sorted({each["modality"] for each in origins if each["modality"]})
    if known:
        return [
            f"It has learnt from {', '.join(known)}: DICOM of other modalities is rejected. PNG and JPEG name none."
        ]
    unknown = "Its training scans name no modality, as PNG and JPEG do not: DICOM of any modality is answered to."
    return [unknown] if origins else []


CARD = Card(
    title="Kidney-CT classifier",
    use="Telling {classes} apart in single axial CT slices of the kidneys.",
    factors=(
        "Figures are broken down by scanner, site, sex, age and slice thickness as far as the dataset tells them, and "
        "by no contrast phase.",
        "A scan is one axial slice. Slices of other body parts, orientations or modalities were not tested.",
        "The window that a CT is decoded with changes what the network sees: it was tested with the one in the "
        "details.",
    ),
    not_for=("Not for other organs, modalities or species.",),
    details=_details,
    rows=_rows,
    limits=_limits,
    ethics=(
        "A missed tumour weighs more than a false alarm: look at sensitivity first, and at its interval.",
        "People tend to agree with a machine. Let the radiologist read first, or without its answer.",
    ),
)

SPEC = PipelineSpec(
    name=IMAGE,
    title="VGG16 and five other networks on pictures: CT slices as DICOM, NIfTI, PNG, JPEG, BMP, TIFF or WebP",
    runtime="ml.image.pipeline:ImagePipeline",
    params=Params,
    stages=(
        Stage(name="data_ingestion", weight=0.05),
        Stage(name="prepare_base_model", weight=0.05),
        Stage(name="training", weight=0.80),
        Stage(name="evaluation", weight=0.10),  # intervals, plots and the report
    ),
    tasks=frozenset({"train", "predict", "explain"}),
    inputs=Inputs(
        item="scan",
        described="images, DICOM files and NIfTI volumes",
        media_types=(
            *("application/dicom", "application/x-nifti"),
            *("image/png", "image/jpeg", "image/bmp", "image/tiff", "image/webp"),
        ),
        inspect="ml.spec.headers.image:look",
        beside=(PATIENT_LIST,),
        refusal_code="NOT_AN_IMAGE",
        refusal="This is not an image that can be read: send PNG, JPEG, DICOM or NIfTI.",
    ),
    gate=Gate(
        by_groups=True,
        unknown_patients="WARNING: the figures may be too good. Neither names nor DICOM tell the patients, so one "
        "patient's scans may be in both training and test set. Only copies and near-duplicates count as one.",
        leads=Bound(figure="f1", title="F1", setting="promote_min_f1", least=0.85),
        always=(
            Bound(figure="recall", title="Sensitivity", setting="promote_min_sensitivity", least=0.80),
            Bound(
                figure="recall",
                title="The lower end of sensitivity's 95 % interval",
                lower_end=True,
                setting="promote_min_sensitivity_low",
                least=0.70,
                unknown="Sensitivity has no interval, for there are too few patients to say; its lower end must be "
                "≥ {bound:.2f}.",
            ),
            Bound(
                figure="ece",
                minus="ece_chance",
                title="Calibration error beyond chance",
                setting="promote_max_calibration_error",
                most=0.10,
                unknown="How well it is calibrated is not known; its error beyond chance must be ≤ {bound:.2f}.",
            ),
        ),
    ),
    figures=(
        *("accuracy", "precision", "recall", "f1", "specificity", "roc_auc", "pr_auc"),
        *("loss", "loss_calibrated", "ece", "ece_chance"),
    ),
    card=CARD,
    public_artifacts=(
        *("scores.json", "history.json", "dataset_report.json", "learning_curves.png", "confusion_matrix.png"),
        *("roc.png", "pr.png", "reliability.png"),
    ),
    phases=("head", "fine_tune"),
    stored=StoredParams(
        current=image_compat.current,
        base_version=image_compat.base_version,
        base_file=image_compat.base_file,
        needed_weights=image_compat.needed_weights,
        architecture=image_compat.network,
    ),
    renamed_params=image_compat.RENAMED,
    shortages=shortages,
    packages=("torch", "torchvision", "openvino", "numpy", "pillow", "pydicom", "scikit-learn"),
)

STAGES = tuple(stage.name for stage in SPEC.stages)
