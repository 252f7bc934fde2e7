"""Deletions on request: their receipts, and of ended jobs what every deletion needs."""
