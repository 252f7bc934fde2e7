"""The report of a training: a self-contained HTML file, and the same content as a PDF.

Both are rendered from the same `Section`s. They contain no patient data: no file names and no identifiers.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from ml.evaluation.intervals import MIN_GROUPS
from ml.evaluation.metrics import Scores
from ml.evaluation.out_of_fold import DoubtfulLabel
from ml.reporting import crossvalidation
from ml.reporting.drawing import Plot
from ml.reporting.fonts import spelled
from ml.reporting.patients import PatientRow, figures_by_patient, patients, verdict_by_patient
from ml.reporting.pdf import write_pdf
from ml.reporting.sections import Section, Table
from ml.reporting.subgroups import subgroups
from ml.spec.operating_point import sentence

NOT_A_DEVICE = (
    "RenalQ is not a medical device: no figure here says how the network performs on patients of another site."
)
TOO_FEW = (
    f"There are too few independent patients to say how exact this is: an interval needs {MIN_GROUPS} of each class."
)
NAMES = {
    "accuracy": "Accuracy",
    "precision": "Precision (positive predictive value)",
    "recall": "Recall (sensitivity)",
    "specificity": "Specificity",
    "f1": "F1",
    "roc_auc": "ROC-AUC",
    "pr_auc": "PR-AUC (average precision)",
}


@dataclass(frozen=True)
class ReportInputs:
    """The content of a report.

    `dataset`: images, classes (name → scans), and warnings (see `ml.image.dataset.findings.dataset_warnings`); other
    keys are ignored. `head`: name → value of what the head names, such as the job. `made_at` is the only date in both
    files. `leak_reasons`: sentences of `ml.image.dataset.lineage.Leaks.reasons`. `split_notes`: sentences about the
    split. `operating_point`: see `ml.spec.operating_point`. `doubtful_labels`: see `ml.evaluation.out_of_fold`; the
    report names scans by their index in the manifest. `patients`: rows of the table of test patients. `by_patient`: see
    `ml.evaluation.by_patient`. Unknown values
    are None, and shown as such.
    """

    scores: Scores
    plots: Sequence[Plot]
    made_at: datetime
    parameters: Mapping[str, Any]
    dataset: Mapping[str, Any]
    dataset_digest: str
    network: str
    engine: str
    device: str
    seed: int
    epochs: int
    training_seconds: float
    best_epoch: int | None = None
    weights_sha256: str | None = None
    model_sha256: str | None = None
    revision: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    leak_reasons: Sequence[str] = ()
    split_notes: Sequence[str] = ()
    operating_point: Mapping[str, Any] | None = None
    doubtful_labels: Sequence[DoubtfulLabel] = ()
    patients: Sequence[PatientRow] = ()
    by_patient: Mapping[str, Any] | None = None
    head: Mapping[str, str] = field(default_factory=dict)
    title: str = "Training report"


def write_report(inputs: ReportInputs, html: Path, pdf: Path) -> None:
    """Write both files, each atomically. The same inputs give the same bytes (with the same libraries)."""
    content = sections(inputs)
    for path in (html, pdf):
        path.parent.mkdir(parents=True, exist_ok=True)
    partial = html.with_name(f".{html.name}.partial")
    partial.write_text(_html(inputs, content), encoding="utf-8")
    partial.replace(html)
    partial = pdf.with_name(f".{pdf.name}.partial")
    write_pdf(inputs.title, _head(inputs), inputs.made_at, content, partial)
    partial.replace(pdf)


# --- content ---------------------------------------------------------------------------------------------------------


def sections(inputs: ReportInputs) -> list[Section]:
    """The report's content, in order."""
    scores, found = inputs.scores, inputs.by_patient
    summary = " ".join([*verdict_by_patient(found, scores), *verdict(scores, inputs.leak_reasons)])
    return [
        Section("Verdict", (summary,), verdict=True),
        *figures_by_patient(found, scores, NAMES),
        Section("Figures on the test scans", _reading(inputs), (_figures(scores), _classes(scores), _more(scores))),
        *patients(inputs.patients, scores),
        *subgroups(scores),
        Section("Plots", plots=tuple(inputs.plots)),
        *crossvalidation.sections(scores.cross_validation, inputs.doubtful_labels, NAMES),
        Section("Split and test scans", tuple(_split(inputs)), tuple(_counts(scores))),
        Section("Dataset", tuple(_warnings(inputs.dataset)), (_dataset(inputs),)),
        Section("Training", tables=(_training(inputs), _mapping("Parameter", inputs.parameters))),
        Section("Provenance", tables=(_provenance(inputs),)),
    ]


