"""What benchmarks of the queue share: code of another checkout, filled databases, simulated workers."""
