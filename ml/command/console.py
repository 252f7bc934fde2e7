"""Shows a run in the terminal: progress bars, a line per epoch, and tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from ml.runtime import events

if TYPE_CHECKING:
    from ml.image.dataset.inspection import Inspection
    from ml.image.dataset.scans import DatasetReport
    from ml.image.serving.predictor import Prediction


FIGURES = ("accuracy", "precision", "recall", "f1", "roc_auc")
REPORTS = ("report.html", "report.pdf", "scores.json")


class Console:
    """A context manager that shows events: a progress bar for each stage, and the results below them at the end."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description:<20}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
        self._bars = Progress(*columns, TimeElapsedColumn())
        self._tasks: dict[str, TaskID] = {}
        self._closing: list[str] = []

    def __enter__(self) -> Console:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bars.stop()
        for line in self._closing:
            self._print(line)

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
            case events.Evaluated() | events.Finished() | events.Failed():
                self._closing.append(_line(event))
            case _ if line := _line(event):
                self._print(line)

    def _print(self, line: str) -> None:
        self._bars.console.print(line, soft_wrap=True)  # paths that are broken into two lines cannot be copied


def _line(event: events.Event) -> str:
    match event:
        case events.Epoch():
            return (
                f"epoch {event.epoch}/{event.epochs}  training loss {event.train_loss:.4f} accuracy "
                f"{event.train_accuracy:.3f}  validation loss {event.val_loss:.4f} accuracy {event.val_accuracy:.3f}"
                f"  {event.seconds:.1f} s"
            )
        case events.Resumed(epoch):
            return f"resumed after epoch {epoch}"
        case events.Checkpointed(_, path, seconds):
            return f"checkpoint: {escape(path)}  {seconds:.1f} s"
        case events.Evaluated(metrics):
            shown = "  ".join(_figure(name, metrics) for name in FIGURES if metrics.get(name) is not None)
            return f"{shown}  on {metrics['held_out']} held-out scans{_champion_line(event.champion)}"
        case events.Finished(model_path, artifacts):
            named = {"model": model_path} | {name: artifacts[name] for name in REPORTS if name in artifacts}
            lines = [f"{name:<12} {escape(path)}" for name, path in named.items()]
            return "\n".join([*lines, f"{'predict':<12} python -m ml predict {escape(model_path)} SCAN…"])
        case events.Failed(code, detail):
            return f"[red]{code}[/red] {escape(detail)}"
        case _:
            return ""


def _champion_line(champion: Mapping[str, Any] | None) -> str:
    """The comparison with the champion as a line of its own; empty if there is none."""
    if champion is None:
        return ""
    if not champion["comparable"]:
        return f"\nnot compared with the champion: {escape(champion['why'])}"
    ours, theirs = (champion[who]["f1"] for who in ("candidate", "champion"))
    where = f"on {champion['scans']} test scans that neither has learnt from"
    return f"\nf1 {ours:.4f}, the champion's {theirs:.4f}  {where}"


def _figure(name: str, metrics: Mapping[str, Any]) -> str:
    """A score, with its 95 % interval if it has one."""
    ends = (metrics.get("intervals") or {}).get(name)
    interval = f" ({ends[0]:.2f}–{ends[1]:.2f})" if ends else ""
    return f"[bold]{name} {metrics[name]:.3f}[/bold]{interval}"


def prediction_table(predictions: Iterable[Prediction]) -> None:
    """Print predictions as a table."""
    table = Table("scan", "label", "confidence", "ood score", "note")
    for one in predictions:
        confidence = "" if one.confidence is None else f"{one.confidence:.4f}"
        score = "" if one.ood_score is None else f"{one.ood_score:.2f}"
        table.add_row(escape(one.id), one.label or "", confidence, score, _note(one))
    RichConsole().print(table)


def _note(one: Prediction) -> str:
    from ml.image.serving.disposition import UNSUITABLE

    unsuited = (one.output or {}).get(UNSUITABLE)
    if unsuited or one.error_detail is not None or one.ood_score is None or one.ood_score <= 1:
        return unsuited or one.error_detail or ""
    return f"unlike what was learnt from{f': {one.ood_reason}' if one.ood_reason else ''}"


def dataset_table(report: DatasetReport, warnings: Sequence[str] = ()) -> int:
    """Print a dataset's contents, warnings (also these) and problems; returns 1 if there are problems, else 0."""
    console = RichConsole()
    table = Table("class", "scans")
    for name, count in report.classes.items():
        table.add_row(escape(name), str(count))
    console.print(table)
    for line in _inspection_lines(report.inspection):
        console.print(escape(line))
    console.print(f"digest {report.digest}")
    for warning in (*warnings, *report.warnings):
        console.print(f"[yellow]•[/yellow] {escape(warning)}")
    for name in report.passed_over:
        console.print(f"  passed over: {escape(name)}")
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
