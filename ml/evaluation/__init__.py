"""Scores of a classifier, for any pipeline: metrics, 95 % intervals, calibration."""
