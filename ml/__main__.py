"""`python -m ml`: the pipeline without a server.

train                all four stages in one process: from scans to a network, its scores and a report
data_ingestion …     one of these stages alone, reading from disk what the one before wrote
predict MODEL FILE…  predictions as a table
check FOLDER_OR_ZIP  what a dataset holds and what is wrong with it
phantom …            synthetic CT to try it with
weights NETWORK      bring ImageNet weights to this machine
run JOB.json         a training of any pipeline, as workers start it

`python -m ml COMMAND --help` tells the options of each; that of train also has examples, and all parameters.
With --events, stdout carries one JSON object a line (ml.runtime.events) and nothing else; logs go to stderr.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn, TextIO, TypeAlias

from ml.command.options import (
    USUAL_CONFIG,
    USUAL_OUT,
    USUAL_PARAMS,
    config_of,
    params_of,
    training_help,
    weights_folder,
)
from ml.runtime.config import CheckpointPlan
from ml.runtime.errors import ArchiveError, ModelFileError, PipelineError, as_pipeline_error
from ml.runtime.events import Emit, Event, Failed, to_json
from ml.runtime.threads import sleep_while_waiting
from ml.spec.image import NETWORKS
from ml.spec.image_pipeline import STAGES
from ml.spec.private_logs import hide_messages

log = logging.getLogger("ml")

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 0, 1 after a `failed` event, or 143 after SIGTERM."""
    sleep_while_waiting()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["phantom"]:
        from ml.synthetic import phantom_files

        return phantom_files.main(arguments[1:]) or 0
    parsed = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = parsed.command
    return command(parsed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ml", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )  # fmt: skip
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands)
    for name in STAGES:
        _add_stage(commands, name)
    predict = commands.add_parser("predict", help="predict scans with a model file")
    predict.add_argument("model", type=Path)
    predict.add_argument("files", type=Path, nargs="+")
    predict.set_defaults(command=_predict)
    check = commands.add_parser("check", help="check a dataset")
    check.add_argument("dataset", type=Path)
    check.set_defaults(command=_check)
    commands.add_parser("phantom", help="write synthetic CT")
    _add_weights(commands)
    run = commands.add_parser("run", help="train what a JSON file describes: how workers start their children")
    run.add_argument("job", type=Path)
    run.set_defaults(command=_run_job)
    return parser


def _add_train(commands: Commands) -> None:
    command = commands.add_parser(
        "train", help="all four stages", epilog=training_help(), formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train a network on scans, and evaluate it on those that were held out.",
    )  # fmt: skip
    command.add_argument(
        "--data", metavar="ZIP|FOLDER|URL", help="the scans, one folder a class (default: those that the config names)"
    )
    command.add_argument(
        "--out", type=Path, metavar="FOLDER", help=f"write all below it (default: as the config says, else {USUAL_OUT})"
    )
    command.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", dest="settings",
        help="a parameter (below), instead of the file's; may be repeated",
    )  # fmt: skip
    _add_pipeline(command, "train")
    _add_checkpoints(command)


def _add_stage(commands: Commands, name: str) -> None:
    command = commands.add_parser(name, help=f"the stage {name} alone")
    command.set_defaults(data=None, out=None, settings=[], checkpoints=None, checkpoint_seconds=0.0, resume=None)
    _add_pipeline(command, name)
    if name == "training":
        _add_checkpoints(command)


def _add_weights(commands: Commands) -> None:
    command = commands.add_parser("weights", help="bring ImageNet weights to this machine")
    command.add_argument("network", choices=NETWORKS)
    command.add_argument("--to", type=Path, metavar="FOLDER", help="default: where workers look for weights")
    command.add_argument("--from", type=Path, metavar="FILE", dest="file", help="a file that was copied here by hand")
    command.set_defaults(command=_weights)


def _add_pipeline(command: argparse.ArgumentParser, stage: str) -> None:
    command.set_defaults(command=_pipeline, stage=stage)
    command.add_argument(
        "--config", type=Path, metavar="FILE", help=f"where to read and write (default: {USUAL_CONFIG}, if it is there)"
    )
    command.add_argument(
        "--params", type=Path, metavar="FILE", help=f"the parameters (default: {USUAL_PARAMS}, if it is there)"
    )
    command.add_argument("--events", action="store_true", help="JSON lines on stdout, for a parent process")
    _add_surroundings(command)


def _add_surroundings(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--base-weights", type=Path, metavar="FILE", help="what weights: file:… or version:… stands for"
    )
    command.add_argument("--cache", type=Path, metavar="FOLDER", help="keep decoded scans and frozen features there")
    command.add_argument("--cache-bytes", type=int, default=8 * 2**30, metavar="N", help="at most (default: 8 GiB)")
    command.add_argument("--revision", metavar="TEXT", help="of the code, for the report")
    command.add_argument(
        "--champion", type=Path, metavar="FILE", help="score this model file on the same test scans, for comparison"
    )


