"""What one model version did so far."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ServingStats"]


@dataclass(slots=True)
class ServingStats:
    """Running totals of one model; written by its thread, read by the heartbeat."""

    requests: int = 0
    failures: int = 0
    batches: int = 0
    rows: int = 0
    busy: float = 0.0
    """Seconds spent inside the runtime."""
    waiting: int = 0
    """Requests decoded and not yet run."""
    load_seconds: float = 0.0
    """What it took to load, fetching and a first run included; waiting for room not."""
