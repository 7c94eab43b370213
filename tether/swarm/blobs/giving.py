"""The giving half of a stream of blobs: who may have what, the smallest first, no faster than allowed, and little of it in memory."""

from __future__ import annotations

import asyncio
import functools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from operator import attrgetter
from typing import Protocol, assert_never

import structlog

from tether.errors import NotFoundError, ProtocolError, ServiceUnavailableError, TetherError
from tether.ports import SignedManifest
from tether.swarm.blobs.frames import (
    Ask,
    Kind,
    encode_absent,
    encode_begin,
    encode_error,
    encode_have,
    encode_manifest,
    encode_piece,
)
from tether.swarm.wire.bandwidth import TokenBucket
from tether.swarm.wire.link import Link
from tether.swarm.wire.pieces import LEAST_NBYTES
from tether.types import Digest

__all__ = ["Giving", "GivingLimits", "Shelf"]

log = structlog.get_logger("tether.swarm")
_PIECE_NBYTES = 127_739
"""With a head of 5 or 13 bytes a multiple of 8: such messages are encrypted in half the time. Encrypted, it fills two batches of UDX (44
packets of 1,452 bytes each): what is over would leave as a batch of its own, of three packets."""
_TURN = 0.25
"""Seconds that a piece may take of a capped line: other peers' pieces go in between."""
_TURN_NBYTES = 1 << 18
"""Queued in one turn of the loop: as much as UDX sends at once, while it is in the processor's cache."""


class Shelf(Protocol):
    """What a lab has for its peers. None: it does not have it, or not whole."""

    async def authorise(self, peer: str, kind: Kind, digest: Digest) -> None:
        """Called before anything is read.

        Raises: NotFoundError: the peer may not have it, or it is not here: it is not told which; ForbiddenError: it may have nothing.
        """
        ...

    async def blob(self, digest: Digest) -> bytes | None:
        """The verified bytes as they are stored."""
        ...

    async def manifest(self, digest: Digest) -> SignedManifest | None:
        """The version as it was signed."""
        ...

    async def bitmap(self, digest: Digest) -> bytes | None:
        """Which blobs of the version are here: `blob_frames`."""
        ...


@dataclass(frozen=True, slots=True)
class GivingLimits:
    """What a peer may make us keep and do."""

    window: int = 64
    """Askings of a peer that are not answered yet; one that asks for more is cut."""
    at_once: int = 4
    """Of those, how many are read at a time, and then sent: of full blobs that is 16 MiB of memory."""
    patience: float = 30.0
    """Seconds in which a peer takes a piece; else it is cut."""
    max_followed: int = 1024
    """Versions of which it is told what came."""


@dataclass(slots=True, eq=False)
class _Body:
    """An answer of which pieces are to be sent."""

    ask_id: int
    data: memoryview
    sent: asyncio.Future[None]
    """All of it; cancelled where it is taken back."""
    at: int = 0

    @property
    def missing(self) -> int:
        return len(self.data) - self.at

    def frame(self, nbytes: int) -> bytes:
        piece = self.data[self.at : self.at + nbytes]
        return encode_piece(self.ask_id, piece) if self.at else encode_begin(self.ask_id, len(self.data), piece)


