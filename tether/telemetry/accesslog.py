"""One JSON line for each request, with ECS field names, to a file. Buffered: at most a second or 512 lines behind."""

from __future__ import annotations

import asyncio
import atexit
import logging
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

import msgspec

__all__ = ["Access", "AccessLog"]

_log = logging.getLogger("tether.telemetry")
_DELAY: Final = 1.0
"""Seconds a line may wait in memory."""
_URL: Final = 1024
"""Bytes of a URL that are logged."""
_LINES: Final = 512
"""Lines that are written at once: some 150 KB, a fraction of a millisecond into the page cache."""
_NAMES: Final = {
    "timestamp": "@timestamp",
    "dataset": "event.dataset",
    "duration": "event.duration",
    "id": "http.request.id",
    "method": "http.request.method",
    "path": "url.path",
    "status": "http.response.status_code",
    "received": "http.request.body.bytes",
    "sent": "http.response.body.bytes",
    "client": "client.ip",
    "caller": "user.name",
}
_encode_lines = msgspec.json.Encoder().encode_lines
"""Of structs: a third of what orjson takes for dictionaries, and this is paid for each request."""


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
            self._file.write(_encode_lines(map(_line, waiting)))
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


class _Line(msgspec.Struct, gc=False, rename=_NAMES):
    timestamp: datetime
    dataset: str
    duration: int
    id: str
    method: str
    path: str
    status: int
    received: int
    sent: int
    client: str | None
    caller: str | None


def _line(access: Access) -> _Line:
    moment, duration = datetime.fromtimestamp(access.time, UTC), round(access.seconds * 1e9)
    name, path = access.id.decode("latin-1"), _path(access.url)
    return _Line(
        moment, "tether.access", duration, name, access.method, path, access.status,
        access.received, access.sent, access.client, access.caller,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _path(url: bytes) -> str:
    return url[:_URL].partition(b"?")[0].decode("latin-1")
