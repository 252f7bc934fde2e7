"""What a confined process may read and write: programs, and its own folder."""

import subprocess
import sys
from pathlib import Path

import pytest
from landlockpy import supported

from tests.processes import ROOT

pytestmark = pytest.mark.skipif(not supported(), reason="this kernel has no Landlock")

ASKS = """
import os, sys
from pathlib import Path
from worker.tracking.server.confinement import confine
home, other = map(Path, sys.argv[1:])
assert confine(home / "mlflow")
def refused(act):
    try: act()
    except PermissionError: return True
print([name for name, act in {
    "own": lambda: (home / "mlflow" / "new").write_text("x"),
    "own again": lambda: (home / "mlflow" / "new").replace(home / "mlflow" / "newer"),
    "programs": lambda: os.listdir(os.path.dirname(os.__file__)),
    "key": lambda: (home / "admin.key").read_text(),
    "link": lambda: (home / "mlflow" / "link").read_text(),
    "list": lambda: os.listdir(home),
    "write": lambda: (home / "new").write_text("x"),
    "plant": lambda: (home / "mlflow" / "newer").replace(home / "admin.key"),
    "other": lambda: other.read_text(),
    "environ": lambda: Path(f"/proc/{os.getppid()}/environ").read_bytes(),
}.items() if not refused(act)])
"""


def test_no_part_of_home_but_its_own_and_no_other_file(tmp_path: Path) -> None:
    home, other = tmp_path / "home", tmp_path / "scans outside of home"
    (home / "mlflow").mkdir(parents=True)
    for secret in (home / "admin.key", other):
        secret.write_text("secret")
    (home / "mlflow" / "link").symlink_to(home / "admin.key")
    command = [sys.executable, "-c", ASKS, str(home), str(other)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "['own', 'own again', 'programs']", done.stderr
