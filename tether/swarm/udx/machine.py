"""Pure: one UDX stream: datagrams, the application's calls and a time in; datagrams, events and the next deadline out.

    receive / receive_run …   what came, as often as it comes
    turn(now) -> events       then once: what the application is to know, in order
    flush(now)                then while it says so: fills `outgoing`; the application may have written meanwhile
    expire(now)               when `deadline` has passed, followed by turn and flush

So the price of an ack and of a window is paid once per wake-up of the socket, not per packet. Two rules are not libudx' own: a stream
that is over answers for 25 s what it hears (libudx has no TIME_WAIT: a peer whose last ack was lost would repeat its END to nobody until
it times out), and a peer that leaves seven keepalives unanswered, and that for 15 s, is gone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tether.swarm.udx import wire
from tether.swarm.udx.outgoing import Outgoing
from tether.swarm.udx.receiving import Receiver
from tether.swarm.udx.sending import Sender
from tether.swarm.udx.wire import Buffer, Header, Run

__all__ = ["CloseCode", "Data", "Drained", "Ended", "Event", "Machine", "Message", "Moved"]

CloseCode = Literal["ECANCELED", "ECONNRESET", "ETIMEDOUT"]
"""Why a stream closed, in udx-native's words: ours was taken away, the peer destroyed it, the peer did not answer."""
LINGER_SECONDS = 25.0
"""Longer than a peer repeats what it got no ack for: 23 s, libudx 13 s. Three seconds are less than one doubled timeout, and did not do."""
_MAX_UNANSWERED, _MAX_SILENCE = 7, 15.0
"""Keepalives and seconds: a cut of a few seconds must not close what a stream with data in flight would survive."""
_MAX_PENDING_BLOCKS = 8 * wire.MAX_BLOCKS
_ANSWERED = wire.DATA | wire.END | wire.HEARTBEAT


@dataclass(frozen=True, slots=True)
class Data:
    """Bytes of the stream, in order."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Message:
    """A datagram beside the stream: unordered, unrepeated."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Ended:
    """The peer wrote its last byte, and all were delivered."""


@dataclass(frozen=True, slots=True)
class Drained:
    """The application was asked to wait with writing and may go on."""


@dataclass(frozen=True, slots=True)
class Moved:
    """What was sent to the former remote is acknowledged; its socket is not needed any more."""


Event = Data | Message | Ended | Drained | Moved


