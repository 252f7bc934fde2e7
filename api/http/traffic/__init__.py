"""Requests, limited by key and address, and counted by route and status."""
