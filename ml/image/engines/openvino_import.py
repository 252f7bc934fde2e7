"""The one door to OpenVINO.

A plain `import openvino` writes a client id below the home folder and sends an event to a statistics service on the
internet, in a process of its own; so does its converter. Nothing of ours may talk to the outside. Where its telemetry
package cannot be imported it takes a stand-in that does nothing: so that import is refused here, before anything else
imports OpenVINO.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import cache
from types import ModuleType

_TELEMETRY = "openvino_telemetry"


def is_here() -> bool:
    """Whether OpenVINO is installed."""
    return importlib.util.find_spec("openvino") is not None


@cache
def openvino() -> ModuleType:
    """Import OpenVINO without its telemetry."""
    sys.modules.setdefault(_TELEMETRY, None)  # type: ignore[arg-type]  # Python's own way to refuse an import
    return importlib.import_module("openvino")
