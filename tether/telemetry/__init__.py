"""Metrics, the access log, and the life of a service process."""
