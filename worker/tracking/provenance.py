"""Where a model comes from: the revision of the code, and the versions of its environment."""

import os
import platform
import subprocess
from functools import cache
from pathlib import Path

from ml.runtime.versions import installed_versions

BASE_WEIGHTS = "base_weights_sha256"
"""Key of an environment: the hash of the weights that the training started from."""
OURS = ("renalq", "mlflow")


@cache
def code_revision() -> str | None:
    """The git commit of the running checkout, with `+changed` where files differ; in an image, what its build recorded
    (RENALQ_CODE_REVISION); None if unknown."""
    if "RENALQ_CODE_REVISION" in os.environ:
        return os.environ["RENALQ_CODE_REVISION"]
    commit = _git("rev-parse", "HEAD")
    return commit and commit + ("+changed" if _git("status", "--porcelain") else "")


@cache
def environment(packages: tuple[str, ...]) -> dict[str, str]:
    """Python, the machine, RenalQ, and the packages that determine a model's numbers (`PipelineSpec.packages`)."""
    machine = {"python": platform.python_version(), "machine": platform.machine(), "system": platform.system()}
    return machine | installed_versions((*OURS, *packages))


def _git(*arguments: str) -> str | None:
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
