"""Blobs, signed manifests and bitmaps between two peers, on a secure stream of their own; both ask and both give."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar, assert_never

from tether.errors import ProtocolError, ServiceUnavailableError, TetherError
from tether.ports import MessageStream, SignedManifest
from tether.swarm.blobs.asking import Asking, AskingLimits, OnHave
from tether.swarm.blobs.frames import (
    Absent,
    Ask,
    Begin,
    Cancel,
    Failed,
    Goodbye,
    Have,
    Hello,
    Kind,
    Piece,
    bits,
    encode_absent,
    encode_goodbye,
    encode_hello,
    is_hello,
    read_frame,
    read_manifest,
)
from tether.swarm.blobs.giving import Giving, GivingLimits, Shelf
from tether.swarm.wire.bandwidth import TokenBucket
from tether.swarm.wire.link import Link
from tether.types import Digest

__all__ = ["AskingLimits", "BlobConnection", "GivingLimits", "Kind", "PeerBlobs", "Shelf", "is_hello"]

Answer = TypeVar("Answer")
_HELLO_PATIENCE = 10.0
"""Seconds for a peer to say what its stream is; it does so unasked, at once."""


class BlobConnection:
    """A stream of blobs to one peer. Belongs to the loop that it is made on; it owns the stream."""

    def __init__(
        self,
        stream: MessageStream,
        shelf: Shelf | None = None,
        *,
        uplink: TokenBucket | None = None,
        asking: AskingLimits | None = None,
        giving: GivingLimits | None = None,
        on_have: OnHave | None = None,
    ) -> None:
        """`shelf`: what the peer may ask for; None: nothing. `uplink`: the cap that all connections share."""
        giving = giving or GivingLimits()
        self._link = Link(stream)
        self._asking = Asking(self._link, asking or AskingLimits(), on_have)
        self._giving = Giving(self._link, shelf, uplink or TokenBucket(), giving) if shelf is not None else None
        self.in_flight = (asking or AskingLimits()).in_flight
        self._is_greeted = False
        self._alarm = self._link.loop.call_later(_HELLO_PATIENCE, self._unheard)
        self._link.start(self._on_frame, self._on_closed)
        self._link.send(encode_hello(giving.window))

    @property
    def peer(self) -> str:
        """The other side's public key, hex."""
        return self._link.peer

    @property
    def is_closed(self) -> bool:
        return self._link.closed.is_set()

    @property
    def waiting(self) -> int:
        """Askings that were not answered yet."""
        return len(self._asking)

    @property
    def error(self) -> TetherError | None:
        """Why the peer was cut; None: it was not. One that gave wrong bytes is not to be asked again."""
        return self._link.error

    @property
    def got_nbytes(self) -> int:
        return self._asking.got_nbytes

    @property
    def given_nbytes(self) -> int:
        return 0 if self._giving is None else self._giving.given_nbytes

    def source(self, name: str = "") -> PeerBlobs:
        """The peer as a source of blobs, to be used on any loop."""
        return PeerBlobs(self, name or f"peer {self.peer[:8]}…")

    async def blob(self, digest: Digest, *, check: bool = True) -> bytes | None:
        """The verified bytes, or as they came without `check`; None: the peer lacks them.

        Raises: UnavailableError, RemoteError; ForbiddenError: we may not have it.
        """
        return await self._asking.ask(Kind.BLOB, digest, check=check)

    async def manifest(self, digest: Digest) -> SignedManifest | None:
        """The version whose manifest has the digest; its signature is not checked here. Raises: as `blob`."""
        found = await self._asking.ask(Kind.MANIFEST, digest)
        return None if found is None else read_manifest(found)

    async def bitmap(self, digest: Digest, count: int) -> list[bool] | None:
        """Which of the `count` blobs of a version the peer says it has; from now on `on_have` is told of more. Raises: as `blob`."""
        found = await self._asking.ask(Kind.BITMAP, digest)
        try:
            return None if found is None else bits(found, count)
        except ProtocolError as error:
            self._link.cut(error)
            raise self._link.why() from error

    def announce(self, digest: Digest, indices: Sequence[int]) -> None:
        """Blobs of a version are here since, by their places in its manifest: told to the peer if it follows the version."""
        if self._giving is not None and not self.is_closed:
            self._giving.announce(digest, indices)

    async def wait_closed(self) -> None:
        """Wait until the connection is gone, however it went."""
        await self._link.closed.wait()

    async def aclose(self, reason: str = "it closed") -> None:
        """Say goodbye and close. A second call does nothing."""
        if not self.is_closed:
            if self._giving is not None:
                self._giving.end()
            self._link.send(encode_goodbye(reason))
            self._link.finish(None)
            await self._link.gone.wait()

    def destroy(self) -> None:
        """Cut it at once."""
        self._link.destroy()

    def _on_frame(self, message: memoryview) -> None:
        frame = read_frame(message, self.peer)
        if isinstance(frame, Hello) == self._is_greeted:
            raise ProtocolError("a stream of blobs begins with one hello")
        match frame:
            case Hello():
                self._greeted(frame)
            case Piece():
                self._asking.on_piece(frame)
            case Begin():
                self._asking.on_begin(frame)
            case Absent():
                self._asking.on_absent(frame.id)
            case Failed():
                self._asking.on_failed(frame.id, frame.error)
            case Have():
                self._asking.on_have(frame)
            case Goodbye():
                self._asking.on_goodbye(frame.text)
            case Ask() | Cancel():
                self._on_asking(frame)
            case _:
                assert_never(frame)

    def _greeted(self, hello: Hello) -> None:
        self._is_greeted = True
        self._alarm.cancel()
        self._asking.greeted(hello.window)

    def _on_asking(self, frame: Ask | Cancel) -> None:
        if self._giving is None:
            if isinstance(frame, Ask):
                self._link.send(encode_absent(frame.id))
        elif isinstance(frame, Ask):
            self._giving.on_ask(frame)
        else:
            self._giving.on_cancel(frame.id)

    def _unheard(self) -> None:
        self._link.cut(ServiceUnavailableError(f"it said nothing for {_HELLO_PATIENCE:g} s"))

    def _on_closed(self, error: TetherError) -> None:
        self._alarm.cancel()
        self._asking.fail(error)
        if self._giving is not None:
            self._giving.end()


