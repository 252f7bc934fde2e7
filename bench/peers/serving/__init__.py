"""Other ways to serve a network, as `bench.predict` starts them. Each takes the model from BENCH_MODEL."""
