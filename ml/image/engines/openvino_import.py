"""Imports OpenVINO without telemetry; import it nowhere else.

A plain `import openvino`, like its converter, writes a client id below the home folder and sends an event to a
statistics service on the internet, from a separate process. If its telemetry package cannot be imported, OpenVINO uses
a stub that does nothing. So that import is blocked here, before OpenVINO itself is imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import cache
from types import ModuleType

_TELEMETRY = "openvino_telemetry"


def is_installed() -> bool:
    """Whether OpenVINO is installed."""
    return importlib.util.find_spec("openvino") is not None


@cache
def openvino() -> ModuleType:
    """Import OpenVINO without its telemetry."""
    sys.modules.setdefault(_TELEMETRY, None)  # type: ignore[arg-type]  # None makes Python refuse the import
    return importlib.import_module("openvino")
