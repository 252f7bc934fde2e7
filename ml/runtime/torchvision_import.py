"""Imports torchvision, also beside a CPU build of torch; import it nowhere else.

torchvision's wheel on PyPI is linked against CUDA torch. Beside a CPU build its compiled operators cannot be loaded,
and `import torchvision` fails with "operator torchvision::nms does not exist". RenalQ does not use these operators. So
if, and only if, the plain import fails, the two names that torchvision looks for are declared without an
implementation, and the import is repeated.
"""

from __future__ import annotations

import importlib
import sys
from functools import cache
from types import ModuleType

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_OPERATORS = ("nms", "qnms")
_declared: list[torch.library.Library] = []  # a Library removes its operators when it is garbage collected


@cache
def torchvision() -> ModuleType:
    """Import torchvision; its missing operators are declared if the import fails because of them."""
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    _remove_partial_import()
    _declare_operators()
    return importlib.import_module("torchvision")


def operators_declared() -> bool:
    """Whether the compiled operators were missing and had to be declared (for `renalq doctor`)."""
    torchvision()
    return bool(_declared)


def _declare_operators() -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in _OPERATORS:
        library.define(name + _SCHEMA)
    _declared.append(library)


def _remove_partial_import() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