def _add_checkpoints(command: argparse.ArgumentParser) -> None:
    default = CheckpointPlan.seconds
    command.add_argument("--checkpoints", type=Path, metavar="FOLDER", help="write checkpoints there")
    command.add_argument(
        "--checkpoint-seconds", type=float, default=default, metavar="S",
        help="at the end of an epoch, when the last one is S seconds old; 0: of each epoch (default: %(default)s)",
    )  # fmt: skip
    command.add_argument("--resume", type=Path, metavar="FILE", help="go on from this checkpoint")


# --- the pipeline ----------------------------------------------------------------------------------------------------


def _pipeline(parsed: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, _end_at_once)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    if parsed.events:
        return _run(parsed, _json_lines(_own_stdout()))
    from ml.command.console import Console

    with Console() as console:
        return _run(parsed, console.show)


def _run_job(parsed: argparse.Namespace) -> int:
    """A worker's child: the training that a JSON file describes, of whichever pipeline; its events on stdout."""
    signal.signal(signal.SIGTERM, _end_at_once)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    hide_messages()  # its files are those of the service's clients

    def train(emit: Emit) -> None:
        from ml.pipelines import TrainingJob, pipeline_of

        job = TrainingJob.of(json.loads(parsed.job.read_text(encoding="utf-8")))
        pipeline_of(job.pipeline).train(job, emit)

    return _reporting(train, _json_lines(_own_stdout()))


def _run(parsed: argparse.Namespace, emit: Emit) -> int:
    return _reporting(lambda emit: _run_stages(parsed, emit), emit)


def _reporting(train: Callable[[Emit], None], emit: Emit) -> int:
    """Run it; whatever it raises becomes a `failed` event. Returns the exit code."""
    try:
        train(emit)
    except Exception as error:
        failure = as_pipeline_error(error)
        if failure.code == PipelineError.code:
            log.exception("the run failed")
        emit(Failed(failure.code, str(failure), failure.retryable))
        return 1
    return 0


def _run_stages(parsed: argparse.Namespace, emit: Emit) -> None:
    # Before torch is imported: who has misspelt an option need not wait for it.
    config, params = config_of(parsed.config, parsed.data, parsed.out), params_of(parsed.params, parsed.settings)

    from ml.image.stages import runner
    from ml.image.stages.run import Run, RunEnvironment
    from ml.runtime.cache import Cache

    environment = RunEnvironment(
        weights_dir=weights_folder(),
        base_weights=parsed.base_weights,
        cache=Cache(parsed.cache, parsed.cache_bytes) if parsed.cache else None,
        checkpoints=CheckpointPlan(parsed.checkpoints, parsed.checkpoint_seconds, parsed.resume),
        revision=parsed.revision,
        champion=parsed.champion,
    )
    if parsed.stage == "train":
        runner.run_all(config, params, emit, environment)
    else:
        runner.run_stage(parsed.stage, Run(config, params, emit, environment))


def _end_at_once(number: int, frame: FrameType | None) -> NoReturn:
    # SystemExit runs the `finally` blocks, which remove temporary files; final files only ever appear by rename.
    raise SystemExit(128 + number)


def _own_stdout() -> TextIO:
    """The real stdout for us alone: whatever else writes to it, C libraries included, lands on stderr."""
    own = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    sys.stdout.flush()
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return own


def _json_lines(stream: TextIO) -> Emit:
    lock = threading.Lock()  # progress is told by a thread of its own

    def emit(event: Event) -> None:
        with lock:
            stream.write(to_json(event) + "\n")
            stream.flush()

    return emit


# --- the rest --------------------------------------------------------------------------------------------------------


def _predict(parsed: argparse.Namespace) -> int:
    from ml.command.console import prediction_table
    from ml.image.serving.predictor import Predictor, ScanInput

    try:
        predictor = Predictor.load(parsed.model)
    except ModelFileError as error:
        print(error, file=sys.stderr)
        return 1
    prediction_table(predictor.predict(ScanInput(str(path), path) for path in parsed.files))
    return 0


def _weights(parsed: argparse.Namespace) -> int:
    from ml.command.weights import fetch

    return fetch(parsed.network, parsed.to or weights_folder(), parsed.file)


def _check(parsed: argparse.Namespace) -> int:
    from ml.command.console import dataset_table
    from ml.image.dataset.scans import check_dataset
    from ml.runtime.archives import extract_zip

    if parsed.dataset.is_dir():
        return dataset_table(check_dataset(parsed.dataset))
    with tempfile.TemporaryDirectory(prefix="renalq-check-") as folder:
        try:
            warnings = extract_zip(parsed.dataset, Path(folder) / "images")
        except (ArchiveError, OSError) as error:
            print(error, file=sys.stderr)
            return 1
        return dataset_table(check_dataset(Path(folder) / "images"), warnings)


if __name__ == "__main__":
    raise SystemExit(main())
