"""OpenVINO's telemetry is never loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ml.image.engines import openvino_import

pytestmark = pytest.mark.skipif(not openvino_import.is_installed(), reason="OpenVINO is not installed")

OPENS_A_TRACED_BACKBONE = """
import sys
from torch import nn
from ml.image.engines.backends import OpenVinoEngine
from ml.image.pixels.transforms import Transform
OpenVinoEngine(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten()).eval(), Transform(32, 32), "fp32")
print(sorted(name for name, module in sys.modules.items() if name.startswith("openvino_telemetry") and module))
"""


def test_opening_an_engine_loads_no_telemetry_and_leaves_no_client_id(tmp_path: Path) -> None:
    # CI services are spared by the telemetry itself: here it shall not know of any.
    environ = {name: value for name, value in os.environ.items() if name not in ("CI", "TF_BUILD", "JENKINS_URL")}
    command = [sys.executable, "-c", OPENS_A_TRACED_BACKBONE]
    home = environ | {"HOME": str(tmp_path)}
    done = subprocess.run(command, env=home, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
    assert not (tmp_path / "intel").exists()


def test_everybody_takes_this_door() -> None:
    root = Path(__file__).resolve().parents[2]
    files = [path for folder in ("ml", "worker", "cli", "bench") for path in (root / folder).rglob("*.py")]
    others = [
        path for path in files if "import openvino as" in path.read_text() or "\nimport openvino\n" in path.read_text()
    ]
    assert others == []
