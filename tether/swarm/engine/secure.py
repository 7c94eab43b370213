"""Messages on a UDX stream, encrypted: what hyperdht's NoiseSecretStream does after its handshake, with the same bytes on the wire.

    stream   header | frame*
    header   u24 LE 56 | 32 bytes that name the handshake and the sender's side | 24 bytes that begin libsodium's secretstream
    frame    u24 LE nbytes | sealed message (17 bytes longer than the message); an empty message keeps alive and is not delivered

The Noise handshake itself (IK, both keys proved) runs in JavaScript and ends in the keys that stand here.  Both sides have then proved
nothing to *this* stream yet: until the other side's header has come and fits, it may send those 59 bytes and no more.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from tether.errors import PayloadTooLargeError, ProtocolError, QueueFullError, StreamLostError, TetherError
from tether.swarm.engine.secretstream import HEADER_NBYTES, SEAL_NBYTES, Opener, Sealer

__all__ = ["Carrier", "Keys", "Route", "SecureStream", "StreamLimits"]

_LENGTH = 3
_ID = 32
_HEADER = _ID + HEADER_NBYTES
_MAX_FRAME = (1 << 24) - 1
MAX_MESSAGE = _MAX_FRAME - SEAL_NBYTES
"""Bytes: what three bytes of length leave for a message."""
_HEAD = _HEADER.to_bytes(_LENGTH, "little")

Route = Literal["direct", "punched", "relayed"]
ROUTES: tuple[Route, ...] = ("direct", "punched", "relayed")
"""In the order of `js/handed.js`."""


class Carrier(Protocol):
    """What is needed of a UDX stream."""

    @property
    def rtt(self) -> float: ...
    @property
    def pulse(self) -> tuple[int, bool]: ...
    def poke(self) -> None: ...
    def write(self, data: bytes | bytearray | memoryview, /, *, owned: bool) -> bool: ...
    def write_end(self) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def destroy(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Keys:
    """What the handshake ended in."""

    send: bytes
    receive: bytes
    peer: bytes
    """The other side's Ed25519 public key, which it proved."""
    handshake: bytes
    """Hash of the handshake's transcript, the same on both sides and of no other stream."""
    own_id: bytes
    peer_id: bytes
    is_initiator: bool


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """What a peer may make us wait for. Seconds."""

    header: float = 10.0
    """For its header, once the handshake is done."""
    idle: float = 30.0
    """For anything at all: it keeps alive every `keepalive` seconds, as hyperdht's streams do."""
    keepalive: float = 5.0


