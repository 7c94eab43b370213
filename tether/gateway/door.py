"""What both lanes of the gateway share: the dispatcher, admission, request ids, metrics, the access log."""

from __future__ import annotations

import itertools
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from tether.config import Limits
from tether.errors import MalformedRequestError, TetherError
from tether.gateway.admission import Admission, Headers, Keys, timeout_of
from tether.gateway.event_log import EventLog
from tether.gateway.oip import Target, raw_request, target_of
from tether.gateway.parts import Parts
from tether.ports import Hop, HopReply, Management
from tether.routing.table import Table, VersionEntry, WorkerEntry
from tether.telemetry.accesslog import Access, AccessLog
from tether.telemetry.metrics import REQUESTS, UNKNOWN, RequestMetrics, Series

__all__ = ["Dispatcher", "Door", "Settings"]

_REQUEST_ID: Final = re.compile(rb"[!-~]{1,128}")
_URLS: Final = 4096
"""Inference URLs whose parse is remembered; a caller that invents names only empties the memory."""


class Dispatcher(Protocol):
    """Carries requests to workers (`gateway/dispatch.py`)."""

    table: Table
    """Replaced on each push of the orchestrator, never changed in place."""
    management: Management
    events: EventLog

    def infer(self, model: str, version: str | None, hop: Hop, done: Callable[[HopReply], None], /) -> Callable[[], None]:
        """Answer one request: `done` is called once, on the loop's thread, perhaps before this returns; errors come as replies too.

        The result cancels it, for a client that went away; `done` is not called after that.
        """
        ...

    def stream(self, model: str, version: str | None, hop: Hop, parts: Parts, done: Callable[[HopReply], None], /) -> Callable[[], None]:
        """As `infer`, with an answer in parts: the reply that `done` gets ends it, with one more part if it is 200 and has a body."""
        ...

    async def status(self) -> dict[str, Any]:
        """The services of the lab."""
        ...

    async def forgive(self, model: str) -> None:
        """Hold nothing any more against inputs of this model, nor against its versions. Raises: ServiceUnavailableError."""
        ...

    async def explain(self, model: str) -> list[dict[str, Any]]:
        """Why each version of a model is where it is. Raises: ServiceUnavailableError."""
        ...

    async def drain(self, worker: str, patience: float | None, wait: float) -> WorkerEntry:
        """As `ports.Rolling.drain`; None: have it go on. Raises: ServiceUnavailableError, UnknownWorkerError, UnsupportedError."""
        ...

    async def restart_worker(self, worker: str) -> WorkerEntry:
        """As `ports.Rolling.restart_worker`: the worker that ends. Raises: as `drain`."""
        ...

    def labelled(self, entry: VersionEntry, right: int, wrong: int, /) -> None:
        """Labels came for answers of a version: so many were right, so many wrong."""
        ...

    async def vitals(self) -> dict[str, Any]:
        """By worker, what it uses and what its models did. Raises: ServiceUnavailableError."""
        ...


@dataclass(frozen=True, slots=True)
class Settings:
    """What the gateway accepts, and for how long it waits for its clients."""

    keys: Keys = field(default_factory=Keys)
    """Kept by reference: `keys.replace` takes effect at once."""
    limits: Limits = field(default_factory=Limits)
    allow_origins: frozenset[str] = frozenset()
    allow_hosts: frozenset[str] = frozenset()
    access_log: Path | None = None
    header_nbytes: int = 16 << 10
    """A key, a trace context and a proxy's notes take 2 KB; no client of the protocol sends near this."""
    header_count: int = 100
    patience: float = 10.0
    """Seconds that a client may stall while it sends a request or takes an answer: it must complete its headers, and then move 64 KiB, in
    as long (at most half as much again: the clock ticks twice in that time)."""
    keep_alive: float = 75.0
    """Seconds an idle connection stays open: longer than clients keep theirs, so that the client closes and no request meets the close."""
    tls: tuple[Path, Path] | None = None
    """Certificate chain and key."""
    drain: int = 10
    """Seconds that open requests have when the gateway ends."""


