"""ETAs and progress of real jobs, scored against when they really ended."""
