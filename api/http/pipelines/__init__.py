"""What pipelines declare, as fields of requests: their names, tasks and parameters."""