def verdict(scores: Scores, leak_reasons: Sequence[str] = ()) -> Iterator[str]:
    """Sentences that summarize the scores and their limits."""
    finding = _finding(scores)
    of = f"for class {finding}" if finding else "on average over the classes"
    yield f"On {scores.held_out} test scans, F1 {of} is {_with_interval(scores, 'f1')}."
    if finding:
        found, missed, alarms = _hits(scores)
        yield f"Of {found + missed} scans of {finding} it found {found} and missed {missed};"
        yield f"of the {scores.held_out - found - missed} others it raised {alarms} false alarms."
    known = scores.intervals.get("f1")
    if not known:
        yield TOO_FEW
    else:
        yield f"These scans cannot distinguish it from a network whose true F1 is {known[0]:.2f}, or {known[1]:.2f}."
    yield from (f"The test is not clean: {reason}" for reason in leak_reasons)
    yield from _patients(scores)
    if scores.cross_validation:
        folds = scores.cross_validation
        mean, deviation = (_number(folds[part].get("f1")) for part in ("mean", "std"))
        yield f"Over {len(folds['folds'])} folds of cross-validation F1 was {mean}, standard deviation {deviation}."
    yield NOT_A_DEVICE


def _patients(scores: Scores) -> Iterator[str]:
    if scores.patients_known:
        yield f"The patients are known, each on one side only: the test scans are of {scores.independent} groups."
    else:
        yield (
            "WARNING: the figures may be too good. Nothing tells the patients, so slices of one patient may lie on "
            "both sides; only copies and near-duplicates were kept together."
        )


def _hits(scores: Scores) -> tuple[int, int, int]:
    counts = {(True, True): 0, (True, False): 0, (False, True): 0, (False, False): 0}
    for true, row in zip(scores.classes, scores.confusion_matrix, strict=True):
        for predicted, scans in zip(scores.classes, row, strict=True):
            counts[true in scores.positive, predicted in scores.positive] += scans
    return counts[True, True], counts[True, False], counts[False, True]


def _finding(scores: Scores) -> str:
    return " or ".join(scores.positive)


def _reading(inputs: ReportInputs) -> tuple[str, ...]:
    scores, point = inputs.scores, inputs.operating_point
    errors = f"{scores.ece_before:.3f} before temperature scaling and {scores.ece:.3f} after"
    return (
        _of_intervals(scores),
        f"{scores.calibration} The calibration error is {errors}; {scores.ece_chance:.3f} is expected by chance.",
        *((sentence(point),) if point else ()),
    )


def _of_intervals(scores: Scores) -> str:
    """What was simulated for as many groups (`bench/coverage`)."""
    fewest = min(scores.independent_per_class.values())
    if fewest < MIN_GROUPS:
        return f"{TOO_FEW} The test scans are of {fewest} of the rarest class."
    return (
        "In simulations of tests with 10 to 200 independent patients a class and 1 to 40 slices each, 91 to 99 of 100 "
        f"such intervals contained the true figure. Here the rarest class has {fewest}. Patients are left out as a "
        "whole, one after the other (jackknife). Intervals do not cover other sites or scanners."
    )


def _figures(scores: Scores) -> Table:
    rows = []
    for name, title in NAMES.items():
        value, known = getattr(scores, name), scores.intervals.get(name)
        if name != "specificity" or scores.positive:
            missing = "not defined" if value is None else "too few to say"
            between = f"{known[0]:.3f} to {known[1]:.3f}" if known else missing
            rows.append((title, _number(value), between, scores.interval_methods.get(name, "–")))
    caption = f"Of class {_finding(scores)}." if scores.positive else "Accuracy, and macro means over the classes."
    return Table(("Figure", "Value", "95 % interval", "Method"), tuple(rows), caption)


def _classes(scores: Scores) -> Table:
    names = ("precision", "recall", "f1", "roc_auc", "pr_auc")
    rows = [
        (name, str(one["support"]), *(_number(one[figure]) for figure in names))
        for name, one in scores.per_class.items()
    ]
    mean = ("Macro mean", str(scores.held_out), *(_number(scores.macro.get(figure)) for figure in names))
    headers = ("Class", "Test scans", "Precision", "Recall", "F1", "ROC-AUC", "PR-AUC")
    return Table(headers, (*rows, mean), "Each class against all others.")


