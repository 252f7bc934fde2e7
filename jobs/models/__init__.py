"""Model versions: registry, gate, promotion, comparison, drift, feedback and reproduction."""
