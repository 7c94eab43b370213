"""Pure: protomux, which carries many channels on one stream of whole messages, as the package of that name (3.x) speaks it.

    frame    uint channel | message                      message   uint type | body
             0 | 0 | uint channel | (uint nbytes | message, or 0 | uint channel)*       several messages, channel by channel
             0 | 1 | uint number | string protocol | buffer id | handshake              open
             0 | 2 | uint number                                                        reject an open
             0 | 3 | uint number                                                        close

Each side numbers its own channels, from 1, and sends with its own number; a channel is open once both sides opened the same protocol and
id.  What is sent between one's own opening and the other's is kept there, or dropped if it is rejected.  Frames of several messages may
hold openings too, but no further such frames: npm's package never makes them, and they would nest without end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from tether.errors import InternalError, ProtocolError
from tether.swarm.wire.compact import buffer, read_buffer, read_string, read_uint, string, uint

__all__ = ["Asked", "Channel", "Closed", "Event", "MuxLimits", "Opened", "Protomux", "Received"]

_BATCH, _OPEN, _REJECT, _CLOSE = range(4)
_CONTROL = 0
_ONE_BYTE = 0xFC
_FULL_NBYTES = 1 << 16
"""A frame of several messages is ended here: larger ones save nothing, and would make those behind them wait."""
_FULL_COUNT = 1024
_ALONE_NBYTES = 1 << 14
"""From here on a message gets a frame of its own: joining it to others would cost more than a frame."""


@dataclass(frozen=True, slots=True)
class MuxLimits:
    """What a peer may make us keep or do."""

    channels: int = 64
    """At one time."""
    held_nbytes: int = 1 << 20
    """Messages for channels that it opened and we have not answered yet."""
    handshake_nbytes: int = 4096
    frame_messages: int = 16_384
    """In one frame, and as often another channel: the loop does nothing else while it works through them."""


class Channel:
    """One protocol on the stream. Nothing but `Protomux` changes it."""

    __slots__ = ("closed", "handshake", "id", "local", "opened", "protocol", "remote")

    def __init__(self, protocol: str, channel_id: bytes, local: int) -> None:
        self.protocol, self.id, self.local = protocol, channel_id, local
        self.remote = 0
        self.opened = False
        """Whether both sides opened it."""
        self.closed = False
        self.handshake = b""
        """What the other side opened it with."""

    @property
    def key(self) -> tuple[str, bytes]:
        return self.protocol, self.id


@dataclass(slots=True, eq=False)
class Asked:
    """The other side opened a channel that was offered: accept or reject it. Its messages are kept meanwhile."""

    protocol: str
    id: bytes
    remote: int
    handshake: bytes
    held: list[tuple[int, bytes]] = field(default_factory=list)
    held_nbytes: int = 0
    is_withdrawn: bool = False


class Opened(NamedTuple):
    """The other side opened a channel that we had opened."""

    channel: Channel


class Received(NamedTuple):
    """A message. Its body is valid as long as the frame is."""

    channel: Channel
    type: int
    body: memoryview


class Closed(NamedTuple):
    """The other side closed a channel, or rejected it."""

    channel: Channel


Event = Asked | Opened | Received | Closed


class Protomux:
    """Frames in, events out; what is to be sent is collected until `take`."""

    def __init__(self, limits: MuxLimits | None = None) -> None:
        self._limits = limits or MuxLimits()
        self._offers: set[tuple[str, bytes | None]] = set()
        self._channels: dict[tuple[str, bytes], Channel] = {}
        """Opened by us and not closed, whether or not the other side opened them."""
        self._asked: dict[tuple[str, bytes], Asked] = {}
        self._waiting: dict[tuple[str, bytes], deque[int]] = {}
        """Our numbers of openings that were not answered, among them those of channels closed since."""
        self._locals: list[Channel | None] = []
        self._free: list[int] = []
        self._remotes: list[Channel | Asked | None] = []
        self._held_nbytes = 0
        self._frames: list[bytes] = []
        self._batch: list[tuple[int, bytes]] = []
        self._batch_nbytes = 0
        self.queued_nbytes = 0
        """Of messages, since the last `take`."""

    # --- what we do

    def offer(self, protocol: str, channel_id: bytes | None = None) -> None:
        """Be told when the other side opens this protocol (None: with any id) and we have not: `Asked`. Others are rejected."""
        self._offers.add((protocol, channel_id))

    def open(self, protocol: str, channel_id: bytes = b"", handshake: bytes = b"") -> Channel:
        """Open a channel; messages may be sent at once.

        Raises: InternalError: it is open already, or the other side asked for it: then accept that.
        """
        key = protocol, channel_id
        if key in self._channels or key in self._asked:
            raise InternalError(f"a channel {protocol} is open on this stream already")
        channel = self._new_channel(key, handshake)
        self._waiting.setdefault(key, deque()).append(channel.local)
        return channel

    def accept(self, asked: Asked, handshake: bytes = b"") -> tuple[Channel, list[Received]]:
        """Open what the other side asked for: the channel, and what it sent on it before. Raises: InternalError: it was withdrawn."""
        if asked.is_withdrawn:
            raise InternalError(f"the other side closed the channel {asked.protocol} before it was accepted")
        self._forget(asked)
        channel = self._new_channel((asked.protocol, asked.id), handshake)
        self._pair(channel, asked.remote, asked.handshake)
        return channel, [Received(channel, number, memoryview(body)) for number, body in asked.held]

    def reject(self, asked: Asked) -> None:
        """Refuse what the other side asked for."""
        if not asked.is_withdrawn:
            self._forget(asked)
            self._reject(asked.remote)

    def close(self, channel: Channel) -> None:
        """Close a channel; a second call does nothing."""
        if not channel.closed:
            self._queue(_CONTROL, uint(_CLOSE) + uint(channel.local))
            self._shut(channel)

    def send(self, channel: Channel, message: bytes) -> None:
        """Queue a message, which begins with its type; does nothing on a closed channel."""
        if not channel.closed:
            self._queue(channel.local, message)

    def take(self) -> list[bytes]:
        """The frames to send, in order."""
        self._end_batch()
        frames, self._frames, self.queued_nbytes = self._frames, [], 0
        return frames

    # --- what the other side does

    def receive(self, frame: memoryview) -> Iterator[Event]:
        """What a frame says, one after the other; the mux may be used in between. Run it to its end.

        Raises: ProtocolError: it breaks a rule or a limit: cut the stream.
        """
        if not frame:
            return
        number, at = read_uint(frame, 0)
        if number == _CONTROL and at < len(frame) and frame[at] == _BATCH:
            yield from self._receive_batch(frame, at + 1)
            return
        event = self._receive_one(number, frame[at:])
        if event is not None:
            yield event

    def _receive_batch(self, frame: memoryview, at: int) -> Iterator[Event]:
        number, at = read_uint(frame, at)
        end, count, switches = len(frame), 0, 0
        while at < end:
            nbytes = frame[at]
            if nbytes <= _ONE_BYTE:
                at += 1
            else:
                nbytes, at = read_uint(frame, at)
            if not nbytes:
                number, at = read_uint(frame, at)
                switches += 1
                if switches > self._limits.frame_messages:
                    raise ProtocolError("a frame names more channels than it may hold messages")
                continue
            stop, count = at + nbytes, count + 1
            if stop > end or count > self._limits.frame_messages:
                raise ProtocolError("a frame of several messages ends within one, or holds too many")
            event = self._receive_one(number, frame[at:stop])
            at = stop
            if event is not None:
                yield event

    def _receive_one(self, number: int, message: memoryview) -> Event | None:
        if not message:
            raise ProtocolError("a message without a type")
        kind = message[0]
        if kind <= _ONE_BYTE:
            at = 1
        else:
            kind, at = read_uint(message, 0)
        if number == _CONTROL:
            return self._receive_control(kind, message[at:])
        found = self._remotes[number - 1] if number <= len(self._remotes) else None
        if found is None:
            return None  # closed or rejected here while it was on its way
        if type(found) is Asked:
            self._hold(found, kind, message[at:])
            return None
        return Received(found, kind, message[at:])  # type: ignore[arg-type]

    def _receive_control(self, kind: int, body: memoryview) -> Event | None:
        if kind == _OPEN:
            return self._receive_open(body)
        if kind == _REJECT:
            return self._receive_reject(read_uint(body, 0)[0])
        if kind == _CLOSE:
            return self._receive_close(read_uint(body, 0)[0])
        if kind == _BATCH:
            raise ProtocolError("a frame of several messages within another")
        return None  # of a later version

    def _receive_open(self, body: memoryview) -> Event | None:
        number, at = read_uint(body, 0)
        protocol, at = read_string(body, at)
        found, at = read_buffer(body, at)
        if number == _CONTROL:
            self._reject(number)
            return None
        key, handshake = (protocol, bytes(found)), bytes(body[at : at + self._limits.handshake_nbytes + 1])
        if len(handshake) > self._limits.handshake_nbytes:
            raise ProtocolError(f"a channel is opened with a handshake of over {self._limits.handshake_nbytes} bytes")
        self._make_place(number)
        return self._answered(key, number, handshake) if key in self._waiting else self._ask(key, number, handshake)

    def _make_place(self, number: int) -> None:
        """The other side's numbers grow one by one."""
        if number == len(self._remotes) + 1:
            self._remotes.append(None)
        if number > len(self._remotes) or self._remotes[number - 1] is not None:
            raise ProtocolError("a channel is opened under a number that is in use, or leaves others out")
        if number > self._limits.channels:
            raise ProtocolError(f"more than {self._limits.channels} channels")

    def _answered(self, key: tuple[str, bytes], number: int, handshake: bytes) -> Opened | None:
        local = self._next_waiting(key)
        channel = self._locals[local - 1]
        if channel is None:  # closed here since: the other side sees that next
            self._free.append(local)
            return None
        self._pair(channel, number, handshake)
        return Opened(channel)

    def _ask(self, key: tuple[str, bytes], number: int, handshake: bytes) -> Asked | None:
        is_offered = key in self._offers or (key[0], None) in self._offers
        if not is_offered or key in self._channels or key in self._asked:
            self._reject(number)
            return None
        asked = self._asked[key] = Asked(*key, number, handshake)
        self._remotes[number - 1] = asked
        return asked

    def _hold(self, asked: Asked, kind: int, body: memoryview) -> None:
        nbytes = len(body) + 512  # what an entry of the list costs, and the bytes' own head
        self._held_nbytes += nbytes
        asked.held_nbytes += nbytes
        if self._held_nbytes > self._limits.held_nbytes:
            raise ProtocolError(f"more than {self._limits.held_nbytes} bytes on channels that are not open yet")
        asked.held.append((kind, bytes(body)))

    def _receive_reject(self, local: int) -> Closed | None:
        key = next((key for key, waiting in self._waiting.items() if local in waiting), None)
        if key is None:
            raise ProtocolError("a channel is rejected that was not opened")
        self._waiting[key].remove(local)
        if not self._waiting[key]:
            del self._waiting[key]
        channel = self._locals[local - 1]
        if channel is not None:
            self._shut(channel)
        self._free.append(local)
        return None if channel is None else Closed(channel)

    def _receive_close(self, number: int) -> Closed | None:
        found = self._remotes[number - 1] if 0 < number <= len(self._remotes) else None
        if found is None:
            return None
        if isinstance(found, Asked):
            self._forget(found)
            found.is_withdrawn = True
            self._reject(number)
            return None
        self._shut(found)
        return Closed(found)

    # --- channels

    def _new_channel(self, key: tuple[str, bytes], handshake: bytes) -> Channel:
        if self._free:
            local = self._free.pop()
        else:
            self._locals.append(None)
            local = len(self._locals)
        channel = self._locals[local - 1] = self._channels[key] = Channel(*key, local)
        self._queue(_CONTROL, b"".join((uint(_OPEN), uint(local), string(key[0]), buffer(key[1]), handshake)))
        return channel

    def _next_waiting(self, key: tuple[str, bytes]) -> int:
        waiting = self._waiting[key]
        local = waiting.popleft()
        if not waiting:
            del self._waiting[key]
        return local

    def _pair(self, channel: Channel, remote: int, handshake: bytes) -> None:
        channel.remote, channel.handshake, channel.opened = remote, handshake, True
        self._remotes[remote - 1] = channel

    def _shut(self, channel: Channel) -> None:
        channel.closed = True
        del self._channels[channel.key]
        self._locals[channel.local - 1] = None
        if channel.remote:
            self._remotes[channel.remote - 1] = None
            self._free.append(channel.local)  # else it stays taken until the opening was answered

    def _forget(self, asked: Asked) -> None:
        del self._asked[asked.protocol, asked.id]
        self._held_nbytes -= asked.held_nbytes
        self._remotes[asked.remote - 1] = None

    def _reject(self, remote: int) -> None:
        self._queue(_CONTROL, uint(_REJECT) + uint(remote))

    # --- frames

    def _queue(self, local: int, message: bytes) -> None:
        self.queued_nbytes += len(message)
        if len(message) >= _ALONE_NBYTES:
            self._end_batch()
            self._frames.append(uint(local) + message)
            return
        self._batch.append((local, message))
        self._batch_nbytes += len(message)
        if self._batch_nbytes >= _FULL_NBYTES or len(self._batch) >= _FULL_COUNT:
            self._end_batch()

    def _end_batch(self) -> None:
        batch, self._batch, self._batch_nbytes = self._batch, [], 0
        if len(batch) <= 1:
            self._frames += [uint(local) + message for local, message in batch]
            return
        before = batch[0][0]
        parts = [b"\0\0", uint(before)]
        for local, message in batch:
            if local != before:
                parts += (b"\0", uint(local))
                before = local
            parts += (uint(len(message)), message)
        self._frames.append(b"".join(parts))
