"""MLflow: live runs, backfill from the rows, registry sync, system metrics and provenance."""
