"""How often intervals contain the truth."""
