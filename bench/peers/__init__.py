"""The peers that benchmarks measure against, and our own side in the same frame."""
