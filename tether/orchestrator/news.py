"""Pure: what a gateway is sent of the table: the whole once, then what changed; the whole again where it is too far behind.

Each change is encoded once for all gateways. A gateway says what it has before it is sent more, so nothing queues up for one that is slow.
"""

from __future__ import annotations

from collections import deque
from typing import Final

import msgspec

from tether.routing.table import Table, TableChange

__all__ = ["News"]

_MOST_NBYTES: Final = 4 << 20
"""Of changes that are kept: seconds of a busy control plane, and less than the table of 10,000 models."""


class News:
    """Of one orchestrator, for any number of gateways."""

    def __init__(self, most_nbytes: int = _MOST_NBYTES) -> None:
        self._most_nbytes = most_nbytes
        self._changes: deque[bytes] = deque()
        self._last = 0
        """Number of the table that the last of them makes."""
        self._nbytes = 0
        self._whole: tuple[int, bytes] = (-1, b"")

    def add(self, change: TableChange) -> None:
        """The table changed."""
        encoded = msgspec.msgpack.encode(change)
        self._changes.append(encoded)
        self._last = change.seq
        self._nbytes += len(encoded)
        while self._nbytes > self._most_nbytes:
            self._nbytes -= len(self._changes.popleft())

    def since(self, seq: int | None, table: Table) -> dict[str, bytes | list[bytes]]:
        """The message to who has the table of that number; None: it has none. `table`: as it is now."""
        behind = self._last - seq if seq is not None else -1
        if table.seq == self._last and 0 <= behind <= len(self._changes):
            return {"changes": list(self._changes)[len(self._changes) - behind :]}
        if self._whole[0] != table.seq:
            self._whole = table.seq, msgspec.msgpack.encode(table)
        return {"table": self._whole[1]}
