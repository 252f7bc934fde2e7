"""Datasets of scans: finding and checking them, patients, near-duplicates, splits, lineage."""
