"""The pipeline's events for a person: progress bars, a line an epoch, tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from ml import events

if TYPE_CHECKING:
    from ml.data import DatasetReport
    from ml.inspection import Inspection
    from ml.predict import Prediction


class Console:
    """Shows events as they come: one bar a stage. Use as a context manager."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description:<20}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
        self._bars = Progress(*columns, TimeElapsedColumn())
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Console:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bars.stop()

    def show(self, event: events.Event) -> None:
        """Show one event."""
        match event:
            case events.StageStarted(stage):
                self._tasks[stage] = self._bars.add_task(stage, total=1.0)
            case events.Progress(stage, fraction):
                self._bars.update(self._tasks[stage], completed=fraction)
            case events.StageFinished(stage):
                self._bars.update(self._tasks[stage], completed=1.0)
                self._bars.stop_task(self._tasks[stage])
            case _:
                self._bars.console.print(_line(event))


def _line(event: events.Event) -> str:
    match event:
        case events.Epoch():
            return (
                f"epoch {event.epoch}/{event.epochs}  training loss {event.train_loss:.4f} accuracy "
                f"{event.train_accuracy:.3f}  held out loss {event.val_loss:.4f} accuracy {event.val_accuracy:.3f}"
                f"  {event.seconds:.1f} s"
            )
        case events.Resumed(epoch):
            return f"resumed after epoch {epoch}"
        case events.Checkpointed(_, path, seconds):
            return f"checkpoint: {escape(path)}  {seconds:.1f} s"
        case events.Evaluated(metrics):
            shown = "  ".join(f"{name} {metrics[name]:.3f}" for name in ("accuracy", "precision", "recall", "f1"))
            return f"[bold]{shown}[/bold]  on {metrics['held_out']} held-out scans"
        case events.Finished(model_path):
            return f"model: {escape(model_path)}"
        case events.Failed(code, detail):
            return f"[red]{code}[/red] {escape(detail)}"
        case _:
            return ""


def prediction_table(predictions: Iterable[Prediction]) -> None:
    """Print predictions as a table."""
    table = Table("scan", "label", "confidence", "error")
    for one in predictions:
        confidence = "" if one.confidence is None else f"{one.confidence:.4f}"
        table.add_row(escape(one.id), one.label or "", confidence, one.error_detail or "")
    RichConsole().print(table)


def dataset_table(report: DatasetReport) -> int:
    """Print what a dataset holds, what is doubtful and what is wrong; 1 when something is wrong with it."""
    console = RichConsole()
    table = Table("class", "scans")
    for name, count in report.classes.items():
        table.add_row(escape(name), str(count))
    console.print(table)
    for line in _inspection_lines(report.inspection):
        console.print(escape(line))
    console.print(f"digest {report.digest}")
    for warning in report.warnings:
        console.print(f"[yellow]•[/yellow] {escape(warning)}")
    for problem in report.problems:
        console.print(f"[red]•[/red] {escape(problem)}")
    return 1 if report.problems else 0


def _inspection_lines(found: Inspection) -> Iterator[str]:
    if found.height and found.width:
        yield (
            f"height {found.height.least} to {found.height.greatest} (median {found.height.median}), width "
            f"{found.width.least} to {found.width.greatest} (median {found.width.median}), {found.sizes} sizes"
        )
    for name, counts in (("colours", found.modes), ("modalities", found.modalities)):
        if counts:
            yield f"{name} " + ", ".join(f"{one} {count}" for one, count in counts.items())
    yield f"patients {found.patients or 'unknown'}, copies {found.duplicates}, near-duplicates {found.near_duplicates}"
