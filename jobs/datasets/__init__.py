"""Datasets: the registry of uploaded zips, and zips made from feedback."""
