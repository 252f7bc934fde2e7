"""The experiment in which MLflow has all runs: what its page opens on, and the runs of the champions.

What its pages read from an experiment's tags is undocumented; it was tried with MLflow 3.17. Where a later one reads
something else, its page opens as that of any experiment.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from ml.spec.registry import installed

NAME = "renalq"
KIND = {"mlflow.experimentKind": "custom_model_development"}
"""Its page opens on the runs. Without a kind it opens on traces of language models, or asks."""
VIEW = "renalq"
"""The name of a view of the runs with the columns that matter, which a link opens."""
CHAMPION = "renalq.champion."
"""Tags of the experiment: the champions' versions and runs."""
NOTE = "mlflow.note.content"
"""What the experiment's page says above its runs, in Markdown."""


def open_experiment(client: Any) -> str:
    """The id of the experiment, which is made if it does not exist, and set up if it is not."""
    found = client.get_experiment_by_name(NAME)
    experiment, tags = (found.experiment_id, found.tags) if found else (client.create_experiment(NAME), {})
    wanted = {**KIND, f"mlflow.sharedViewState.{VIEW}": _view(), NOTE: _note(experiment, tags)}
    for name, value in wanted.items():
        if tags.get(name) != value:
            client.set_experiment_tag(experiment, name, value)
    return str(experiment)


def link_champion(client: Any, group: str, champion: tuple[int, str] | None) -> None:
    """Name the champion's run on the experiment's page.

    Args:
        group: the tenant, with what else its alias names: each has one champion.
        champion: its version and its run.
    """
    experiment = open_experiment(client)
    client.set_experiment_tag(experiment, CHAMPION + group, "{} {}".format(*champion) if champion else "")
    tags = client.get_experiment(experiment).tags
    client.set_experiment_tag(experiment, NOTE, _note(experiment, tags))


def _view() -> str:
    """The state of the page that the view opens with: newest runs first, with the figures that decide."""
    figures = dict.fromkeys(figure for spec in installed().values() for figure in _leading(spec))
    columns = [*(f"metrics.`test_{figure}`" for figure in figures), "tags.`renalq.champion`"]
    return json.dumps({"selectedColumns": columns, "orderByKey": "attributes.start_time", "orderByAsc": False})


def _leading(spec: Any) -> Iterable[str]:
    """The figures of the gate, the one that leads first, then the others of the pipeline's that are no losses."""
    gate = (spec.gate.leads.figure, *(bound.figure for bound in spec.gate.always))
    return (*gate, *(figure for figure in spec.figures if not figure.startswith("loss")))


def _note(experiment: str, tags: Mapping[str, str]) -> str:
    """The page shows its first line, and the others when it is unfolded."""
    champions = {
        name.removeprefix(CHAMPION): value.split() for name, value in tags.items() if name.startswith(CHAMPION)
    }
    lines = [
        f"Champion of {group}: [version {found[0]}](#/runs/{found[1]})\n"
        for group, found in sorted(champions.items())
        if found
    ]
    lines += [f"[Runs with the figures that matter](#/experiments/{experiment}/runs?viewStateShareKey={VIEW})"]
    return "\n".join(lines)
