"""Events: the log of each job, and webhooks with their deliveries."""