class Machine:
    """A stream. Memory: what the application wrote, at most a window of what came, and state for what is in flight."""

    def __init__(self, now: float, first: int = 0, peer_first: int = 0) -> None:
        """`first`, `peer_first`: the numbers at which the two directions begin; both sides must agree, and everybody says 0."""
        self.receiver = Receiver(peer_first)
        self.sender = Sender(self.receiver, now, first)
        self.is_over = False
        """Closed; it may still answer what it hears until `is_gone`."""
        self.is_gone = False
        self.code: CloseCode | None = None
        """Why it is over; None: both sides ended, or we destroyed it."""
        self._events: list[Event] = []
        self._pending: tuple[int, int, int, list[tuple[int, int]]] | None = None
        self._is_paused = self._owes_ack = self._is_reset = self._told_end = False
        self._keepalive = self._keepalive_at = 0.0
        self._unanswered = 0
        self._statistics = self.sender.statistics
        self._last_word: Outgoing | None = None
        self._owes_word = False
        self._linger_until = 0.0

    @property
    def is_done(self) -> bool:
        """Whether the application may be told that it is closed: it is over, or the END is all that was not acknowledged, repeated often.

        The peer has ended too; the last ack of a libudx is then lost for good, since it keeps no TIME_WAIT. The END is repeated further,
        for a peer that did not get it.
        """
        return self.is_over or (self._told_end and self.sender.waits_for_last_ack)

    @property
    def is_connected(self) -> bool:
        """Whether there is a remote to send to."""
        return self.sender.path is not None and not self.is_over

    @property
    def outgoing(self) -> list[Outgoing]:
        """Datagrams for the socket; who sends them empties the list."""
        return self.sender.outgoing

    @property
    def deadline(self) -> float:
        """When `expire` is due; 0: never."""
        if self.is_over:
            return self._linger_until
        return min(filter(None, (self.sender.deadline, self._keepalive_at)), default=0.0)

    # -- the application

    def connect(self, path: object, remote_id: int, overhead: int, now: float) -> None:
        """There is a remote; `overhead`: bytes of IP, UDP and UDX headers on the way to it. What came before this is kept."""
        self.sender.connect(path, remote_id, overhead)
        self._arm_keepalive(now)

    def change_remote(self, path: object, remote_id: int, overhead: int, now: float) -> None:
        """Go on with another remote; `Moved` tells when all sent to the former one is acknowledged."""
        self.sender.move(path, remote_id, overhead, now)

    def write(self, data: Buffer) -> bool:
        """Queue bytes, which must not change any more; False: wait for `Drained`."""
        return True if self.is_over or self.sender.is_ending else self.sender.put(data)

    def end(self) -> None:
        """Send END behind what was written; the other direction stays open."""
        self.sender.end()

    def send_message(self, data: Buffer) -> None:
        """Send a datagram beside the stream, now or never."""
        if self.is_connected:
            self.sender.send_control(wire.MESSAGE, data)

    def poke(self) -> None:
        """Ask the peer for a sign of life now, whatever else waits to be sent."""
        if self.is_connected:
            self.sender.send_control(wire.HEARTBEAT)

    def set_keepalive(self, seconds: float, now: float) -> None:
        """Ask the peer for a sign of life after so long without one; 0: don't."""
        self._keepalive = seconds
        self._arm_keepalive(now)

    def pause(self) -> None:
        """No `Data` until `resume`; the window that the peer sees shrinks by what comes meanwhile."""
        self._is_paused = True

    def resume(self) -> None:
        """`Data` again from the next turn on."""
        self._is_paused = False
        self._owes_ack |= self.receiver.advertised < self.receiver.limit // 2

    def destroy(self, now: float) -> None:
        """Abort: nothing that waits is sent, the peer is told."""
        if self.is_over:
            return
        if self.is_connected:
            self.sender.send_control(wire.DESTROY)
            self._linger(wire.DESTROY, now)
        self._close(None)

    def abort(self, code: CloseCode | None) -> None:
        """Close without a word to the peer."""
        if not self.is_over:
            self._close(code)

    # -- the network

    def receive(self, datagram: Buffer, header: Header) -> None:
        """A packet of this stream, from anyone who knows its id: whatever it holds, it changes no more than a lost packet would."""
        flags, receiver = header[2], self.receiver
        self._hear(len(datagram), 1)
        if self.is_over:
            self._owes_word |= bool(flags & _ANSWERED)
            return
        seq = wire.unwrap(receiver.next, header[6])
        blocks: list[tuple[int, int]] = []
        if flags & ~wire.DATA or header[3]:
            if not self._receive_rare(datagram, header, seq):
                return
            if flags & wire.SACK:
                blocks = wire.blocks_of(datagram, header)
        elif flags:
            self._owes_ack = True
            receiver.accept(seq, bytes(datagram[wire.HEADER_NBYTES :]))
        self._note_ack(wire.unwrap(self.sender.flight.una, header[7]), header[5], seq, blocks)

    def _receive_rare(self, datagram: Buffer, header: Header, seq: int) -> bool:
        """All but data without padding and bare acks; whether the packet's ack counts."""
        flags, receiver = header[2], self.receiver
        if flags & wire.HEARTBEAT:
            self._owes_ack = True
            return False
        payload = wire.payload_of(datagram, header) if flags & (wire.DATA | wire.MESSAGE) else b""
        if payload is None:
            return False
        if flags & wire.DESTROY and seq >= receiver.next:
            self._is_reset = True
        if flags & (wire.DATA | wire.END):
            self._owes_ack = True
            receiver.accept(seq, payload if flags & wire.DATA else b"", end=bool(flags & wire.END))
        if flags & wire.MESSAGE:
            self._events.append(Message(payload))
        return True

    def receive_run(self, run: Run, nbytes: int) -> None:
        """Data packets with one number after the other; `nbytes`: of all, headers included."""
        _, window, low_first, low_last, low_ack, data = run
        count = low_last - low_first + 1
        self._hear(nbytes, count)
        if self.is_over:
            self._owes_word = True
            return
        first = wire.unwrap(self.receiver.next, low_first)
        self._owes_ack = True
        self.receiver.accept_run(first, count, data)
        self._note_ack(wire.unwrap(self.sender.flight.una, low_ack), window, first + count - 1, [])

    def turn(self, now: float) -> list[Event]:
        """What the application is to know, in order."""
        events, self._events = self._events, []
        if self.is_over:
            return events
        if self._pending is not None:
            ack, window, seq, blocks = self._pending
            self._pending = None
            self._acknowledge(ack, window, seq, blocks, now, events)
        if self.is_connected:
            self._deliver(events)
        if self._is_reset:
            self._close("ECONNRESET")
        return events

    def flush(self, now: float) -> bool:
        """Fill `outgoing`; True: there is more, call again when that was sent."""
        sender = self.sender
        if self._owes_word and self._last_word is not None:
            self._owes_word = False
            sender.outgoing.append(self._last_word)
        if not self.is_connected:
            return False
        count = len(sender.outgoing)
        if sender.pump(now):
            self._owes_ack &= self.receiver.has_holes  # what leaves carries it
            return True
        if self._owes_ack:
            self._owes_ack = False
            if self.receiver.has_holes or len(sender.outgoing) == count:  # else the data that leaves carries it
                sender.send_ack()
        if sender.is_ended and self._told_end:
            self._linger(0, now)
            self._close(None)
        return False

    def expire(self, now: float) -> None:
        """Something is due."""
        if self.is_over:
            self.is_gone = now >= self._linger_until
            return
        if self._keepalive_at and now >= self._keepalive_at:
            self._keep_alive(now)
        sender = self.sender
        if sender.deadline and now >= sender.deadline:
            sender.expire(now)
        if sender.has_failed:
            self._close(None if self.is_done else "ETIMEDOUT")

    def _deliver(self, events: list[Event]) -> None:
        receiver = self.receiver
        if not self._is_paused and receiver.is_ready:
            events += map(Data, receiver.take())
        if receiver.is_ended and not receiver.is_ready and not self._told_end:
            self._told_end = True
            events.append(Ended())

    def _acknowledge(self, ack: int, window: int, seq: int, blocks: list[tuple[int, int]], now: float, events: list[Event]) -> None:
        sender = self.sender
        sender.acknowledge(ack, window, seq, blocks, now)
        if sender.has_moved:
            events.append(Moved())
        if sender.has_drained:
            events.append(Drained())
        sender.has_moved = sender.has_drained = False
        if sender.flight.is_empty:
            self._arm_keepalive(now)

    def _note_ack(self, ack: int, window: int, seq: int, blocks: list[tuple[int, int]]) -> None:
        """Keep the newest until the turn; blocks add up, since one packet can't name all."""
        pending = self._pending
        if pending is not None:
            if ack < pending[0] and not blocks:
                return
            if pending[3] and len(pending[3]) < _MAX_PENDING_BLOCKS:
                blocks = pending[3] + blocks
            if ack < pending[0]:
                ack, window, seq = pending[:3]
        self._pending = ack, window, seq, blocks

    def _hear(self, nbytes: int, packets: int) -> None:
        statistics = self._statistics
        statistics.nbytes_received += nbytes
        statistics.packets_received += packets
        self._unanswered = 0

    def _arm_keepalive(self, now: float) -> None:
        self._keepalive_at = now + self._keepalive if self._keepalive and self.is_connected else 0.0

    def _keep_alive(self, now: float) -> None:
        self._keepalive_at = now + self._keepalive
        if not self.sender.flight.is_empty:
            return  # its own timers speak
        if self._unanswered >= max(_MAX_UNANSWERED, _MAX_SILENCE / self._keepalive) and self._statistics.packets_received:
            self._close("ETIMEDOUT")
            return
        self._unanswered += 1
        self.sender.send_control(wire.HEARTBEAT)

    def _linger(self, flags: int, now: float) -> None:
        packet = self.sender.control(flags)
        self._last_word = Outgoing(packet, len(packet), self.sender.path)
        self._linger_until = now + LINGER_SECONDS

    def _close(self, code: CloseCode | None) -> None:
        self.is_over, self.code = True, code
        self.is_gone = not self._linger_until
        self._pending = None
        self.sender.clear()
        self.receiver.clear()
