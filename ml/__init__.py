"""Pipelines that train, predict and explain, usable without a server; `ml.spec` declares them."""
