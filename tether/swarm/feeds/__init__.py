"""A catalog's public history: entries, logs, signed heads."""