def _more(scores: Scores) -> Table:
    at = {f"Sensitivity at specificity {at}": value for at, value in scores.sensitivity_at_specificity.items()}
    rows = {
        **at,
        "Cross-entropy (nats), before temperature scaling": scores.loss,
        "Cross-entropy (nats), after temperature scaling": scores.loss_calibrated,
        "Temperature": scores.temperature,
        "Threshold": scores.threshold,
    }
    return Table(("Figure", "Value"), tuple((name, _number(value)) for name, value in rows.items()))


def _split(inputs: ReportInputs) -> Iterator[str]:
    folds = inputs.scores.cross_validation
    chosen = "The best epoch was" if folds else "Best epoch, temperature and threshold were"
    yield f"{chosen} chosen on validation scans, never on test scans."
    yield from inputs.split_notes
    yield from _patients(inputs.scores)
    yield from inputs.leak_reasons or (_clean(inputs.scores),)


def _clean(scores: Scores) -> str:
    if scores.patients_known:
        return "No test scan shares a patient with the training, is a copy of one of its scans, or looks like one."
    return (
        "No test scan is a copy of a training scan, or looks almost like one. Whether they share patients cannot be "
        "checked."
    )


def _counts(scores: Scores) -> Iterator[Table]:
    if scores.counts:
        yield Table(("Part", "Scans"), tuple((part, str(count)) for part, count in scores.counts.items()))
    if scores.leaks:
        rows = tuple((name.replace("_", "-"), str(count)) for name, count in scores.leaks.items())
        yield Table(("Shared with training scans", "Test scans"), rows)


def _dataset(inputs: ReportInputs) -> Table:
    rows = tuple((str(name), str(count)) for name, count in dict(inputs.dataset.get("classes") or {}).items())
    return Table(("Class", "Scans"), rows, f"{inputs.dataset.get('images', 'Unknown number of')} scans.")


def _warnings(dataset: Mapping[str, Any]) -> Iterator[str]:
    """The inspection's warnings, which contain no file names and no patients."""
    found = tuple(str(text) for text in dataset.get("warnings") or ())
    yield from found or ("The inspection of the dataset has no warning.",)
    latin = {name: spelled(name) for name in dict(dataset.get("classes") or {}) if spelled(name) != name}
    if latin:
        pairs = ", ".join(f"{latin[name]} is {name}" for name in latin)
        yield f"Plots and the PDF spell names in Latin letters whose script they have no font for: {pairs}."


def _training(inputs: ReportInputs) -> Table:
    rows = {
        "Network": inputs.network,
        "Engine": inputs.engine,
        "Device": inputs.device,
        "Epochs": inputs.epochs,
        "Best epoch": inputs.best_epoch,
        "Training time": f"{inputs.training_seconds:.1f} s",
        "Seed": inputs.seed,
    }
    return _mapping("Training", rows)


def _provenance(inputs: ReportInputs) -> Table:
    rows = {
        "Revision": inputs.revision,
        "Dataset digest": inputs.dataset_digest,
        "Initial weights, sha256": inputs.weights_sha256,
        "Model file, sha256": inputs.model_sha256,
        **{f"Version of {name}": version for name, version in sorted(inputs.versions.items())},
    }
    return _mapping("Item", rows, missing="not known")


def _mapping(header: str, values: Mapping[str, Any], missing: str = "–") -> Table:
    return Table((header, "Value"), tuple((name, _text(value, missing)) for name, value in values.items()))


def _text(value: Any, missing: str) -> str:
    if value is None:
        return missing
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _with_interval(scores: Scores, name: str) -> str:
    known = scores.intervals.get(name)
    between = f" (95 % interval {known[0]:.2f} to {known[1]:.2f})" if known else ""
    return f"{getattr(scores, name):.2f}{between}"


# --- HTML ------------------------------------------------------------------------------------------------------------


def _html(inputs: ReportInputs, content: Sequence[Section]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )

    def encoded(plot: Plot) -> str:
        return base64.b64encode(plot.png).decode("ascii")

    page = environment.get_template("report.html")
    return page.render(title=inputs.title, head=_head(inputs), sections=content, encoded=encoded)


def _head(inputs: ReportInputs) -> list[str]:
    """Lines below the title: what the report is of, when it was made, and on how many scans."""
    named = [f"{name}: {value}" for name, value in inputs.head.items()]
    return [*named, f"{inputs.made_at:%Y-%m-%d %H:%M} · {inputs.network} · {inputs.scores.held_out} test scans"]