class Door:
    """Belongs to one event loop."""

    def __init__(self, dispatcher: Dispatcher, settings: Settings, metrics: RequestMetrics = REQUESTS) -> None:
        """Raises: OSError: the access log can't be opened."""
        self.dispatcher = dispatcher
        self.settings = settings
        self.admission = Admission(settings.keys, settings.allow_origins, settings.allow_hosts)
        self._metrics = metrics
        self._log = AccessLog(settings.access_log) if settings.access_log is not None else None
        self.logs = self._log is not None
        self._prefix = secrets.token_hex(4).encode()
        self._serial = itertools.count(1)
        self._standing: tuple[list[tuple[bytes, bytes]], bytes] = ([], b"")
        self._targets: dict[bytes, Target | None] = {}
        self._series: dict[Target, Series] = {}
        self._series_table: Table | None = None

    def target(self, url: bytes) -> Target | None:
        """Model and version of an inference URL, None for another; remembered, since clients repeat themselves."""
        try:
            return self._targets[url]
        except KeyError:
            if len(self._targets) >= _URLS:
                self._targets.clear()
            found = self._targets[url] = target_of(url)
            return found

    def series(self, target: Target) -> Series:
        """The metrics of what `target` means now; names that mean nothing share one."""
        table = self.dispatcher.table
        if table is not self._series_table:
            self._series, self._series_table = {}, table
        found = self._series.get(target)
        if found is not None:
            return found
        if len(self._series) >= _URLS:  # one version has many spellings: 1, 01, ١
            self._series.clear()
        try:
            model = table.resolve(*target).model
        except TetherError:
            return self._metrics.series(UNKNOWN, UNKNOWN)
        found = self._series[target] = self._metrics.series(model.name, str(model.version))
        return found

    def request_id(self, sent: bytes | None) -> bytes:
        """The client's own id where it is printable and short, else a new one: a random prefix and a counter, a tenth of uuid4's time."""
        if sent is not None and _REQUEST_ID.fullmatch(sent):
            return sent
        return b"%b-%x" % (self._prefix, next(self._serial))

    def hop(self, target: Target, headers: Headers, body: bytes) -> Hop:
        """What goes to the worker.

        Raises: MalformedRequestError, BadInputError; UnknownModelError, UnknownVersionError: of a raw request.
        """
        text = headers.get(b"inference-header-content-length")
        header_nbytes = 0 if text is None else _header_nbytes(text, len(body))
        timeout = timeout_of(headers, body, header_nbytes, self.settings.limits.timeout)
        if text is None:
            if not body:
                raise MalformedRequestError(
                    "the body is empty; send the request's JSON, or Inference-Header-Content-Length: 0 and a raw tensor"
                )
        elif header_nbytes == 0:
            body, header_nbytes = raw_request(body, self.dispatcher.table.resolve(*target).info)
        return Hop(body, header_nbytes, timeout, session=headers.get(b"x-session-id", b""))

    def note(self, access: Access) -> None:
        """One line of the access log."""
        if self._log is not None:
            self._log.write(access)

    def standing(self, headers: list[tuple[bytes, bytes]]) -> bytes:
        """The headers that every answer has (Date), as bytes; the server makes a new list each second."""
        if headers is not self._standing[0]:
            self._standing = headers, b"".join(b"%b: %b\r\n" % pair for pair in headers)
        return self._standing[1]

    def cors(self, headers: Mapping[bytes, bytes]) -> list[tuple[bytes, bytes]]:
        """The headers that let an allowed page read the answer."""
        origin = headers.get(b"origin")
        if origin is None or origin.decode("latin-1") not in self.settings.allow_origins:
            return []
        exposed = b"inference-header-content-length, x-request-id, retry-after, etag, accept-ranges, content-range"
        return [(b"access-control-allow-origin", origin), (b"access-control-expose-headers", exposed), (b"vary", b"origin")]

    def close(self) -> None:
        """Write out the access log."""
        if self._log is not None:
            self._log.close()


def _header_nbytes(text: bytes, nbytes: int) -> int:
    if not text.isdigit() or len(text) > 10:  # noqa: PLR2004 (more digits than any body has bytes)
        raise MalformedRequestError(f"Inference-Header-Content-Length is {text[:40]!r}; give the length of the JSON in bytes")
    value = int(text)
    if value > nbytes:
        raise MalformedRequestError(f"Inference-Header-Content-Length is {value}, the body has {nbytes} bytes")
    return value
