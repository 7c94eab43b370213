"""Garbage collection, and pack folders that several hosts share."""
