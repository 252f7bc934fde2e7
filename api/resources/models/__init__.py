"""Model versions: promotion, comparison, cards, drift."""
