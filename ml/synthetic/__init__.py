"""Synthetic CT of phantoms, for demonstrations, tests and benchmarks."""
