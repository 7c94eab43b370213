"""The asking half of a stream of blobs: many askings at a time, every answer bounded before it comes and verified when it came."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from blake3 import blake3

from tether.errors import ProtocolError, ServiceUnavailableError, TetherError, WrongBytesError
from tether.swarm.blobs.frames import Begin, Have, Kind, Piece, encode_ask, encode_cancel, read_manifest
from tether.swarm.wire.link import Link
from tether.swarm.wire.pieces import Body
from tether.types import Digest

__all__ = ["Asking", "AskingLimits", "OnHave"]

OnHave = Callable[[Digest, tuple[int, ...]], None]
"""A version, and the places in its manifest of blobs that a peer has since."""
_LAST_ID = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class AskingLimits:
    """What a peer may make us keep, and how long it may make us wait."""

    in_flight: int = 8
    """Askings at a time, if the peer takes so many: of full blobs that is 32 MiB of memory."""
    max_blob_nbytes: int = 8 << 20
    """The store cuts at 4 MiB."""
    max_manifest_nbytes: int = (64 << 20) + 1024
    """The largest that the store takes, and its signature."""
    max_bitmap_nbytes: int = 1 << 20
    """Of eight million blobs: more than a manifest can name."""
    patience: float = 30.0
    """Seconds in which a peer that was asked gives at least `min_nbytes` or an answer; else it is cut."""
    min_nbytes: int = 4096

    def most(self, kind: Kind) -> int:
        """The size of the largest answer that is taken."""
        return {Kind.BLOB: self.max_blob_nbytes, Kind.MANIFEST: self.max_manifest_nbytes, Kind.BITMAP: self.max_bitmap_nbytes}[kind]


@dataclass(slots=True, eq=False)
class _Asked:
    kind: Kind
    digest: Digest
    future: asyncio.Future[bytes | None]
    is_checked: bool = True
    """Whether the bytes are compared with the digest here."""
    body: Body | None = None


class Asking:
    """What one peer was asked for."""

    def __init__(self, link: Link, limits: AskingLimits, on_have: OnHave | None) -> None:
        self._link, self._limits, self._on_have = link, limits, on_have
        self._asked: dict[int, _Asked] = {}
        """Until the peer has answered, those too that nobody wants any more: it still works on them."""
        self._last_id = 0
        self._window = 0
        """How many the peer takes; none before its hello."""
        self._waiting = deque[asyncio.Future[None]]()
        self._bitmaps_of: set[Digest] = set()
        self._farewell: str | None = None
        self._alarm: asyncio.TimerHandle | None = None
        self._seen = self._checked = 0
        self.got_nbytes = 0

    def __len__(self) -> int:
        return len(self._asked)

    async def ask(self, kind: Kind, digest: Digest, *, check: bool = True) -> bytes | None:
        """The verified bytes, or as they came without `check`; None: the peer does not have them. Cancelled, the peer is told.

        Raises: ServiceUnavailableError: the connection is gone; ProtocolError: the peer was cut; what else it answers with.
        """
        await self._room()
        if kind is Kind.BITMAP:
            self._bitmaps_of.add(digest)
        ask_id = self._next_id()
        frame = encode_ask(ask_id, kind, digest)
        future: asyncio.Future[bytes | None] = self._link.loop.create_future()
        asked = self._asked[ask_id] = _Asked(kind, digest, future, check)
        self._link.send(frame)
        self._watch()
        try:
            return await future
        finally:
            if ask_id in self._asked and not self._link.closed.is_set():
                self._link.send(encode_cancel(ask_id))
                if asked.body is not None:
                    asked.body.drop()

    # --- what comes

    def greeted(self, window: int) -> None:
        """The peer said how many askings it takes. Raises: ProtocolError: none, or twice."""
        if self._window or not window:
            raise ProtocolError("it takes no askings, or says hello twice")
        self._window = min(window, self._limits.in_flight)
        self._wake()

    def on_begin(self, frame: Begin) -> None:
        """An answer begins. Raises: ProtocolError."""
        asked = self._of(frame.id)
        if asked.body is not None or not 0 < frame.nbytes <= self._limits.most(asked.kind):
            raise ProtocolError(f"an answer of {frame.nbytes} bytes to an asking for a {asked.kind.name.lower()}, or one that begins twice")
        asked.body = Body(frame.nbytes)
        if asked.future.done():
            asked.body.drop()
        self._add(frame.id, asked, frame.data)

    def on_piece(self, frame: Piece) -> None:
        """It goes on. Raises: ProtocolError."""
        self._add(frame.id, self._of(frame.id), frame.data)

    def on_absent(self, ask_id: int) -> None:
        """The peer does not have it. Raises: ProtocolError."""
        asked = self._end(ask_id)
        if not asked.future.done():
            asked.future.set_result(None)

    def on_failed(self, ask_id: int, error: TetherError) -> None:
        """The peer does not give it. Raises: ProtocolError."""
        asked = self._end(ask_id)
        if not asked.future.done():
            asked.future.set_exception(error)

    def on_have(self, frame: Have) -> None:
        """More blobs came to the peer. Raises: ProtocolError: of a version that it was not asked for."""
        if frame.digest not in self._bitmaps_of:
            raise ProtocolError("it tells what it has of a version that it was not asked for")
        if self._on_have is not None:
            self._on_have(frame.digest, frame.indices)

    def on_goodbye(self, text: str) -> None:
        """The peer answers no more."""
        self._farewell = text
        self.fail(self._gone())

    def fail(self, error: TetherError) -> None:
        """Nothing more is answered."""
        asked, self._asked = self._asked, {}
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        for each in asked.values():
            if not each.future.done():
                each.future.set_exception(type(error)(*error.args))
        self._wake()

    # --- within

    async def _room(self) -> None:
        """Wait until the peer takes another asking, in the order of coming."""
        while not self._is_over() and (self._window <= len(self._asked)):
            waiter = self._link.loop.create_future()
            self._waiting.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                if waiter.done() and not waiter.cancelled():
                    self._wake()  # it was this one's turn, and is the next one's now
                raise
        if self._is_over():
            raise self._gone()

    def _is_over(self) -> bool:
        return self._farewell is not None or self._link.closed.is_set()

    def _gone(self) -> TetherError:
        if self._farewell is None:
            return self._link.why()
        return ServiceUnavailableError(f"peer {self._link.peer} is leaving ({self._farewell}): ask another, or connect again later")

    def _wake(self) -> None:
        room = len(self._waiting) if self._is_over() else self._window - len(self._asked)
        while self._waiting and room > 0:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                room -= 1

    def _next_id(self) -> int:
        self._last_id = self._last_id % _LAST_ID + 1
        return self._last_id

    def _of(self, ask_id: int) -> _Asked:
        asked = self._asked.get(ask_id)
        if asked is None:
            raise ProtocolError(f"an answer to asking {ask_id}, which is not open")
        return asked

    def _end(self, ask_id: int) -> _Asked:
        asked = self._of(ask_id)
        del self._asked[ask_id]
        self._seen += self._limits.min_nbytes
        self._wake()
        return asked

    def _add(self, ask_id: int, asked: _Asked, data: memoryview) -> None:
        if asked.body is None:
            raise ProtocolError("a piece of an answer that did not begin")
        self._seen += len(data)
        self.got_nbytes += len(data)
        if not asked.body.add(data):
            return
        if not asked.future.done():
            whole = asked.body.take()
            asked.future.set_result(_verified(asked.kind, asked.digest, whole) if asked.is_checked else whole)
        self._end(ask_id)

    def _watch(self) -> None:
        if self._alarm is None:
            self._checked = self._seen
            self._alarm = self._link.loop.call_later(self._limits.patience, self._check)

    def _check(self) -> None:
        self._alarm = None
        if not self._asked:
            return
        got = self._seen - self._checked
        if got < self._limits.min_nbytes:
            self._link.cut(ServiceUnavailableError(f"it was asked and gave {got} bytes in {self._limits.patience:g} s"))
        else:
            self._watch()


def _verified(kind: Kind, digest: Digest, data: bytes) -> bytes:
    """Raises: WrongBytesError: it is not what was asked for; ProtocolError."""
    if kind is Kind.BITMAP:
        return data  # nothing of it can be verified: it says only whom to ask first
    named = read_manifest(data).data if kind is Kind.MANIFEST else data
    if blake3(named).hexdigest() != digest:
        raise WrongBytesError(f"it gave other bytes for {kind.name.lower()} {digest}")
    return data
