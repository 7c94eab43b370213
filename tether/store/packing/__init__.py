"""Bytes on disk: packs, what is on its way into one, reading them back verified."""
