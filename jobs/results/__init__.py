"""Reads of jobs, results and stored scans: pages, summaries and the result cache."""
