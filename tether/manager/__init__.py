"""Models: what is published, inspected, signed, kept; the writer of the store."""
