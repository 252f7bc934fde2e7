"""MLflow's page, which opens on RenalQ's runs instead of on traces of language models.

Its pages know "GenAI" and "Model training"; the browser keeps which one was chosen, and begins with the first (seen in
MLflow 3.17, where an experiment's kind no longer decides). A later MLflow that keeps it elsewhere opens as it comes.
"""

import os
from functools import cache
from pathlib import Path

from flask import Response, current_app
from mlflow import MlflowClient

EXPERIMENT, VIEW = "renalq", "renalq"
"""Of `worker.tracking.experiment`, which this process cannot import."""
SET_UP = """<head><script>
  const defaults = {
    "mlflow.workflowType_v1": "machine_learning",
    "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": true,
  };
  for (const [name, value] of Object.entries(defaults))
    if (localStorage.getItem(name) === null) localStorage.setItem(name, JSON.stringify(value));
  if (!location.hash) location.replace("#/experiments{place}");
</script>"""
"""What the browser begins with: training of models, and no window of a language model over the runs."""


def first_page() -> Response:
    """MLflow's page. Without a place in its address it leads to the runs; links to other places lead there."""
    page = Path(str(current_app.static_folder), "index.html").read_text()
    found = _client().get_experiment_by_name(EXPERIMENT)
    place = f"/{found.experiment_id}/runs?viewStateShareKey={VIEW}" if found else ""
    text = page.replace("<head>", SET_UP.replace("{place}", place), 1)
    return Response(text, mimetype="text/html", headers={"Cache-Control": "no-cache"})


@cache
def _client() -> MlflowClient:
    return MlflowClient(os.environ["MLFLOW_BACKEND_STORE_URI"])
