"""A model card as Markdown (CommonMark, GitHub's tables). What people wrote is escaped: a class may bear any name."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from jobs.tables import Json

NAMES = {
    "accuracy": "Accuracy",
    "precision": "Precision (positive predictive value)",
    "recall": "Recall (sensitivity)",
    "specificity": "Specificity",
    "f1": "F1",
    "roc_auc": "ROC-AUC",
    "pr_auc": "PR-AUC (average precision)",
}
ELSEWHERE = ("f1", "recall", "specificity", "roc_auc")
PER_CLASS = ("precision", "recall", "f1", "roc_auc", "pr_auc")
HOW = {
    "gate": "by the gate, at its training's end",
    "request": "on request, the gate agreeing",
    "force": "by force",
    "rollback": "by a rollback",
}
_SIGNS = re.compile(r"([\\`*_{}\[\]<>#|~&!$])")
_STARTS = re.compile(r"^([-+=:]|\d+(?=[.)]))")


def markdown(card: Json) -> str:
    """The card in Markdown."""
    blocks = [
        f"# {escaped(card['title'])}",
        "**Not for diagnosis without a radiologist.**",
        *_details(card["details"]),
        *_intended_use(card["intended_use"]),
        "## Factors",
        _bullets(card["factors"]),
        *_training_data(card["training_data"]),
        *_evaluation(card["evaluation"]),
        *_calibration(card["calibration"]),
        *_limits(card["limits"]),
        *_engines(card["engines"]),
        *_history(card["gate"], card["promotions"]),
        "## Ethical considerations",
        _bullets(card["ethical_considerations"]),
        *_reproduction(card),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def escaped(text: object) -> str:
    """Text on one line that Markdown shows as it is."""
    line = _SIGNS.sub(r"\\\1", " ".join(str(text).split()))
    return _STARTS.sub(lambda found: f"{found[1]}\\" if found[1].isdigit() else f"\\{found[1]}", line)


# --- sections, in the card's order ---


def _details(of: Json) -> Iterator[str]:
    seen = of["transform"]
    window = seen["window"]
    told = {
        "Version": f"{of['version']}, {'the champion' if of['champion'] else 'not the champion'}",
        "Made": of["made_at"],
        "Last made champion": of["promoted_at"],
        "Network": f"{of['network']}, head {of['head']}",
        "Classes": ", ".join(of["classes"]),
        "Input": seen["height"] and f"{seen['height']} × {seen['width']} pixels, resized by bilinear interpolation",
        "CT window (HU)": f"centre {window[0]:g}, width {window[1]:g}" if window else "the one that each file names",
        "Begun with": of["begun_with"],
        "Weights, SHA-256": of["weights_sha256"],
        "Code": of["code_revision"],
        "Environment": ", ".join(f"{name} {value}" for name, value in of["environment"].items()) or None,
    }
    yield "## Model details"
    yield _table(("What", "Value"), ((name, _shown(value)) for name, value in told.items()))


def _intended_use(of: Json) -> Iterator[str]:
    yield "## Intended use"
    yield _bullets([of["use"], f"Users: {of['users']}", *of["not_for"]])


def _training_data(of: Json) -> Iterator[str]:
    yield "## Training data"
    yield f"Digest: {_shown(of['digest'])}"
    if of["classes"]:
        yield _table(("Class", "Scans"), ((escaped(name), str(count)) for name, count in of["classes"].items()))
    if of["split"]:
        yield _table(("Part", "Scans"), ((escaped(name), str(count)) for name, count in of["split"].items()))
    yield _bullets(of["warnings"])


def _evaluation(of: Json) -> Iterator[str]:
    yield "## Evaluation"
    if of["scans"]:
        groups = of["independent_groups"]
        yield f"On {of['scans']} held-out test scans in {groups} independent groups (patients, where known)."
    yield f"Test digest: {_shown(of['test_digest'])}"
    of_what = f"Of class {escaped(of['positive'])}." if of["positive"] else "Macro means over the classes."
    if of["figures"]:
        yield f"{of_what} Bounds are those of a 95 % interval."
        yield _table(("Figure", "Value", "From", "To"), _figures(of["figures"]))
    if of["per_class"]:
        yield _table(("Class", "Test scans", *(NAMES[name] for name in PER_CLASS)), _classes(of["per_class"]))
    yield from _confusion(of)
    yield _bullets(
        f"Sensitivity at specificity {at}: {_number(value)}" for at, value in of["sensitivity_at_specificity"].items()
    )
    yield from _folds(of["cross_validation"])
    yield from _elsewhere(of["other_test_sets"])


def _figures(of: Json) -> Iterator[Sequence[str]]:
    for name, one in of.items():
        yield NAMES[name], *(_number(one[part]) for part in ("value", "low", "high"))


def _classes(of: Json) -> Iterator[Sequence[str]]:
    for name, one in of.items():
        yield escaped(name), _shown(one.get("support")), *(_number(one.get(figure)) for figure in PER_CLASS)


def _confusion(of: Json) -> Iterator[str]:
    matrix, names = of["confusion_matrix"], [escaped(name) for name in of["classes"]]
    if matrix:
        rows = ((f"**{name}**", *map(str, row)) for name, row in zip(names, matrix, strict=False))
        yield "Confusion matrix: rows are what the scans are, columns what they were called."
        yield _table(("", *names), rows)


def _folds(of: Json | None) -> Iterator[str]:
    if of:
        mean, std = (_number(of[part].get("f1")) for part in ("mean", "std"))
        yield f"Cross-validation over {of['folds']} folds: F1 {mean}, standard deviation {std}."


def _elsewhere(of: Sequence[Json]) -> Iterator[str]:
    if of:
        yield "On other test sets, beside other versions:"
        headers = ("Test digest", "Scans", *(NAMES[name] for name in ELSEWHERE))
        rows = ((one["test_digest"][:12], one["scans"], *(_number(one[name]) for name in ELSEWHERE)) for one in of)
        yield _table(headers, rows)


def _calibration(of: Json) -> Iterator[str]:
    told = {
        "Temperature": of["temperature"],
        "Threshold": of["threshold"],
        "Positive class": of["positive"],
        "Calibration error (ECE)": of["ece"],
        "The same before temperature scaling": of["ece_before"],
        "The same that chance alone would show": of["ece_chance"],
    }
    yield "## Calibration and threshold"
    yield escaped(of["calibration"] or "")
    yield _table(("What", "Value"), ((name, _shown(value)) for name, value in told.items()))


def _limits(of: Json) -> Iterator[str]:
    yield "## Limits"
    yield _bullets([*of["leaks"], of["patients"], of["out_of_distribution"], of["dispositions"]])


def _engines(of: Json) -> Iterator[str]:
    if of:
        yield "## Engines"
        rows = ((escaped(name), "yes" if one["admitted"] else "no", escaped(one["reason"])) for name, one in of.items())
        yield _table(("Engine", "Admitted", "Why"), rows)


def _history(gate: Json, promotions: Sequence[Json]) -> Iterator[str]:
    yield "## Gate and promotions"
    yield f"At its training's end the gate {'promoted it' if gate.get('promoted') else 'did not promote it'}:"
    yield _bullets(gate.get("reasons", ()))
    yield "It was made champion:" if promotions else "It was never made champion."
    yield _bullets(_promoted(one) for one in promotions)


def _promoted(of: Json) -> str:
    replaced = f", in place of version {of['replaced']}" if of["replaced"] else ""
    reason = f": {of['reason']}" if of["reason"] else ""
    return f"{of['at']} {HOW[of['how']]}{replaced}{reason}"


def _reproduction(card: Json) -> Iterator[str]:
    (weights, again), key = (card["reproduction"][name].split() for name in ("weights", "again")), "Bearer $KEY"
    yield "## Reproduction"
    yield "Its weights, and the same training once more; the new job says whether its figures match."
    yield (
        f'```bash\ncurl -OJ -H "Authorization: {key}" $RENALQ{weights[1]}\n'
        f'curl -X POST -H "Authorization: {key}" $RENALQ{again[1]}\n```'
    )
    yield "Parameters:"
    yield f"```json\n{json.dumps(card['details']['params'], indent=2, ensure_ascii=False)}\n```"


# --- pieces ---


def _bullets(texts: Iterable[str]) -> str:
    return "\n".join(f"- {escaped(text)}" for text in texts)


def _table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _shown(value: Any) -> str:
    """A value of any kind, escaped."""
    if value is None:
        return "not known"
    return _number(value) if isinstance(value, float) else escaped(value)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
