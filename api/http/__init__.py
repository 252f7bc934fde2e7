"""What every resource needs of HTTP: auth, bodies, fields, errors, idempotency, waiting, streams, paging, logging."""
