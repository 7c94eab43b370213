"""Transports to a lab: today HTTP, to its gateway; and how models travel up and down."""