class SecureStream:
    """An encrypted connection to one peer: `ports.MessageStream` over HyperDHT. Belongs to one event loop."""

    def __init__(self, carrier: Carrier, keys: Keys, limits: StreamLimits, loop: asyncio.AbstractEventLoop) -> None:
        self._carrier, self._keys, self._limits, self._loop = carrier, keys, limits, loop
        self.route: Route = "direct"
        """How its packets travel now; a relayed stream is punched or direct once a way is found."""
        self.remote_address: tuple[str, int] | None = None
        self.max_message_nbytes = MAX_MESSAGE
        """Of what comes. A stranger is given less: what is larger cuts it before any of it is kept."""
        self._gone = False  # the carrier is closed; messages that came may still be waiting for somebody who takes them
        self._closed = False
        self._failed: TetherError | None = None
        self._sealer = Sealer(keys.send)
        self._opener: Opener | None = None
        """From its header on."""
        self._parts: list[bytes | memoryview] = []
        """What came and can't be read yet; not copied where it is `bytes`, which nobody changes."""
        self._nbytes = 0
        self._needed = _LENGTH
        self._wanted = True
        self._taking = False  # from the turn after somebody takes messages on: until then what waits goes first, and an end after it
        self._ended = self._peer_ended = self._told_end = False
        self._full = False
        self._drained: asyncio.Future[None] | None = None
        self._on_message: Callable[[memoryview], None] | None = None
        self._on_end: Callable[[], None] = _nothing
        self._on_close: Callable[[Exception | None], None] | None = None
        self._sent_at = self._heard_at = loop.time()
        self._timer = loop.call_later(limits.header, self._no_header)
        self._greet()

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open"
        return f"<SecureStream {state} {self.route} with {self.peer[:12]}…>"

    @property
    def peer(self) -> str:
        """The other side's Ed25519 public key, hex."""
        return self._keys.peer.hex()

    @property
    def is_initiator(self) -> bool:
        """Whether this side opened it."""
        return self._keys.is_initiator

    @property
    def handshake_hash(self) -> bytes:
        """The same 64 bytes on both sides, and on no other stream: what binds a signature to this stream."""
        return self._keys.handshake

    @property
    def carrier(self) -> Carrier:
        """What it travels on."""
        return self._carrier

    @property
    def rtt(self) -> float:
        """Round trip in seconds, smoothed; 0.0 before the first one."""
        return self._carrier.rtt

    @property
    def pulse(self) -> tuple[int, bool]:
        """How many packets came so far, acknowledgements too, and whether the peer owes one."""
        return self._carrier.pulse

    def poke(self) -> None:
        """Ask the peer for a packet now: a new `pulse` shows that this stream leads to it. Any peer's UDX answers by itself."""
        self._carrier.poke()

    @property
    def closed(self) -> bool:
        """Whether both directions are gone."""
        return self._gone

    def start(
        self, on_message: Callable[[memoryview], None], on_end: Callable[[], None], on_close: Callable[[Exception | None], None]
    ) -> None:
        """Deliver what comes, from the loop's next turn on; see `ports.MessageStream`."""
        self._on_message, self._on_end, self._on_close = on_message, on_end, on_close
        self._loop.call_soon(self._catch_up)

    def send(self, message: bytes | bytearray | memoryview) -> bool:
        """Queue a message; False: the queue is long, wait for `drained`. Nothing happens on a stream that closed or ended.

        Raises: PayloadTooLargeError: over 16 MiB less 18 bytes.
        """
        nbytes = len(message)
        if nbytes > MAX_MESSAGE:
            raise PayloadTooLargeError(f"A message of {nbytes} bytes is over {MAX_MESSAGE}; send it in pieces.")
        if self._gone or self._ended:
            return True
        frame = self._sealer.seal(message, (nbytes + SEAL_NBYTES).to_bytes(_LENGTH, "little"))
        self._sent_at = self._loop.time()
        try:
            self._full = not self._carrier.write(frame, owned=True)
        except QueueFullError as error:  # its place in the cipher's sequence is taken: nothing can follow it
            self._cut(error)
        return not self._full

    async def drained(self) -> None:
        """Wait until more may be queued.

        Raises: StreamLostError (a ServiceUnavailableError): the stream closed.
        """
        while self._full and not self._gone:
            if self._drained is None:
                self._drained = self._loop.create_future()
            await asyncio.shield(self._drained)
        if self._gone:
            raise StreamLostError(
                f"The stream to {self.peer[:12]}… closed before the queue was empty; connect again.", ""
            ) from self._failed

    def pause(self) -> None:
        """Deliver nothing for now: the peer is slowed down once what it may send has come."""
        self._wanted = self._taking = False
        if self._greeted and not self._gone:
            self._carrier.pause()

    def resume(self) -> None:
        """Deliver again, from the loop's next turn on."""
        if not self._wanted:
            self._wanted = True
            self._loop.call_soon(self._catch_up)

    def end(self) -> None:
        """Send no more; what is queued goes out first."""
        if not self._gone and not self._ended:
            self._ended = True
            self._carrier.write_end()

    def destroy(self) -> None:
        """Cut the connection at once, in both directions; a second call does nothing."""
        self._cut(StreamLostError("The stream was cut on this side.", "ECANCELED"))

    # What the carrier tells.

    def data_arrived(self, data: bytes | bytearray | memoryview) -> None:
        """Bytes of the wire, in order."""
        self._heard_at = self._loop.time()
        view = memoryview(data)
        if self._parts:
            if self._held() or self._nbytes + len(data) < self._needed:
                self._parts.append(bytes(data))
                self._nbytes += len(data)
                return
            # Only the frame that began before is put together, what is behind it is read where it lies.
            split = self._needed - self._nbytes if self._needed > _LENGTH else len(data)
            self._complete(view[:split])
            view = view[split:]
        if self._closed:
            return
        if self._held():
            self._keep(view)
        else:
            self._read(view)

    def ended(self) -> None:
        """The peer sends no more."""
        self._peer_ended = True
        self._tell_end()

    def drain(self) -> None:
        """The queue is short again."""
        self._full = False
        self._wake()

    def carrier_closed(self, code: str | None) -> None:
        """Both directions are gone; the code of UDX where they broke."""
        if self._gone:
            return
        if code is None and not (self._ended and self._peer_ended):
            code = "ECANCELED"  # cut on this side: the node was suspended or closed
        if code is not None:
            self._close(StreamLostError(f"The stream to {self.peer[:12]}… broke ({code}); connect again.", code))
            return
        self._let_go()
        if not self._held():
            self._close(None)

    def _greet(self) -> None:
        self._carrier.write(_HEAD + self._keys.own_id + self._sealer.header, owned=True)

    @property
    def _greeted(self) -> bool:
        return self._opener is not None

    def _held(self) -> bool:
        """Whether what comes is kept: nobody takes messages now. The header is read in any case."""
        return self._greeted and not self._taking

    def _complete(self, last: memoryview) -> None:
        """The frame that began before, or at least its length, is whole with these bytes."""
        began, self._parts = self._parts, []
        opener, length = self._opener, self._needed - _LENGTH
        if opener is None or not length or length > self.max_message_nbytes + SEAL_NBYTES:
            self._read(b"".join((*began, last)))
        else:
            first, *more = [memoryview(part) for part in began]
            self._open_frame(opener, first[_LENGTH:], *more, last)

    def _keep(self, rest: memoryview) -> None:
        if rest:
            self._parts = [rest if type(rest.obj) is bytes else bytes(rest)]
            self._nbytes = len(rest)
            self._needed = _LENGTH if len(rest) < _LENGTH else _LENGTH + int.from_bytes(rest[:_LENGTH], "little")

    def _catch_up(self) -> None:
        self._taking = self._wanted and self._on_message is not None
        if not self._held() and not self._closed:
            self._heard_at = self._loop.time()  # while nobody took it nothing was heard, however much came
            try:
                self._deliver_waiting()
            except BaseException:  # of who takes it: what is behind it can't be told any more, and the peer is not to blame
                self.destroy()
                raise
        if self._closed:
            self._tell_close()

    def _deliver_waiting(self) -> None:
        if not self._gone:
            self._carrier.resume()
        if self._parts and self._nbytes >= self._needed:
            data, self._parts = b"".join(self._parts), []
            self._read(data)
        self._tell_end()
        if self._gone and not self._held():
            self._close(None)

    def _read(self, data: bytes | bytearray | memoryview) -> None:
        at, nbytes = 0, len(data)
        view = memoryview(data)
        while nbytes - at >= _LENGTH and not self._closed:
            length = data[at] | data[at + 1] << 8 | data[at + 2] << 16
            if not self._greeted and length != _HEADER:
                self._violated(f"its first frame has {length} bytes, not {_HEADER}")
                return
            if length > self.max_message_nbytes + SEAL_NBYTES:
                self._violated(f"a message of {length - SEAL_NBYTES} bytes is over the {self.max_message_nbytes} that it may send")
                return
            if self._held() or nbytes - at - _LENGTH < length:
                break
            at += _LENGTH
            if self._opener is None:
                self._meet(bytes(data[at : at + length]))
            else:
                self._open_frame(self._opener, view[at : at + length])
            at += length
        if not self._closed:
            self._keep(view[at:])

    def _meet(self, header: bytes) -> None:
        if not hmac.compare_digest(header[:_ID], self._keys.peer_id):
            self._violated("its header is of another handshake")
            return
        self._opener = Opener(header[_ID:], self._keys.receive)
        self._timer.cancel()
        self._timer = self._loop.call_later(self._limits.keepalive, self._look)
        if self._held():
            self._carrier.pause()

    def _open_frame(self, opener: Opener, *sealed: memoryview) -> None:
        nbytes = sum(map(len, sealed))
        if nbytes < SEAL_NBYTES:
            self._violated(f"a frame of {nbytes} bytes is shorter than a seal")
            return
        opened = opener.open(*sealed)
        if opened is None:
            self._violated("a frame was altered on its way, or sealed with another key")
            return
        with opened as message:
            if message and self._on_message is not None:
                self._on_message(message)

    def _violated(self, what: str) -> None:
        self._cut(ProtocolError(f"The peer {self.peer[:12]}… was cut: {what}."))

    def _look(self) -> None:
        """Every few seconds: keep the stream alive, give up a peer that says nothing."""
        now, limits = self._loop.time(), self._limits
        if now - self._heard_at > limits.idle and not self._held() and not self._peer_ended:
            code = "ETIMEDOUT"
            self._cut(StreamLostError(f"Nothing came from {self.peer[:12]}… for {limits.idle:g} s; connect again.", code))
            return
        if now - self._sent_at >= limits.keepalive and not self._ended and not self._full:
            self.send(b"")
        self._timer = self._loop.call_later(limits.keepalive, self._look)

    def _no_header(self) -> None:
        seconds = self._limits.header
        self._cut(StreamLostError(f"{self.peer[:12]}… did not begin its stream in {seconds:g} s; connect again.", "ETIMEDOUT"))

    def _cut(self, error: TetherError) -> None:
        if self._closed:
            return
        gone = self._gone
        self._close(error)
        if not gone:
            self._carrier.destroy()

    def _close(self, error: TetherError | None) -> None:
        if self._closed:
            return
        self._closed = True
        self._failed = error
        self._parts = []
        self._let_go()
        self._tell_close()

    def _let_go(self) -> None:
        self._gone = True
        self._timer.cancel()
        self._wake()

    def _wake(self) -> None:
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        self._drained = None

    def _tell_end(self) -> None:
        if not self._peer_ended or self._told_end or self._held():
            return
        if self._parts or not self._greeted:
            self._violated("it ended in the middle of a frame")
            return
        self._told_end = True
        self._on_end()

    def _tell_close(self) -> None:
        told, self._on_close = self._on_close, None
        if told is not None:
            self._loop.call_soon(told, self._failed)  # never inside a call of the one who is told


def _nothing() -> None:
    """Until somebody listens."""
