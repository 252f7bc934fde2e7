"""The REST API: one file or room per resource, with its schemas and its routes."""
