"""Pure: after how many seconds who was refused for now is to come again (`Retry-After`, RFC 9110 §10.2.3)."""

from __future__ import annotations

import math
from typing import Final

from tether.errors import LoadFailedError, MemoryFullError, NoWorkerError, QueueFullError, TetherError, TooManyTriesError

__all__ = ["RETRY", "SOON", "retry_after"]

RETRY: Final = frozenset({429, 503})
"""Statuses that come with it."""
SOON: Final = 1
"""Seconds: a service that died is there again, a batch has run."""
_LATER: Final = 5
"""Seconds: what is in memory has to become idle, a worker to be started, somebody to mend a model."""


def retry_after(error: TetherError) -> int:
    """Seconds, at least 1, as the error knows them, else by its kind."""
    if isinstance(error, QueueFullError | TooManyTriesError) and len(error.args) > 1:
        return max(math.ceil(float(error.args[1])), SOON)
    return _LATER if isinstance(error, LoadFailedError | MemoryFullError | NoWorkerError) else SOON
