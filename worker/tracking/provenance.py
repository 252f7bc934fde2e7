"""Where a network comes from: the revision of our code, and the versions of what it ran on."""

import json
import os
import platform
import subprocess
from functools import cache
from pathlib import Path

from ml.runtime.versions import installed

BASE_WEIGHTS = "base_weights_sha256"
"""In an environment: the hash of the weights that the network began with."""
_HEADER = "renalq"
PACKAGES = ("renalq", "torch", "torchvision", "openvino", "numpy", "pillow", "pydicom", "scikit-learn", "mlflow")


@cache
def code_revision() -> str | None:
    """The git commit of the checkout that runs, `+changed` behind it where files differ; in an image, what its build
    wrote down (RENALQ_CODE_REVISION); None where nobody knows."""
    if "RENALQ_CODE_REVISION" in os.environ:
        return os.environ["RENALQ_CODE_REVISION"]
    commit = _git("rev-parse", "HEAD")
    return commit and commit + ("+changed" if _git("status", "--porcelain") else "")


@cache
def environment() -> dict[str, str]:
    """Python, the machine, and the packages that decide a network's numbers."""
    machine = {"python": platform.python_version(), "machine": platform.machine(), "system": platform.system()}
    return machine | installed(PACKAGES)


def model_file_metadata(path: Path) -> dict[str, str]:
    """What a model file says of the device that trained it, and of the weights that it began with: what two equal
    environments may still differ in. Reads the header alone; nothing for a file that says nothing."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as opened:
            said = json.loads((opened.metadata() or {}).get(_HEADER, "{}"))
    except (SafetensorError, OSError, ValueError):
        return {}
    begun_with = (said.get("weights") or {}).get("sha256")
    told = {name: said.get(name) for name in ("engine", "device", "precision")} | {BASE_WEIGHTS: begun_with}
    return {name: str(value) for name, value in told.items() if value}


def _git(*arguments: str) -> str | None:
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
