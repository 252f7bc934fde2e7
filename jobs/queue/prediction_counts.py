"""Counts of predictions by model, day, figure and bin, incremented with the results. `jobs.models.drift` reads them."""

import json
import uuid
from collections.abc import Mapping, Sequence

from sqlalchemy.orm import Session

from jobs.db import PreparedStatement

CLASS, DISPOSITION = "class", "disposition"
"""Figures that are counted by word; all others are numeric and counted by bin."""
REJECTED = "rejected"
"""The disposition of a scan whose class must not be used (ml/image/serving/disposition.py)."""

# Rows are written in the order of their key, so that two workers that finish chunks at once cannot deadlock.
ADD = PreparedStatement(
    "count_predictions",
    "uuid, jsonb",
    """
WITH model AS MATERIALIZED (
    SELECT model_versions.id, model_versions.tenant_id, coalesce(reference -> 'statistics', '{}') AS statistics
    FROM jobs JOIN model_versions ON model_versions.id = jobs.model_id WHERE jobs.id = $1
), binned AS MATERIALIZED (
    SELECT key AS what, translate(value ->> 'edges', '[]', '{}')::float8[] AS edges
    FROM model, jsonb_each(model.statistics)
), found AS (
    SELECT figure.key AS what, width_bucket(item.value::float8, edges)::text AS bin
    FROM jsonb_each($2) AS figure JOIN binned ON binned.what = figure.key,
        jsonb_array_elements_text(figure.value) AS item
    UNION ALL
    SELECT word, item.value
    FROM unnest(ARRAY['class', 'disposition']) AS word, jsonb_array_elements_text($2 -> word) AS item
)
INSERT INTO prediction_counts (model_id, day, what, bin, tenant_id, scans)
SELECT model.id, (SELECT (clock_timestamp() AT TIME ZONE 'UTC')::date), what, bin, model.tenant_id, count(*)
FROM model, found GROUP BY model.id, model.tenant_id, what, bin ORDER BY what, bin
ON CONFLICT (model_id, day, what, bin) DO UPDATE SET scans = prediction_counts.scans + excluded.scans
""",
)


def add(session: Session, job_id: uuid.UUID, found: Mapping[str, Sequence[str | float]]) -> None:
    """Count values for the job's model and today (UTC, by Postgres' clock).

    Args:
        found: values by figure, one per scan: {"class": ["Tumor", …], "brightness": [0.31, …], …}. Numeric figures
            without bins in the model's reference are ignored.
    """
    ADD(session, str(job_id), json.dumps(found))