class Giving:
    """What one peer asks for."""

    def __init__(self, link: Link, shelf: Shelf, uplink: TokenBucket, limits: GivingLimits) -> None:
        """`uplink`: for all peers together."""
        self._link, self._shelf, self._uplink, self._limits = link, shelf, uplink, limits
        self._queue = deque[Ask]()
        self._working: dict[int, asyncio.Task[None]] = {}
        self._follows: dict[Digest, None] = {}
        self._is_leaving = False
        self._manifest_turn = asyncio.Lock()
        """One at a time: they can have 64 MiB, and a peer needs the first one before it can ask for anything else."""
        self._turn = asyncio.Lock()
        """Who waits for room: the peer has `patience` for the frame whose turn it is, not for all that wait."""
        self._bodies: list[_Body] = []
        self._sending: asyncio.Task[None] | None = None
        self.given_nbytes = 0

    def __len__(self) -> int:
        return len(self._queue) + len(self._working)

    def on_ask(self, ask: Ask) -> None:
        """The peer wants something. Raises: ProtocolError: more than was agreed, or an id that is in use."""
        if len(self) >= self._limits.window:
            raise ProtocolError(f"more than {self._limits.window} askings at a time")
        if ask.id in self._working or any(other.id == ask.id for other in self._queue):
            raise ProtocolError(f"asking {ask.id} is open already")
        self._queue.append(ask)
        self._go_on()

    def on_cancel(self, ask_id: int) -> None:
        """It does not want it any more; unknown ids were answered while this was on its way."""
        task = self._working.get(ask_id)
        if task is not None:
            task.cancel()
            return
        for ask in self._queue:
            if ask.id == ask_id:
                self._queue.remove(ask)
                self._link.send(encode_absent(ask_id))
                return

    def announce(self, digest: Digest, indices: Sequence[int]) -> None:
        """More blobs of a version are here now; told to a peer that asked for its bitmap and reads what it is told."""
        if digest in self._follows and self._link.is_clear:
            for frame in encode_have(digest, indices):
                self._link.send(frame)

    def end(self) -> None:
        """The connection is gone, or we are leaving: nothing more is given."""
        self._is_leaving = True
        self._queue.clear()
        for task in list(self._working.values()):
            task.cancel()
        if self._sending is not None:
            self._sending.cancel()

    def _go_on(self) -> None:
        while self._queue and len(self._working) < self._limits.at_once and not self._is_leaving:
            ask = self._queue.popleft()
            task = self._working[ask.id] = self._link.loop.create_task(self._give(ask))
            task.add_done_callback(functools.partial(self._given, ask.id))

    def _given(self, ask_id: int, task: asyncio.Task[None]) -> None:
        del self._working[ask_id]
        if task.cancelled():
            self._link.send(encode_absent(ask_id))
        self._go_on()

    async def _give(self, ask: Ask) -> None:
        if ask.kind is not Kind.MANIFEST:
            await self._do(ask)
            return
        async with self._manifest_turn:
            await self._do(ask)

    async def _do(self, ask: Ask) -> None:
        try:
            answer = await self._answer(ask)
            if isinstance(answer, TetherError):
                await self._put(encode_error(ask.id, answer))
            elif answer:
                await self._send(ask.id, answer)
            else:
                await self._put(encode_absent(ask.id))
        except TimeoutError:
            self._link.cut(ServiceUnavailableError(f"it asks and took nothing for {self._limits.patience:g} s"))
        except TetherError:
            return  # the connection is gone

    async def _answer(self, ask: Ask) -> bytes | TetherError | None:
        try:
            await self._shelf.authorise(self._link.peer, ask.kind, ask.digest)
            return await self._read(ask)
        except NotFoundError:
            return None
        except TetherError as error:
            return error
        except Exception:  # of whatever reads: the peer is told, and others go on
            log.exception("a blob could not be given", peer=self._link.peer, kind=ask.kind.name, digest=ask.digest)
            return ServiceUnavailableError("it can't be read now: ask another peer")

    async def _read(self, ask: Ask) -> bytes | None:
        match ask.kind:
            case Kind.BLOB:
                return await self._shelf.blob(ask.digest)
            case Kind.MANIFEST:
                manifest = await self._shelf.manifest(ask.digest)
                return None if manifest is None else encode_manifest(manifest)
            case Kind.BITMAP:
                self._follow(ask.digest)
                return await self._shelf.bitmap(ask.digest)
            case _:
                assert_never(ask.kind)

    def _follow(self, digest: Digest) -> None:
        self._follows[digest] = None
        if len(self._follows) > self._limits.max_followed:
            del self._follows[next(iter(self._follows))]

    async def _send(self, ask_id: int, data: bytes) -> None:
        """Return when all of it left. Raises: as `_put`."""
        body = _Body(ask_id, memoryview(data), self._link.loop.create_future())
        self._bodies.append(body)
        if self._sending is None:
            self._sending = self._link.loop.create_task(self._send_bodies())
        try:
            await body.sent
        except asyncio.CancelledError:
            if body.missing:
                raise
            # it was taken back when all of it had left: a second answer would break the protocol
        finally:
            self._bodies.remove(body)

    async def _send_bodies(self) -> None:
        """Send pieces, one of the body that lacks least, one of the oldest: small ones pass large ones, which come to an end all the same.

        Of large ones one is whole after the other. In turns they would all come to their ends together, and the peer would hash and write
        them together, and then have nothing to do.
        """
        in_turn = 0
        try:
            for is_oldest in cycle((False, True)):
                if not self._bodies:
                    return
                body = self._bodies[0] if is_oldest else min(self._bodies, key=attrgetter("missing"))
                in_turn += await self._send_piece(body)
                if in_turn >= _TURN_NBYTES or body.sent.done():
                    in_turn = 0
                    await asyncio.sleep(0)
        except Exception as error:  # told to all that wait
            for body in self._bodies:
                if not body.sent.done():
                    body.sent.set_exception(error)
        finally:
            self._sending = None

    async def _send_piece(self, body: _Body) -> int:
        """How many bytes left: none of what was taken back meanwhile."""
        rate = self._uplink.nbytes_per_second
        nbytes = min(body.missing, _PIECE_NBYTES if rate * _TURN > _PIECE_NBYTES else max(int(rate * _TURN), LEAST_NBYTES))
        wait = self._uplink.take(nbytes, self._link.loop.time())
        try:
            if wait:
                await asyncio.wait([body.sent], timeout=wait)
            has_left = await self._put(body.frame(nbytes), body)
        except BaseException:
            self._uplink.give_back(nbytes)
            raise
        if not has_left:  # a peer that takes back all the time would use up what all peers share
            self._uplink.give_back(nbytes)
            return 0
        body.at += nbytes
        self.given_nbytes += nbytes
        if not body.missing:
            body.sent.set_result(None)
        return nbytes

    async def _put(self, frame: bytes, body: _Body | None = None) -> bool:
        """Send it when its turn comes; False: the body that it is of was taken back.

        Raises: TimeoutError: the peer takes nothing; TetherError: the connection is gone.
        """
        async with self._turn:
            if not self._link.is_clear:
                async with asyncio.timeout(self._limits.patience):
                    await self._link.clear()
            elif self._link.closed.is_set():
                raise self._link.why()
            if body is not None and body.sent.done():
                return False
            self._link.send(frame)
            return True
