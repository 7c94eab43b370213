"""One JSON line for each request, with ECS field names, to a file. Buffered: at most a second or 512 lines behind."""

from __future__ import annotations

import asyncio
import atexit
import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import orjson

__all__ = ["Access", "AccessLog"]

_log = logging.getLogger("tether.telemetry")
_DELAY: Final = 1.0
"""Seconds a line may wait in memory."""
_URL: Final = 1024
"""Bytes of a URL that are logged."""
_LINES: Final = 512
"""Lines that are written at once: some 150 KB, a fraction of a millisecond into the page cache."""


class Access(NamedTuple):
    """One answered request. There is no field for headers: keys must never reach a log."""

    time: float
    """Unix time of the answer."""
    seconds: float
    method: str
    url: bytes
    """As it came; what follows `?` is not logged, since people put keys there."""
    status: int
    received: int
    """Bytes of the request's body."""
    sent: int
    """Bytes of the answer's body."""
    client: str | None
    caller: str | None
    """Name of the API key, not the key; None without one."""
    id: bytes


class AccessLog:
    """Appends to one file. Used from one event loop; `close` writes what waits, and so does the end of the process."""

    def __init__(self, path: Path) -> None:
        """Raises: OSError: the file can't be opened for appending."""
        self._file: BinaryIO = path.open("ab", buffering=0)
        self._waiting: list[Access] = []
        self._timer: asyncio.TimerHandle | None = None
        self._failed = False
        atexit.register(self.close)

    def write(self, access: Access) -> None:
        """Note one request; costs an append, the text is made when it is written out."""
        waiting = self._waiting
        waiting.append(access)
        if len(waiting) == 1:
            self._timer = asyncio.get_running_loop().call_later(_DELAY, self.flush)
        elif len(waiting) >= _LINES:
            self.flush()

    def flush(self) -> None:
        """Write what waits. A full disk loses lines, says so once, and never stops a request."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        waiting, self._waiting = self._waiting, []
        if not waiting or self._file.closed:
            return
        try:
            self._file.write(b"".join(map(_line, waiting)))
            self._failed = False
        except OSError as error:
            if not self._failed:
                _log.warning("the access log loses lines: %s; free some space or choose another folder", error)
            self._failed = True

    def close(self) -> None:
        """Write what waits and close the file; a second call does nothing."""
        atexit.unregister(self.close)
        self.flush()
        self._file.close()


def _line(access: Access) -> bytes:
    fields: dict[str, Any] = {
        "@timestamp": datetime.fromtimestamp(access.time, UTC),
        "event.dataset": "tether.access",
        "event.duration": round(access.seconds * 1e9),
        "http.request.id": access.id.decode("latin-1"),
        "http.request.method": access.method,
        "url.path": access.url[:_URL].partition(b"?")[0].decode("latin-1"),
        "http.response.status_code": access.status,
        "http.request.body.bytes": access.received,
        "http.response.body.bytes": access.sent,
        "client.ip": access.client,
        "user.name": access.caller,
    }
    return orjson.dumps(fields, option=orjson.OPT_UTC_Z | orjson.OPT_APPEND_NEWLINE)
