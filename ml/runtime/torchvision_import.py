"""The one door to torchvision.

torchvision's PyPI wheel is linked against CUDA torch. Beside a CPU build of torch its compiled operators cannot load,
and `import torchvision` fails with "operator torchvision::nms does not exist". Nothing of ours uses those operators, so
after (and only after) the plain import has failed, the two names that torchvision looks for are declared without an
implementation, and the import is tried again. Where the plain import works nothing is declared.
"""

from __future__ import annotations

import importlib
import sys
from functools import cache
from types import ModuleType

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_OPERATORS = ("nms", "qnms")
_declared: list[torch.library.Library] = []  # a Library takes its operators back when it is collected


@cache
def torchvision() -> ModuleType:
    """Import torchvision, declaring its missing operators if that is what the import fails on."""
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    _forget_half_imported()
    _declare_operators()
    return importlib.import_module("torchvision")


def operators_declared() -> bool:
    """True when torchvision's compiled operators were missing and stand-ins were declared (for `renalq doctor`)."""
    torchvision()
    return bool(_declared)


def _declare_operators() -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in _OPERATORS:
        library.define(name + _SCHEMA)
    _declared.append(library)


def _forget_half_imported() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
