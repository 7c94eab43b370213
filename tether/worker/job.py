"""A decoded request that waits for its batch, or whose answer comes in parts."""

from __future__ import annotations

from tether.types import InferRequest
from tether.wire.connection import Connection
from tether.worker.batching import Rows

__all__ = ["Job"]


class Job:
    """One is made for each request: a plain class, of which what is rarely so costs nothing. Times are of the monotonic clock."""

    block: memoryview | None = None
    """Keeps the ring block alive while arrays view it."""
    is_suspect: bool = False
    """Whether it is suspected to have ended workers: it runs alone, in a process of the model's own."""
    deaths: int = 0
    """Of the model's processes that it may have ended; one more tells where it had ended workers before."""
    tries: int = 0
    """Runs that failed."""
    is_withdrawn: bool = False
    """Whether nobody waits for it any more."""

    def __init__(self, connection: Connection, request_id: int, request: InferRequest, rows: Rows, arrived: float, deadline: float) -> None:
        self.connection, self.id, self.request, self.rows = connection, request_id, request, rows
        self.arrived, self.deadline = arrived, deadline

    @property
    def key(self) -> tuple[Connection, int]:
        """What tells it from all others of the model."""
        return self.connection, self.id

    @property
    def priority(self) -> object:
        """As the caller wrote it; looked at only where the model has levels."""
        return self.request.parameters.get("priority", 0)
