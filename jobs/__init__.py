"""The job queue and its registries in Postgres, used by the API and the workers: states, tables and transitions."""
