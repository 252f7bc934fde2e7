"""`GET /metrics` for Prometheus: the tenant's figures, and for an operator the stack's."""