class PeerBlobs:
    """`ports.BlobSource` over a connection, which stays the caller's to close. Its calls may come from any loop."""

    def __init__(self, connection: BlobConnection, name: str, *, check: bool = True) -> None:
        self.name = name
        self.in_flight = connection.in_flight
        self._check = check
        self._connection = connection
        self._loop = asyncio.get_running_loop()

    def unchecked(self) -> PeerBlobs:
        """The same, for who hashes what it gets and answers for what it does with liars: here it would be done twice, on the loop."""
        return PeerBlobs(self._connection, self.name, check=False)

    async def fetch(self, digest: Digest, nbytes: int) -> bytes | None:
        """As the port says; the bytes have the digest, unless `unchecked`. Raises: ForbiddenError besides."""
        del nbytes
        return await self._here(self._connection.blob(digest, check=self._check))

    async def manifest(self, digest: Digest) -> SignedManifest | None:
        """As the port says; the bytes have the digest. Raises: ForbiddenError besides."""
        return await self._here(self._connection.manifest(digest))

    async def bitmap(self, digest: Digest, count: int) -> list[bool] | None:
        """Which of the `count` blobs of a version it says it has; None: not the version. Raises: as `manifest`."""
        return await self._here(self._connection.bitmap(digest, count))

    async def aclose(self) -> None:
        """Nothing: others may use the connection."""

    async def _here(self, asking: Coroutine[Any, Any, Answer]) -> Answer:
        """Ask on the connection's loop."""
        if asyncio.get_running_loop() is self._loop:
            return await asking
        if self._loop.is_closed():
            asking.close()
            raise ServiceUnavailableError(f"{self.name} is closed: connect again")
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(asking, self._loop))
