"""Which classes are the positive ones, the finding that is looked for, by the names of classes alone.

Names decide only where one reading is possible: of two classes, exactly one is called healthy. Two names of disease
(Cyst, Tumor), or two that nobody knows, leave open which of them is missed at what cost, so that a person has to say it
with the parameter `positive`. More than two classes have no positive one unless the parameter names some.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any


def _words_in(text: str) -> frozenset[str]:
    return frozenset(text.split())


HEALTHY = _words_in("absence absent clear control controls health healthy normal unaffected")
"""Words of health; with a word of disease beside them they decide nothing."""
BENIGN = _words_in("benign free neg negative")
"""Words of a negative finding, also beside a word of disease: benign_tumor, covid-negative."""
NEGATIONS = _words_in("no non none not without")
"""First words that deny what follows."""
DISEASE = _words_in(
    """
    abnormal adenoma aneurysm calculus cancer cancerous cancers carcinoma covid covid19 cyst cysts disease
    diseased edema effusion fracture glioma haemorrhage hemorrhage ill infected infection lesion lesions
    lymphoma malignancy malignant mass melanoma meningioma metastasis nodule oedema pathological pathology
    pituitary pneumonia polyp pos positive present rcc sarcoma sick stone stones tuberculosis tumor tumors
    tumour tumours yes
    """
)
NUMBERS = {"0": False, "1": True, "false": False, "true": True}
"""Names that are known only as a whole."""


class Unclear(ValueError):
    """It is not known which classes are positive; the message is a sentence that says what to do."""


def resolve(classes: Sequence[str], asked: Sequence[str] | None = None) -> tuple[str, ...]:
    """The positive classes: those that were asked for, in that order, else the one that the names of two classes tell.

    None of more than two classes, unless some are asked for.

    Raises:
        Unclear: one that was asked for is not there, all classes were asked for, or the names do not decide.
    """
    known = ", ".join(classes)
    if asked:
        missing = [name for name in asked if name not in classes]
        if missing:
            raise Unclear(f"There is no class {missing[0]}; the classes are {known}. Name one or several of them.")
        if set(asked) >= set(classes):
            raise Unclear(f"The classes are {known}, and one at least must not be positive. Name fewer.")
        return tuple(dict.fromkeys(asked))
    if len(classes) != 2:
        return ()
    return (_by_names(classes, known),)


def _by_names(classes: Sequence[str], known: str) -> str:
    healthy = [name for name in classes if is_finding(name) is False]
    if len(healthy) != 1:
        raise Unclear(f"The names {known} do not tell which of the two is the finding: set it to one of them.")
    return next(name for name in classes if name != healthy[0])


def of_metrics(metrics: Mapping[str, Any] | None) -> list[str] | None:
    """The positive classes by a version's metrics: none of them where no class is a finding; None: it is not known.

    Earlier releases wrote the name of the only one.
    """
    if metrics is None or "positive" not in metrics:
        return None
    named = metrics["positive"] or []
    return [named] if isinstance(named, str) else list(named)


def is_finding(name: str) -> bool | None:
    """Whether a class of this name is a disease (True) or health (False); None where the name does not tell."""
    words = _words(name)
    if not words or "".join(words) in NUMBERS:
        return NUMBERS.get("".join(words))
    if words[0] in NEGATIONS or _denied(words[0]) or BENIGN & {*words}:
        return False
    sick, well = bool(DISEASE & {*words}), bool(HEALTHY & {*words})
    return None if sick == well else sick


def _denied(word: str) -> bool:
    """Whether it is a word of disease, denied without a space: notumor, nontumor."""
    return any(word.startswith(denial) and word[len(denial) :] in DISEASE for denial in ("no", "non"))


def _words(name: str) -> list[str]:
    """The words in lower case: NoTumor, no_tumor and NO-TUMOR are the same."""
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", unicodedata.normalize("NFKC", name))
    return [word for word in re.split(r"[\W_]+", parted.casefold()) if word]
