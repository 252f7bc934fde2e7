"""The gate: whether a new version becomes champion, and why, in words that a person understands. Pure functions."""

from collections.abc import Iterator
from dataclasses import dataclass

from jobs.tables import Json

LEAKS = {
    "patients": ("is of a patient", "are of patients", "that the network has learnt from"),
    "duplicates": ("is a copy", "are copies", "of scans that the network has learnt from"),
    "near_duplicates": ("looks", "look", "almost the same as scans that the network has learnt from"),
}


@dataclass(frozen=True)
class Verdict:
    """The gate's word, with its reasons."""

    promoted: bool
    reasons: list[str]


def gate(candidate: Json, champion: Json | None, wanted: str, min_f1: float) -> Verdict:
    """Whether a new version becomes champion: a function of two sets of metrics and the policy.

    A network that was tested on what it has learnt from is refused, whatever its F1. Without a champion the F1 on the
    test set must reach `min_f1`; with one it must not be lower than the champion's. Where the two were tested on
    different sets, the bar stays the same, and the reasons say how little the comparison tells.
    """
    if wanted == "never":
        return Verdict(False, ["The job asked for no promotion (promote: never)."])
    notes = list(_notes(candidate))
    if leaks := list(_leaks(candidate)):
        return Verdict(False, [*leaks, "Its scores are too good to go by: mend the dataset, and train anew.", *notes])
    f1 = float(candidate.get("f1", 0.0))
    if champion is None:
        sign = "≥" if f1 >= min_f1 else "<"
        why = f"There is no champion yet, and F1 {f1:.4f} {sign} the required {min_f1:.2f}."
        return Verdict(f1 >= min_f1, [why, *notes])
    bar = float(champion.get("f1", 0.0))
    why = f"F1 {f1:.4f} {'≥' if f1 >= bar else '<'} the champion's {bar:.4f}."
    return Verdict(f1 >= bar, [why, *_different_tests(candidate, champion), *notes])


def _leaks(metrics: Json) -> Iterator[str]:
    found = metrics.get("leaks") or {}
    for kind, (one, many, of_what) in LEAKS.items():
        number = int(found.get(kind) or 0)
        if number:
            scans = f"1 test scan {one}" if number == 1 else f"{number} test scans {many}"
            yield f"{scans} {of_what}."


def _notes(metrics: Json) -> Iterator[str]:
    if metrics.get("patients_known") is False:
        yield (
            "Neither names nor DICOM tell the patients: one patient's scans may be in both training and test set, "
            "and F1 too good."
        )


def _different_tests(candidate: Json, champion: Json) -> Iterator[str]:
    ours, theirs = candidate.get("test_digest"), champion.get("test_digest")
    if ours is None or theirs is None:
        yield "Whether both were tested on the same scans is not known: the two figures compare roughly at best."
    elif ours != theirs:
        yield "The champion was tested on other scans: the two figures compare roughly at best."
