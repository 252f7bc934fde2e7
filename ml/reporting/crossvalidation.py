"""The report's section about cross-validation: figures of all scans that the folds tested, and the labels to doubt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml.evaluation.out_of_fold import DoubtfulLabel
from ml.reporting.sections import Section, Table


def sections(
    folds: Mapping[str, Any] | None, doubtful: Sequence[DoubtfulLabel], names: Mapping[str, str]
) -> Iterator[Section]:
    """The section, if there were folds: see `ml.evaluation.out_of_fold.summary`. `names`: titles of the figures.

    Scores of earlier versions have no pooled figures, and no section.
    """
    if folds and "pooled" in folds:
        tables = (*_pooled(folds["pooled"], names), *_doubtful(doubtful))
        yield Section("Cross-validation", (_told(folds),), tables)


def _told(folds: Mapping[str, Any]) -> str:
    pooled = folds["pooled"]
    served = "The mean of their heads is what predicts. " if folds.get("ensemble") else ""
    return (
        f"{len(folds['folds'])} more networks tested {pooled['held_out']} scans of {pooled['independent']} groups, "
        f"each scan by the one that had not seen it. {served}Temperature and threshold were chosen on these scans, "
        "none of which is a test scan."
    )


def _pooled(pooled: Mapping[str, Any], names: Mapping[str, str]) -> Iterator[Table]:
    rows = []
    for name, title in names.items():
        if pooled[name] is not None:
            known = pooled["intervals"].get(name)
            between = f"{known[0]:.3f} to {known[1]:.3f}" if known else "not defined"
            rows.append((title, f"{pooled[name]:.3f}", between))
    yield Table(("Figure", "Value", "95 % interval"), tuple(rows), "Of all folds together, by groups of scans.")


def _doubtful(found: Sequence[DoubtfulLabel]) -> Iterator[Table]:
    if found:
        rows = tuple((str(one.scan), one.label, one.predicted, f"{one.loss:.2f}") for one in found)
        caption = "Labels that a network which had not seen the scan contradicts, the most certain first. Look at them."
        yield Table(("Scan in the manifest", "Label", "Network", "Loss (nats)"), rows, caption)
