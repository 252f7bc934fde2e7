"""Reads of jobs and results: pages, summaries and the result cache."""
