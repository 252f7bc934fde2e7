"""What a command of the pipeline was asked for, as PipelineConfig and Params; and the help's table of parameters.

Without torch, so that the help and a wrong option answer at once.
"""

from __future__ import annotations

import difflib
import os
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ml.runtime.config import DataIngestion, PipelineConfig, load_config, parse_params, parse_yaml, read_yaml
from ml.runtime.errors import BadParams
from ml.spec import describe
from ml.spec.image import Params

USUAL_CONFIG, USUAL_PARAMS, USUAL_OUT = Path("config/config.yaml"), Path("params.yaml"), Path("artifacts")

EXAMPLES = """examples:
  python -m ml phantom --out kidneys.zip --patients 40 --slices 3
  python -m ml train --data kidneys.zip --out runs/first --set weights=none --set learning_rate=0.01 \\
      --set epochs=5 --set augmentation=false
  python -m ml train --data scans/ --out runs/second --set network=resnet50 --set 'image_size=[160, 160, 3]'
  python -m ml predict runs/first/training/model.safetensors scan.dcm
"""


# --- where -----------------------------------------------------------------------------------------------------------


def config_of(file: Path | None, data: str | None, out: Path | None) -> PipelineConfig:
    """Where to read and write: as the file says (None: config/config.yaml, if it is there, else below artifacts).

    `out` takes the place of all folders that the file names, `data` (a zip, a folder or an address) that of its scans.
    BadParams names the option that is wrong.
    """
    found = _existing("--config", file, USUAL_CONFIG)
    config = PipelineConfig.below(USUAL_OUT) if found is None else load_config(found)
    if data is not None and "://" not in data and not Path(data).exists():
        raise BadParams(
            f"--data: there is no file or folder {data}. Name a zip, a folder with one folder a class, or the address "
            "of a zip (https://…)."
        )
    if out is not None:
        data = data or _scans(config.data_ingestion)
        config = PipelineConfig.below(out)
    return config if data is None else config.reading(data)


def _scans(paths: DataIngestion) -> str | None:
    return str(paths.local_data_file) if paths.local_data_file.exists() else paths.source_url


def weights_folder() -> Path:
    """Where workers look for weights: RENALQ_WEIGHTS_DIR, else the folder `weights` in RENALQ_HOME."""
    given = os.environ.get("RENALQ_WEIGHTS_DIR")
    return Path(given) if given else Path(os.environ.get("RENALQ_HOME", ".renalq")) / "weights"


def _existing(option: str, file: Path | None, usual: Path) -> Path | None:
    """The file that was named, or the usual one where there is one."""
    if file is not None and not file.is_file():
        raise BadParams(f"{option}: there is no file {file}.")
    return file or (usual if usual.is_file() else None)


# --- parameters ------------------------------------------------------------------------------------------------------


def params_of(file: Path | None, settings: Sequence[str] = ()) -> Params:
    """The file's parameters (None: params.yaml, if it is there, else the defaults), then `settings`, as NAME=VALUE.

    BadParams names the setting that is wrong, or the field.
    """
    found = _existing("--params", file, USUAL_PARAMS)
    fields = {} if found is None else {str(name).lower(): value for name, value in read_yaml(found).items()}
    return parse_params(fields | dict(_setting(text) for text in settings))


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    name = name.strip().lower()
    if not equals:
        raise BadParams(f"--set {text}: a name and a value are expected, such as --set epochs=5.")
    if name not in Params.model_fields:
        near = difflib.get_close_matches(name, Params.model_fields, 1)
        remedy = f"do you mean {near[0]}?" if near else "python -m ml train --help lists all."
        raise BadParams(f"--set {text}: there is no parameter {name}; {remedy}")
    try:
        return name, parse_yaml(value)
    except yaml.YAMLError as error:
        raise BadParams(f"--set {text}: the value cannot be read as YAML.") from error


# --- help ------------------------------------------------------------------------------------------------------------


def training_help() -> str:
    """Examples, and every parameter with its default and what it is for."""
    width = max(shutil.get_terminal_size().columns, 72)
    lines = [line for row in describe.rows(Params) for line in _lines(row, width)]
    return "\n".join(
        [EXAMPLES, "parameters (--set NAME=VALUE, or NAME: VALUE in params.yaml), with their defaults:", *lines]
    )


def _lines(row: describe.Row, width: int) -> list[str]:
    words = f" {{{', '.join(row.words)}}}" if row.words and row.words != ("true", "false") else ""
    first = "  {:<24}{:<15}".format(row.name, row.default.strip('"'))
    return textwrap.wrap(row.description + words, width, initial_indent=first, subsequent_indent=" " * 41)
