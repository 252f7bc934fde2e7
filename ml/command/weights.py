"""`python -m ml weights`: bring ImageNet weights to this machine, with a line or a bar for what is being done."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from ml.image.networks import weights_fetch
from ml.runtime.errors import WeightsMissing


def fetch(network: str, folder: Path, file: Path | None = None) -> int:
    """Fetch them, or take them from `file`. Returns the exit code: 0, or 1 where they are not to be had."""
    try:
        path = _taken(network, folder.resolve(), file)
    except WeightsMissing as error:
        print(error, file=sys.stderr)
        return 1
    print(f"ImageNet weights of {network}: {path}")
    return 0


def _taken(network: str, folder: Path, file: Path | None) -> Path:
    if file is not None:
        return weights_fetch.take_file(network, file, folder)
    with _Steps() as steps:
        return weights_fetch.fetch_imagenet_weights(network, folder, steps.show)


class _Steps(Progress):
    """A bar for each step; it moves to and fro where nobody knows how much is left."""

    def __init__(self) -> None:
        columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
        super().__init__(*columns, console=Console(stderr=True))
        self._shown: dict[str, TaskID] = {}

    def show(self, text: str, fraction: float | None) -> None:
        """Show one step."""
        if text not in self._shown:
            self._shown[text] = self.add_task(text, total=None)
        if fraction is not None:
            self.update(self._shown[text], total=1.0, completed=fraction)
