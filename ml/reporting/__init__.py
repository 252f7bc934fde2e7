"""The training report: plots, HTML and PDF."""
