"""Model versions: routes, schemas and drift."""
