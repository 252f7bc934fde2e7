"""What a unit does: train, predict, explain or ingest, moving data between `jobs` and `ml`."""
