"""HTTP for every resource: auth, bodies, fields, problem details, idempotency, waiting, streams, paging, request log."""
