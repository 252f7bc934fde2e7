"""The life of a job: submission, dispatch, leases, transitions, results, queue positions and checkpoints."""
