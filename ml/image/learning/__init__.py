"""Training: the loop, learners, schedules, sampling, checkpoints and DDP workers."""
